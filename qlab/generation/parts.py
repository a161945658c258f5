"""The parts of a model that are compiled: the whole step, or a program for each kind of block and
one for the head.

A program is a function of a module and of what the module is called with. Nothing in it is a
layer's own: blocks are called as twins, with the cache of their layer alone.
"""

import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlab.errors import QlabError
from qlab.generation.cache import Rows
from qlab.generation.direct import Direct
from qlab.generation.twins import copied, kinds_of, replaced, twin
from qlab.model.paper import find_blocks, path_of

MOST_KINDS = 8  # of blocks, each of which costs a graph for every bucket
HANDED = (Tensor, Rows, bool, int, float, str, type(None))

Program = Callable[..., Any]  # (module, *args, **kwargs) -> what the module returns


def logits_of(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What a step is there for, of all that a model gives."""
    return model(*args, **kwargs).logits


def of_step(model: Any, *args: Any, **kwargs: Any) -> Any:
    """The program of a whole step."""
    _of_one_size(args, kwargs)
    return logits_of(model, *args, **kwargs)


def of_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The program of a block or of the head."""
    _of_one_size(args, kwargs)
    return type(module).forward(module, *args, **kwargs)


def _of_one_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Say that all slots are as many, so that a graph has one size of them as its input."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Rows):
            sizes = [slots.shape[0] for slots in value.pool.tensors()]
            for size in sizes[1:]:
                torch._check(size == sizes[0])


class Blocks:
    """A model as its kinds of blocks and its head.

    kinds: the number of the first block of a structure -> the paths of all. head: the path of the
    product that gives logits, or "". few: the paths of blocks whose structures are too many.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        _, self.blocks = find_blocks(model)
        self._first = kinds_of(self.blocks)
        common = [kind for kind, _ in Counter(self._first).most_common(MOST_KINDS)]
        paths = list(self.blocks)
        self.kinds = {k: [p for p, f in zip(paths, self._first) if f == k] for k in common}
        self.few = [p for p, kind in zip(paths, self._first) if kind not in common]
        self.head = path_of(model, model.get_output_embeddings())

    def placed(self, made: Callable[[str], Program]) -> PreTrainedModel:
        """The model, whose blocks and head are run by what is made for them: a program for each
        kind of block, of its paths in words, and one for the head."""
        others: dict[str, nn.Module] = {}
        modules = list(self.blocks.values())
        for kind, paths in self.kinds.items():
            program = made(_in_words(paths))
            for path in paths:
                block, number = self.blocks[path], list(self.blocks).index(path)
                run = _OneLayer(program, twin(modules[kind], block), number)
                others[path] = copied(block, forward=run)
        if self.head:
            head = self.model.get_submodule(self.head)
            program = made(f"the head {self.head}")
            others[self.head] = copied(head, forward=_OfHead(program, head))
        return replaced(self.model, others)


class _Called:
    """A program with its module."""

    def __init__(self, program: Program, module: nn.Module):
        self.program, self.module = program, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.program(self.module, *args, **kwargs)


class _OfHead(_Called):
    """The program of the head. The last token of a prompt has the strides of all of it, for which a
    graph would be made anew."""

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(hidden.reshape(-1).view(hidden.shape), *args, **kwargs)


class _OneLayer(_Called):
    """The program of a block, which is handed the cache of its layer alone."""

    def __init__(self, program: Program, module: nn.Module, number: int):
        super().__init__(program, module)
        self.number = number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = [self._own(value) for value in args]
        return super().__call__(*own, **{name: self._own(v) for name, v in kwargs.items()})

    def _own(self, value: Any) -> Any:
        return value.of(self.number) if isinstance(value, Rows) else value


class Part:
    """A program, compiled when it is called first, or left as it is where it cannot be.

    Args:
        name: in messages.
        program: the function.
        backend: of torch.compile.
        tokens: how many tokens the rows of the first call may read, and may have; no other sizes
            are equal to these.
        say: is told why the program stays as it is.
    """

    def __init__(
        self,
        name: str,
        program: Program,
        backend: Any,
        tokens: tuple[int, ...],
        say: Callable[[str], object],
    ):
        self.name, self.program, self.tokens, self._say = name, program, tokens, say
        # the model does not change while it is served, so its modules are not guarded
        options: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe
        }
        # torch keeps what it compiled by code object, and at most eight for one
        own = types.FunctionType(program.__code__.replace(), program.__globals__)  # type: ignore[attr-defined]
        self._compiled: Direct = Direct(
            torch.compile(
                own,
                fullgraph=True,
                dynamic=False,
                backend=lambda graph, inputs: self._compiled.watched(backend(graph, inputs)),
                options=options,
            )
        )
        self._run = self._first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _first(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            for value in (*args, *kwargs.values()):
                self._mark(value)
            y = self._compiled(module, *args, **kwargs)
            self._run = self._compiled
        except Exception as error:  # whatever the compiler says of code that it cannot read
            said = str(error).strip().splitlines() or [type(error).__name__]
            self._say(f"{self.name} stays eager: {said[0]}")
            self._run = self.program
            y = self.program(module, *args, **kwargs)
        return y

    def _mark(self, value: Any) -> None:
        """Tell the compiler which sizes are no part of the graph: those that count tokens."""
        if isinstance(value, tuple | list):
            for inner in value:
                self._mark(inner)
            return
        if not isinstance(value, HANDED):
            raise QlabError(f"it is handed a {type(value).__name__}, which is no part of a graph")
        if isinstance(value, Rows):
            for slots in value.pool.tensors():
                torch._dynamo.mark_dynamic(slots, 0)
            self._mark((value.reads, value.writes))
        if isinstance(value, Tensor):
            for dimension, size in enumerate(value.shape):
                if size in self.tokens:
                    torch._dynamo.mark_dynamic(value, dimension)


def _in_words(paths: list[str]) -> str:
    if len(paths) == 1:
        return f"the block {paths[0]}"
    return f"the kind of {len(paths)} blocks from {paths[0]} to {paths[-1]}"
