"""Steps, compiled behind the traffic, one bucket after the other. What is not compiled yet runs as
it is.

    block: a graph of each kind of block and one of the head, for each bucket
    model: a graph of the whole step, for each bucket

A bucket is a number of rows, of which the next token is computed, or a part of one prompt. A step
of fewer rows is filled up with rows that write to the page of nobody. How many tokens rows or
parts have is no part of a graph.
"""

import atexit
import ctypes
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlab.errors import QlabError, first_line
from qlab.generation.cache import Pool, Rows
from qlab.generation.pages import NOBODY
from qlab.generation.parts import Blocks, Part, Program, logits_of, of_module, of_step
from qlab.lowering.compiler.options import inductor_options
from qlab.process.progress import say
from qlab.process.surroundings import environment, undisturbed

NONE, BLOCK, MODEL = MODES = ("none", "block", "model")
# Pages of the rows that are compiled with, and by how many tokens a part of a prompt is shorter: no
# other size of a model is one of theirs, so that the dimensions that count tokens are known by
# their size.
PAGES, SHORTER = 13, 2
FEW = 5  # tokens of a prompt that twins are compared on
FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# A step is hundreds of loops of microseconds each. On a CPU they are called from C++; built apart
# from what calls them, they compile in a third of the time. The sizes of a model's tensors stay,
# and torch guards those of the others: looking at all of them in every step takes 2 to 6 % of it.
FROM_CPP = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True, "size_asserts": False}

_one_at_a_time = threading.Lock()  # torch compiles for one engine of a process at a time

# (rows, the positions of their first tokens) -> what a model is called with beside ids
Arguments = Callable[[Rows, Tensor], dict[str, Any]]


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """What a compiled step computes: the next token of so many rows, or a part of one prompt."""

    is_prompt: bool = False
    rows: int = 1

    def __str__(self) -> str:
        return "prompts" if self.is_prompt else f"steps of {self.rows} rows"


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A compiled step, which is called as the model and gives logits."""

    shape: Shape
    run: Callable[..., Tensor]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.run(*args, **kwargs)


class _Closed(BaseException):
    """Ends the thread that compiles, wherever it is."""


class Compiled:
    """What is compiled of a model's step, and a thread that compiles the rest.

    Args:
        model: in evaluation mode.
        mode: none, block or model.
        rows: how many requests run at a time.
        pool: the cache's slots.
        arguments: what the model is called with.
        why: why the model runs as it is, or None.

    Raises:
        QlabError: an unknown mode.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: str,
        *,
        rows: int,
        pool: Pool,
        arguments: Arguments,
        why: str | None,
    ):
        refuse_unknown(mode)
        self.model, self.mode, self._arguments = model, mode, arguments
        self.sizes = buckets(rows) if mode != NONE and why is None else ()
        self._pool = pool.like(FEW + 1) if self.sizes else pool
        self.graphs, self.recompiles, self.seconds = 0, 0, 0.0
        self.said: list[str] = []
        self._ready: dict[Shape, Bucket] = {}
        self._wanted: Counter[Shape] = Counter()
        self._thread = threading.Thread(target=self._run, name="qlab compile", daemon=True)
        self._is_closed = False
        if mode != NONE and why is not None:
            self._say(f"the model stays eager: {why}")
        if self.sizes:
            atexit.register(self.close)
            self._thread.start()

    # -------------------------------------------------------------- the thread that steps
    def bucket(self, rows: int) -> Bucket | None:
        """The compiled step for so many rows, or None while there is none."""
        size = next((size for size in self.sizes if size >= rows), None)
        return None if size is None else self._of(Shape(rows=size))

    def prompt(self, tokens: int) -> Bucket | None:
        """The compiled step for a part of one prompt, or None while there is none. One token is
        that of a row."""
        return self._of(Shape(is_prompt=True)) if tokens > 1 else self.bucket(1)

    def _of(self, shape: Shape) -> Bucket | None:
        self._wanted[shape] += 1
        return self._ready.get(shape)

    def drop(self, shape: Shape, why: str) -> None:
        """Run steps of a shape eager from now on."""
        self._ready.pop(shape, None)
        self._say(f"{shape} stay eager: {why}")

    def stats(self) -> dict[str, Any]:
        """What is compiled: the mode, the buckets of rows that are ready of all, whether prompts
        are, graphs, graphs that were made after the warm-up, seconds, and what stays eager and
        why."""
        return {
            "compile": self.mode,
            "buckets": self.sizes,
            "ready": self._ready_rows(),
            "prompts": Shape(is_prompt=True) in self._ready,
            "graphs": self.graphs,
            "recompiles": self.recompiles,
            "compile_seconds": round(self.seconds, 1),
            "eager": tuple(self.said),
        }

    def _ready_rows(self) -> tuple[int, ...]:
        return tuple(sorted(shape.rows for shape in [*self._ready] if not shape.is_prompt))

    def __repr__(self) -> str:
        stays = "".join(f"; {sentence}" for sentence in self.said)
        prompts = ", and prompts," if Shape(is_prompt=True) in self._ready else ""
        ready = f"{len(self._ready_rows())} of {len(self.sizes)} buckets of rows{prompts}"
        return f"compile={self.mode}: {ready} are compiled{stays}"

    def wait(self) -> None:
        """Until every bucket is compiled or stays eager."""
        if self.sizes:
            self._thread.join()

    def close(self) -> None:
        """Compile no more. A graph that is under way is left where it is."""
        atexit.unregister(self.close)
        self._is_closed = True
        while self._thread.is_alive():
            thread = ctypes.c_ulong(self._thread.ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(_Closed))
            self._thread.join(1.0)

    def _say(self, sentence: str) -> None:
        if sentence not in self.said:  # of another bucket
            self.said.append(sentence)
            say(f"qlab: compile={self.mode}: {sentence}")

    # -------------------------------------------------------------- the thread that compiles
    @undisturbed
    @torch.no_grad()
    def _run(self) -> None:
        try:
            blocks = self._blocks() if self.mode == BLOCK else None
            left = [*(Shape(rows=rows) for rows in self.sizes), Shape(is_prompt=True)]
            while left and not self._is_closed:
                # what the traffic asked for most comes first
                shape = max(left, key=lambda shape: self._wanted[shape])
                left.remove(shape)
                started = time.monotonic()
                with _one_at_a_time, kept():
                    self._ready[shape] = self._warmed(shape, blocks)
                self.seconds += time.monotonic() - started
        except Exception as error:  # a thread that dies would say nothing
            self._say(f"the model stays eager: {first_line(error)}")
        except _Closed:
            return
        finally:
            atexit.unregister(self.close)

    def _blocks(self) -> Blocks:
        """The blocks of the model, whose twins give its bits."""
        blocks = Blocks(self.model)
        if blocks.few:
            self._say(
                f"{len(blocks.few)} blocks stay eager, whose structures are others than the "
                f"{len(blocks.kinds)} most common: {', '.join(blocks.few[:3])}, ..."
            )
        twins = blocks.placed(lambda name: of_module)
        own = torch.arange(1, FEW + 2, dtype=torch.int64)[None]  # enough pages of any size
        for start, count in ((0, FEW), (FEW, 1)):
            runs = [partial(logits_of, model) for model in (self.model, twins)]
            if not torch.equal(*(self._step(run, own, start, count) for run in runs)):
                raise QlabError("its blocks differ in more than their tensors")
        return blocks

    def _warmed(self, shape: Shape, blocks: Blocks | None) -> Bucket:
        """A bucket, compiled, and run with other numbers of pages and tokens."""
        run: Callable[..., Tensor]
        if blocks is None:
            run = partial(self._part(shape, of_step, "the step"), self.model)
        else:
            run = partial(logits_of, blocks.placed(partial(self._part, shape, of_module)))
        for pages in (PAGES, 2):
            table = torch.full((shape.rows, pages), NOBODY, dtype=torch.int64)
            self._step(run, table, 0, self._tokens(pages) if shape.is_prompt else 1)
        return Bucket(shape=shape, run=run)

    def _tokens(self, pages: int) -> int:
        """Of a part of a prompt that is compiled with."""
        return max(2, pages * self._pool.size - SHORTER)

    def _part(self, shape: Shape, program: Program, name: str) -> Part:
        """A program for a bucket. name: in messages."""
        backend = partial(self._built, shape)
        sizes = (PAGES * self._pool.size, self._tokens(PAGES))
        return Part(name, program, backend, sizes, self._say)

    def _built(self, shape: Shape, graph: Any, inputs: Any) -> Any:
        """A graph of a bucket, compiled. The traffic waits for no compiler: a graph that is new
        there runs as it is, and for once."""
        self.graphs += 1
        if threading.current_thread() is self._thread:
            return inductor(graph, inputs, FROM_CPP if self.model.device.type == "cpu" else {})
        self.recompiles += 1
        self.drop(shape, "they needed another graph than that of the warm-up")
        return graph.forward

    def _step(self, run: Callable[..., Tensor], table_bp: Tensor, start: int, count: int) -> Tensor:
        """Logits of a step of rows with these pages of the small pool, from a position on."""
        rows, text = len(table_bp), self.model.config.get_text_config()
        whole: dict[str, Any] = {"dtype": torch.int64, "device": self.model.device}
        ids = torch.arange(start, start + count, **whole) % int(text.vocab_size)
        starts = torch.full((rows,), start, **whole)
        seen = Rows(self._pool, table_bp.to(self.model.device), starts, count, [])
        return run(ids.repeat(rows, 1), use_cache=True, **self._arguments(seen, starts))


def refuse_unknown(mode: str) -> None:
    """Refuse a mode that is none of MODES."""
    if mode not in MODES:
        raise QlabError(f"compile is {mode!r}; give one of {', '.join(MODES)}")


def buckets(rows: int) -> tuple[int, ...]:
    """The powers of two below a number of rows, and that number."""
    return (*(1 << i for i in range((rows - 1).bit_length())), rows)


def inductor(graph: Any, inputs: Any, options: dict[str, Any]) -> Any:
    """What torch's compiler makes of a graph, with options of its own beside qlab's."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=inductor_options(**options))


@contextmanager
def kept() -> Iterator[None]:
    """Keep what the compiler makes in the folder of `qlab cache`, for the next start."""
    from qlab_kernels.cache import folder

    place = folder() / "compiled"
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError:  # nothing can be kept there, and torch has a place of its own
        yield
        return
    with environment(FOLDER, str(place)):
        yield
