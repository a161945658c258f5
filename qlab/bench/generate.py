"""Generation side by side: a lowered model directory and the same model in bfloat16 as Hugging Face
runs it, in one process.

The bfloat16 model has the directory's own weights, dequantized, because speed does not depend on
their values. Every engine runs the same loop, greedy with a static cache for one sequence. The
engines take turns in every repetition, so that other work of the machine slows all of them alike;
figures are medians over the repetitions.
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
from qlab.lowering.assembling import make_dense
from qlab.lowering.devices import device_named
from qlab.lowering.model import lower

# A decode step is hundreds of loops of microseconds each. On a CPU they are called from C++; built
# apart from what calls them, they compile in a third of the time.
FROM_CPP = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
IN_GRAPH = {"triton.cudagraphs": True}  # on a GPU they are launched as one CUDA graph
ENGINES = (
    "bf16 eager",
    "bf16 compiled",
    "qlab eager",
    "qlab compiled",
    "qlab compiled, dense cache",
    "qlab compiled, int8 activations",
)
BASE, COMPILED = ENGINES[:2]


@dataclass(kw_only=True)
class Engine:
    """One way to run the model, warmed up, and the seconds that it took: of every prefill and of
    every run of decode steps."""

    name: str
    model: PreTrainedModel
    cache: StaticCache
    prefill: Callable[[Tensor], Tensor]
    step: Callable[[Tensor], Tensor]
    warm_up_seconds: float = 0.0
    peak_rss_bytes: int = 0
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

    said: is told of each step that takes time.

    Errors: an unknown engine, fewer than two prompt tokens or two new ones, whatever `lower`
    refuses.
    """
    unknown = [name for name in engines if name not in ENGINES]
    if unknown:
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
        compiled = ", from what was compiled" if "compiled" in engine.name else ""
        said(f"{path}: warming up {engine.name}{compiled}")
        warm_up(engine, ids)  # preparing the next engine let go of what was compiled for this one
    for turn in range(1, repeat + 1):
        for engine in ready:
            said(
                f"{path}: turn {turn} of {repeat}, {engine.name}: {prompt} tokens of prompt, "
                f"{new} new ones"
            )
            run(engine, ids, new)
    rows = [_row(engine, prompt, new) for engine in ready]
    _add_ratios(rows)
    return {
        "model": str(path),
        "prompt": prompt,
        "new": new,
        "repeat": repeat,
        "rows": rows,
        "versions": versions(),
        "device": {"type": device, "threads": torch.get_num_threads()},
    }


def _add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Give every row `ratio`: its rates over those of the bfloat16 model, eager and compiled."""
    rates = "prefill_tokens_per_s", "decode_tokens_per_s"
    bases = [row for row in rows if row["engine"] in (BASE, COMPILED)]
    for row in rows:
        row["ratio"] = {
            base["engine"]: {rate: row[rate] / base[rate] for rate in rates} for base in bases
        }


def _doing(name: str, prompt: int) -> str:
    """A line that says what preparing an engine does, and how long it may take."""
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
        model = lower(
            path,
            device,
            torch.bfloat16,
            dense_cache=name.endswith("dense cache"),
            activations="int8" if name.endswith("int8 activations") else None,
        )
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
        prefill: Callable[[Tensor], Tensor] = forward
        step: Callable[[Tensor], Tensor] = forward
        if "compiled" in name:
            with_pass = name.startswith("qlab")
            prefill = _compiled(forward, with_pass)
            step = _compiled(forward, with_pass, **(FROM_CPP if device == "cpu" else IN_GRAPH))
        engine = Engine(name=name, model=model, cache=cache, prefill=prefill, step=step)
        warm_up(engine, ids)
    engine.warm_up_seconds, engine.peak_rss_bytes = time.perf_counter() - started, peak.bytes
    return engine


def warm_up(engine: Engine, ids: Tensor) -> None:
    """A short run that is not measured."""
    run(engine, ids, 3)
    engine.prefill_seconds.clear()
    engine.decode_seconds.clear()


def _compiled(
    forward: Callable[[Tensor], Tensor], with_pass: bool, **options: Any
) -> Callable[[Tensor], Tensor]:
    """One graph for one shape; the model does not change while it is measured, so its modules are
    not guarded. with_pass: with qlab's pass of the compiler."""
    options |= {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    options = inductor_options(**options) if with_pass else options

    # torch caches what it compiles by code object, and prefill and step are two programs
    def program(ids: Tensor) -> Tensor:
        return forward(ids)

    return torch.compile(program, fullgraph=True, dynamic=False, options=options)


def _undo(model: PreTrainedModel) -> None:
    """The model as transformers would load it unquantized: dense weights, and its own attention."""
    make_dense(model)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def random_tokens(model: PreTrainedModel, length: int, device: str) -> Tensor:
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator()
    return torch.randint(vocabulary, (1, length), generator=generator.manual_seed(0)).to(device)


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
    """The record as a table: rates, and their ratios to the bfloat16 model run eagerly and
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
