"""Generation side by side: a lowered model directory and the same model in bfloat16 as Hugging Face
runs it, in one process.

The bfloat16 model has the directory's own weights, dequantized: how fast it is does not depend on
their values. Every engine runs the same loop, greedy with a static cache for one sequence, and
takes its turn in every repetition, so that what else the machine does touches all of them; figures
are medians over the repetitions.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from qlab.driver.report import PeakMemory
from qlab.errors import QlabError
from qlab.files.record import versions
from qlab.lowering import inductor_options, resident_bytes
from qlab.lowering.around.attention import NAME
from qlab.lowering.model import device_named, lower, make_dense

# A decode step is hundreds of loops of microseconds, so a CPU calls them from C++; built apart,
# they compile in a third of the time.
FROM_CPP = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
IN_GRAPH = {"triton.cudagraphs": True}  # and on a GPU they are launched as one
ENGINES = (
    "bf16 eager",
    "bf16 compiled",
    "qlab eager",
    "qlab compiled",
    "qlab compiled, dense cache",
)
BASE, COMPILED = ENGINES[:2]


@dataclass
class Engine:
    """One way to run the model, warmed up, and the seconds it took: of every prefill and of every
    run of decode steps."""

    name: str
    model: PreTrainedModel
    cache: StaticCache
    prefill: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Tensor]
    warm_up_seconds: float
    peak_rss_bytes: int
    prefill_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)


@torch.no_grad()
def measure(
    path: str | Path,
    engines: Sequence[str] = ENGINES,
    *,
    prompt: int = 512,
    new: int = 128,
    repeat: int = 3,
    device: str = "cpu",
    said: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Prefill of `prompt` random tokens and `new` decoded ones by every engine, as a record with
    one row each.

    said: is told of each thing that takes its time.

    Errors: an unknown engine, fewer than one prompt token or two new ones, whatever `lower`
    refuses.
    """
    if unknown := [name for name in engines if name not in ENGINES]:
        raise QlabError(f"engine {unknown[0]!r} is unknown; known are {'; '.join(ENGINES)}")
    if prompt < 2 or new < 2 or repeat < 1:
        raise QlabError(
            f"{prompt} prompt tokens, {new} new tokens and {repeat} repetitions; measure at least "
            "2, 2 and 1"
        )
    device_named(device)
    ready: list[Engine] = []
    for number, name in enumerate(engines, 1):
        said(f"{path}: {_doing(name, prompt)} ({number} of {len(engines)})")
        ready.append(prepare(name, path, prompt, new, device))
        said(f"{path}: {name} is ready after {ready[-1].warm_up_seconds:.0f} s")
    ids = random_tokens(ready[0].model, prompt, device)
    for engine in ready:
        said(
            f"{path}: warming up "
            f"{engine.name}{', from what was compiled' if 'compiled' in engine.name else ''}"
        )
        warm_up(engine, ids)  # preparing the next one let go of what was compiled for it
    for turn in range(1, repeat + 1):
        for engine in ready:
            said(
                f"{path}: turn {turn} of {repeat}, {engine.name}: {prompt} tokens of prompt, "
                f"{new} new ones"
            )
            run(engine, ids, new)
    rows = [_row(engine, prompt, new) for engine in ready]
    for row in rows:
        row["ratio"] = {
            base["engine"]: {
                key: row[key] / base[key] for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
            }
            for base in rows
            if base["engine"] in (BASE, COMPILED)
        }
    return {
        "model": str(path),
        "prompt": prompt,
        "new": new,
        "repeat": repeat,
        "rows": rows,
        "versions": versions(),
        "device": {"type": device, "threads": torch.get_num_threads()},
    }


def _doing(name: str, prompt: int) -> str:
    """What preparing an engine is, and how long it may take."""
    if "compiled" not in name:
        return f"loading {name}"
    return (
        f"loading and compiling {name}, a prefill of {prompt} tokens and one step: minutes on a "
        "slow processor"
    )


def prepare(name: str, path: str | Path, prompt: int, new: int, device: str) -> Engine:
    """Load and warm up an engine: compiled ones compile here."""
    torch._dynamo.reset()
    gc.collect()
    started = time.perf_counter()
    with PeakMemory() as peak:
        model = lower(path, device, torch.bfloat16, dense_cache=name.endswith("dense cache"))
        if name.startswith("bf16"):
            _undo(model)
        cache = StaticCache(config=model.config, max_cache_len=prompt + new)

        def forward(ids: Tensor) -> Tensor:
            logits = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        ids = random_tokens(model, prompt, device)
        forward(ids[:, :1])  # makes the cache's tensors, outside of any compiled graph
        ours = name.startswith("qlab")
        ways: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = forward, forward
        if "compiled" in name:
            ways = (
                _compiled(forward, ours),
                _compiled(forward, ours, **(FROM_CPP if device == "cpu" else IN_GRAPH)),
            )
        engine = Engine(name, model, cache, *ways, 0.0, 0)
        warm_up(engine, ids)
    engine.warm_up_seconds, engine.peak_rss_bytes = time.perf_counter() - started, peak.bytes
    return engine


def warm_up(engine: Engine, ids: Tensor) -> None:
    """A short run that is not measured."""
    run(engine, ids, 3)
    engine.prefill_seconds.clear()
    engine.decode_seconds.clear()


def _compiled(
    forward: Callable[[Tensor], Tensor], ours: bool, **options: Any
) -> Callable[[Tensor], Tensor]:
    """One graph for one shape; the model does not change while it is measured, so its modules are
    not guarded."""
    options |= {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    options = inductor_options(**options) if ours else options

    def own(
        ids: Tensor,
    ) -> (
        Tensor
    ):  # torch keeps what it compiled per code object, and prefill and step are two programs
        return forward(ids)

    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


def _undo(model: PreTrainedModel) -> None:
    """The model as transformers would load it unquantized: dense weights, and its own attention."""
    make_dense(model)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def random_tokens(model: PreTrainedModel, length: int, device: str) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(
        device
    )


def run(engine: Engine, ids: Tensor, new: int) -> None:
    """One prefill, which gives the first new token, and the rest of the `new` tokens one by one."""
    engine.cache.reset()
    started = _now(ids)
    token = engine.prefill(ids)
    prefilled = _now(ids)
    for _ in range(new - 1):
        fed = token.clone()  # a CUDA graph writes every result to the same place
        torch.compiler.cudagraph_mark_step_begin()
        token = engine.step(fed)
    engine.prefill_seconds.append(prefilled - started)
    engine.decode_seconds.append(_now(ids) - prefilled)


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


def _row(engine: Engine, prompt: int, new: int) -> dict[str, Any]:
    resident = resident_bytes(engine.model)
    return {
        "engine": engine.name,
        "prefill_tokens_per_s": prompt / median(engine.prefill_seconds),
        "decode_tokens_per_s": (new - 1) / median(engine.decode_seconds),
        "time_to_first_token_s": median(engine.prefill_seconds),
        "resident_bytes": resident,
        "weight_bytes": sum(resident.values()) - resident["embeddings"],
        "peak_rss_bytes": engine.peak_rss_bytes,
        "warm_up_seconds": engine.warm_up_seconds,
        "prefill_seconds": engine.prefill_seconds,
        "decode_seconds": engine.decode_seconds,
    }


def table(record: Mapping[str, Any]) -> Table:
    """The record for the eye: rates, and how they compare with the bfloat16 model run eagerly and
    compiled."""
    device, rows = record["device"], record["rows"]
    against = [name for name in (BASE, COMPILED) if name in rows[0]["ratio"]]
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title=(
            f"{record['model']}: prompt of {record['prompt']}, {record['new']} new tokens, "
            f"{device['type']}, {device['threads']} threads"
        ),
    )
    drawn.add_column("engine", no_wrap=True)
    for name in (
        "first token, ms",
        "prefill, tok/s",
        "decode, tok/s",
        *(f"x {name}: prefill, decode" for name in against),
        "weights, MB",
        "warm-up, s",
    ):
        drawn.add_column(name, justify="right")
    for row in rows:
        ratios = [row["ratio"][name] for name in against]
        drawn.add_row(
            row["engine"],
            f"{1e3 * row['time_to_first_token_s']:.0f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['decode_tokens_per_s']:.1f}",
            *(f"{r['prefill_tokens_per_s']:.2f}, {r['decode_tokens_per_s']:.2f}" for r in ratios),
            f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['warm_up_seconds']:.0f}",
        )
    drawn.caption = "medians; weights without embeddings, and without a head that is tied to them"
    return drawn
