"""The main job: a model directory and a recipe in, a quantized model directory out, one segment in memory at a time."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from qlab.calibration import Tokens
from qlab.checkpoint import Checkpoint
from qlab.codecs import CODECS
from qlab.errors import QlabError
from qlab.graph import ModuleGraph
from qlab.plan import Plan, plan
from qlab.qtensor import QTensor
from qlab.recording import Call
from qlab.report import PeakMemory, bits_per_weight, describe, site_rows, versions
from qlab.skeleton import Skeleton
from qlab.spec import Spec, parse_spec
from qlab.stats import Stats
from qlab.sweep import Batch, Batches, Inputs, in_batches, in_order, observe, push, record, solve, solve_in_order
from qlab.transform import Transform
from qlab.writer import Carry, Writer

CODEC = "compressed-tensors"


@dataclass(frozen=True)
class Result:
    """A finished job: its directory, the rows of its report, and what the run cost."""

    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    plan: Plan
    inputs: Inputs
    seconds: float
    peak_rss_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Over all sites."""
        return bits_per_weight(self.sites)

    @property
    def bytes(self) -> int:
        """Of all safetensors files."""
        return sum(f.stat().st_size for f in self.path.glob("*.safetensors"))

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"path": str(self.path), "inputs": self.inputs, "seconds": self.seconds, "peak_rss_bytes": self.peak_rss_bytes,
                "bits_per_weight": self.bits_per_weight, "bytes": self.bytes, "sites": dict(self.sites)}  # fmt: skip


def quantize(
    model: Checkpoint,
    recipe: Transform,
    data: Tokens | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
) -> Result:
    """Apply a recipe to every block of the model and write a compressed-tensors directory.

    data: calibration tokens; None only for recipes that need no statistics. inputs: whether a site is calibrated on what
    the quantized sites before it produce (errors propagate; where a stage moves inputs, on the quantized blocks before
    its own) or on the reference model's activations.
    dtype: of the activations while calibrating (default: the checkpoint's own); statistics and solvers use fp32.
    memory: refuse to start when the predicted peak, in bytes, is above this. The same call gives the same bytes, also
    when a killed run is continued with resume=True.
    """
    results = compare(model, {"": recipe}, data, out, inputs=inputs, dtype=dtype, device=device, memory=memory,
                      overwrite=overwrite, resume=resume, calibrate_all_experts=calibrate_all_experts)  # fmt: skip
    return results[""]


@torch.no_grad()
def compare(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    data: Tokens | None,
    out: str | Path,
    *,
    inputs: Inputs = "reference",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
) -> dict[str, Result]:
    """Several recipes in one pass over the reference model, each into out/<name>: they share every statistic.

    With inputs="quantized" there is one recipe only, since its own errors are what the next block sees.
    """
    if inputs == "quantized" and len(recipes) > 1:
        raise QlabError(f"recipes {', '.join(recipes)} cannot share a pass over quantized inputs; use inputs='reference', or "
                        "quantize() once per recipe")
    if model.path.resolve() in [(Path(out).expanduser() / name).resolve() for name in recipes]:
        raise QlabError(f"{model.path} is the model itself; choose another output directory")
    started = time.perf_counter()
    with PeakMemory() as peak:
        skeleton = Skeleton(model, dtype or model.dtype, device)
        plans = {name: plan(model, recipe, data, inputs=inputs, skeleton=skeleton) for name, recipe in recipes.items()}
        jobs = []
        for name, recipe in recipes.items():
            plans[name].check(memory)
            used = data if plans[name].statistics else None
            job = {"source": model.fingerprint(), "recipe": describe(recipe), "data": used and used.describe(), "inputs": inputs,
                   "dtype": str(skeleton.dtype), "device": skeleton.device.type, "versions": versions()}
            jobs.append(_Job(recipe, Writer(Path(out) / name, job, len(skeleton.blocks) + 1, overwrite, resume), job))
        if unfinished := [job for job in jobs if not job.writer.finished]:
            needed = data if any(p.statistics for p in plans.values()) else None
            _scan(skeleton, unfinished, needed, inputs)
    seconds = time.perf_counter() - started
    return {
        name: Result(job.writer.out, _sites(job.writer.out), plans[name], inputs, seconds, peak.bytes)
        for name, job in zip(recipes, jobs)
    }


@dataclass(frozen=True)
class _Job:
    recipe: Transform
    writer: Writer
    identity: Mapping[str, Any]


def _sites(path: Path) -> dict[str, Any]:
    return json.loads((path / "qlab.json").read_text())["sites"]


def _scan(skeleton: Skeleton, jobs: list[_Job], data: Tokens | None, inputs: Inputs) -> None:
    """All blocks, in order, from the first one that some job lacks."""
    keeper, paths = jobs[0].writer, list(skeleton.blocks)
    windows = in_batches(data.ids if data is not None else torch.zeros(2, 8, dtype=torch.long))
    done = min(job.writer.blocks_done(len(paths), keeper.carry_path if data is not None else None) for job in jobs)
    skeleton.load_outside(with_head=False)
    entering, calls = record(skeleton, windows)
    skeleton.drop_outside()
    carries = [Carry(keeper.carry_path(i), [tuple(h.shape) for h in entering], skeleton.dtype) for i in range(len(paths))]
    if done == 0 or data is None:
        carries[0].write(entering)
    del entering
    for job in jobs:
        if not job.writer.shard(0).is_file():
            job.writer.write_shard(0, skeleton.outside())
    console = Console(stderr=True)
    for i, path in track(list(enumerate(paths))[done:], "quantizing blocks", console=console, disable=not console.is_terminal):
        before, after = carries[i if data is not None else 0], carries[i + 1 : i + 2] if data is not None else []
        _block(skeleton, jobs, i, partial(_batches, calls, path, before, skeleton.device), inputs, after)
        if after:
            before.path.unlink(missing_ok=True)
    for job in jobs:
        _finish(skeleton, job)


def _block(skeleton: Skeleton, jobs: Sequence[_Job], index: int, batches: Batches, inputs: Inputs, after: Sequence[Carry]) -> None:
    """One block, solved and written for every job, and what leaves it written to `after`. Nothing of it outlives the call."""
    graph = solved = skeleton.graph(list(skeleton.blocks)[index], *next(batches()))
    watch = _watcher(graph, batches) if len(jobs) > 1 else lambda now, wanted: observe(now, wanted, batches())
    leaving = None
    for job in jobs:
        solved = graph  # lets go of the job before
        if in_order(job.recipe, inputs):
            solved, leaving = solve_in_order(graph, job.recipe, batches)
        else:
            solved, _ = solve(graph, job.recipe, watch)
        job.writer.write_shard(index + 1, encode(skeleton, solved))
        job.writer.write_notes(index + 1, site_rows(solved))
    passed = solved if inputs == "quantized" else graph
    del graph, solved, watch  # one version of the block is enough from here on
    for carry in after:
        carry.write(leaving or push(passed, batches()))


def _batches(calls: Sequence[Mapping[str, Call]], path: str, states: Carry, device: torch.device) -> Iterator[Batch]:
    return ((call[path], hidden.to(device)) for call, hidden in zip(calls, states.read()))


def _watcher(graph: ModuleGraph, batches: Batches) -> Callable[[ModuleGraph, set], Stats]:
    """observe() that remembers what it saw of `graph` itself, so that several recipes share it."""
    seen: dict[tuple[str, str], Any] = {}

    def watch(now: ModuleGraph, wanted: set[tuple[str, str]]) -> Stats:
        if now.params is not graph.params:
            return observe(now, wanted, batches())
        if missing := wanted - seen.keys():
            seen.update(observe(graph, missing, batches()))
        return {key: seen[key] for key in wanted}

    return watch


def encode(skeleton: Skeleton, graph: ModuleGraph) -> dict[str, Tensor]:
    """A block's tensors as the files hold them: codes packed by the codec, everything else in its own stored dtype."""
    if graph.online:
        raise QlabError(f"{', '.join(f'{graph.path}.{p}' for p in graph.online)} still need an operation at run time, which "
                        f"{CODEC} cannot hold; absorb() it or choose a method without it")
    tensors: dict[str, Tensor] = {}
    for name, stored in skeleton.block_names(graph.path).items():
        leaf = graph.params[name]
        fused = isinstance(leaf, QTensor) and len(leaf.shape) == 3
        for piece in skeleton.expert_pieces(f"{graph.path}.{name}") if fused else stored:
            part = piece.of(leaf)
            if isinstance(part, QTensor):
                tensors |= CODECS[CODEC].encode(piece.module, part)
            else:
                tensors[piece.name] = part.to(skeleton.stored_dtype(piece))
    return tensors


def _finish(skeleton: Skeleton, job: _Job) -> None:
    model, sites = skeleton.checkpoint, job.writer.notes()
    specs: dict[str, Spec | None] = {}
    for name in [*skeleton.linears(), *sites]:
        row = sites.get(name)
        spec = parse_spec(row["spec"]) if row and row["spec"] else None
        specs |= dict.fromkeys(skeleton.modules(name), spec)  # readers match the one or the other
    config = json.loads((model.path / "config.json").read_text())
    config["quantization_config"] = CODECS[CODEC].config(specs)
    record = {"job": job.identity, "sites": sites, "bits_per_weight": bits_per_weight(sites)}
    job.writer.finish({"config.json": config, "qlab.json": record}, model.path)
