"""The main job: a model directory and a recipe in, a quantized model directory out, one segment in
memory at a time."""

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Code, ModuleGraph, refuse_overflow
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import InputSpec, Spec, parse_input_spec, parse_spec
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform
from qlab.codecs import CODECS, Codec
from qlab.data.calibration import Data
from qlab.driver.batches import Batch, Batches, in_batches, push, record
from qlab.driver.effects import refuse_left
from qlab.driver.job import CODEC, Job
from qlab.driver.lossless import refuse_changed
from qlab.driver.observe import Inputs, Reference, observe
from qlab.driver.outside import carried, outside_leaves, outside_sites, weight_of
from qlab.driver.plan import Plan, plan
from qlab.driver.report import PeakMemory, describe, site_rows
from qlab.driver.shared import refuse_divided, shared
from qlab.driver.solve import Check, solve, solve_in_order, unchecked
from qlab.driver.states import flat, states_of, stored_shapes
from qlab.driver.writing import (
    as_stored,
    certificates,
    changed,
    encode,
    online_at,
    refuse_unwritten,
    unused,
)
from qlab.files.carry import Carry
from qlab.files.checkpoint import Checkpoint
from qlab.files.place import places
from qlab.files.record import bits_per_weight, versions, written
from qlab.files.writer import Writer
from qlab.model.device import name_of
from qlab.model.linears import by_module
from qlab.model.recording import Call, State
from qlab.model.skeleton import Skeleton
from qlab.model.ties import untied
from qlab.process.progress import progress, say
from qlab.process.shown import Shown, size, some
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, repr=False, kw_only=True)
class Result(Shown):
    """A finished job: its directory, the rows of its report, and what the run cost."""

    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    plan: Plan
    inputs: Inputs
    seconds: float
    peak_rss_bytes: int

    def __fspath__(self) -> str:
        """The directory: a result stands wherever a path does."""
        return str(self.path)

    @property
    def bits_per_weight(self) -> float:
        """Over all sites."""
        return bits_per_weight(self.sites)

    @property
    def experts_with_few_tokens(self) -> Mapping[str, Sequence[int]]:
        """Site -> its experts that saw fewer tokens than they have input channels, so that their
        second moment is singular; one that saw none is rounded to nearest on the method's grid,
        every direction weighing the same."""
        return {
            name: few
            for name, row in self.sites.items()
            if (few := row.get("experts_with_few_tokens"))
        }

    @property
    def bytes(self) -> int:
        """Of all safetensors files."""
        return sum(f.stat().st_size for f in self.path.glob("*.safetensors"))

    def summary(self) -> dict[str, str]:
        """Without the sites and the plan."""
        errors = {
            name: row["weight_error"]
            for name, row in self.sites.items()
            if row.get("weight_error") is not None
        }
        worst = max(errors, key=lambda name: errors[name], default=None)
        quantized = sum(row["spec"] is not None for row in self.sites.values())
        facts = {
            "directory": str(self.path),
            "weights": (
                f"{quantized} of {len(self.sites)} quantized, {self.bits_per_weight:.3f} bits per "
                "weight"
            ),
            "size": size(self.bytes),
            "cost": f"{self.seconds:.1f} s, peak {size(self.peak_rss_bytes)}, {self.inputs} inputs",
        }
        if worst is not None:
            facts["largest weight error"] = f"{errors[worst]:.3e} of the norm, {worst}"
        if few := self.experts_with_few_tokens:
            facts["experts with few tokens"] = some(list(few))
        return facts

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "path": str(self.path),
            "inputs": self.inputs,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "sites": dict(self.sites),
        }


def quantize(
    model: Checkpoint,
    recipe: Transform,
    data: Data | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
) -> Result:
    """Apply a recipe to every block of the model and write a directory in the format that `codec`
    names.

    data: calibration tokens, or samples of images and text; None only for recipes that need no
    statistics.
    inputs: whether a site is calibrated on what the quantized sites before it produce (errors
    propagate; on the quantized blocks before its own where sites cannot be solved one after the
    other, `solve.in_order`) or on the reference model's activations. dtype: of the activations
    while calibrating (default: the checkpoint's own, where that holds all of its numbers);
    statistics and solvers use fp32.
    memory: observe as many experts at a time as fit these bytes, and refuse to start when the
    predicted peak is above them. target: an engine of qlab.codecs.engines, whose limits are checked
    before anything runs. The same call gives the same bytes, also when a killed run is continued
    with resume=True (which knows a stage of one's own by its name, spec and `detail` alone).
    calibrate_all_experts: statistics of experts are of all tokens, not of those that are routed to
    each; nothing else changes.
    """
    results = compare(
        model,
        {"": recipe},
        data,
        out,
        inputs=inputs,
        dtype=dtype,
        device=device,
        memory=memory,
        overwrite=overwrite,
        resume=resume,
        calibrate_all_experts=calibrate_all_experts,
        codec=codec,
        target=target,
    )
    return results[""]


@undisturbed
@torch.no_grad()
def compare(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    data: Data | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
) -> dict[str, Result]:
    """Several recipes, each into out/<name>: what `quantize` makes of each, bit for bit, and all of
    them refused before any runs.

    inputs: see `quantize`. With "quantized" every recipe has a pass of its own, since its own
    errors are what the next block sees; with "reference" all of them share one pass and every
    statistic, and have its seconds and its peak memory. No recipe sees there what it did to earlier
    sites, so that a stage that corrects for it (gptaq's) is refused.
    """
    outs = places(
        out, list(recipes), model.path, [*set(model.files.values()), *getattr(data, "files", ())]
    )
    jobs = {
        name: Job(
            model=model,
            recipe=recipe,
            data=data,
            inputs=inputs,
            calibrate_all_experts=calibrate_all_experts,
            dtype=dtype,
            device=device,
            memory=memory,
            codec=codec,
            target=target,
        )
        for name, recipe in recipes.items()
    }
    started = time.perf_counter()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(Writer(place, overwrite, resume))
            for name, place in outs.items()
        }
        with PeakMemory() as planning:
            skeleton = Skeleton(model, dtype or model.running_dtype, device)
            plans = {name: _planned(job, skeleton) for name, job in jobs.items()}
        for made in plans.values():
            made.check(memory)
        planned = time.perf_counter() - started
        runs: dict[str, _Run] = {}
        for name, job in jobs.items():
            identity = _identity(job, skeleton)
            writers[name].begin(identity, len(skeleton.blocks) + 1, model.path)
            runs[name] = _Run(
                job=job,
                writer=writers[name],
                identity=identity,
                experts_at_once=plans[name].experts_at_once,
            )
        for run in runs.values():
            if not run.writer.finished:
                stack.enter_context(run.writer.refusing())
        results: dict[str, Result] = {}
        for names in [list(runs)] if inputs == "reference" else [[name] for name in runs]:
            seconds, peak_bytes = _pass(skeleton, [runs[name] for name in names])
            for name in names:
                results[name] = Result(
                    path=writers[name].out,
                    sites=_sites(writers[name].out),
                    plan=plans[name],
                    inputs=inputs,
                    seconds=planned + seconds,
                    peak_rss_bytes=max(planning.bytes, peak_bytes),
                )
    return results


def _planned(job: Job, skeleton: Skeleton) -> Plan:
    return plan(
        job.model,
        job.recipe,
        job.data,
        inputs=job.inputs,
        calibrate_all_experts=job.calibrate_all_experts,
        skeleton=skeleton,
        codec=job.codec,
        target=job.target,
        memory=job.memory,
    )


def _identity(job: Job, skeleton: Skeleton) -> dict[str, Any]:
    """What decides which bytes come out of a job."""
    return {
        "source": job.model.fingerprint(),
        "recipe": describe(job.recipe),
        "data": job.observed and job.observed.describe(),
        "inputs": job.inputs,
        "calibrate_all_experts": job.calibrate_all_experts,
        "dtype": str(skeleton.dtype),
        "device": name_of(skeleton.device),
        "codec": job.codec,
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Run:
    job: Job
    writer: Writer
    identity: Mapping[str, Any]
    experts_at_once: int | None
    checked: set[Code] = field(
        default_factory=set
    )  # programs on a block of which the claims of its stages were checked

    @property
    def codec(self) -> Codec:
        """The format that is written."""
        return CODECS[self.job.codec]

    def check(self, code: Code, call: Call, batches: Batches) -> Check:
        """What checks its stages on a block of this program: the first batch, on the first such
        block."""
        if code in self.checked:
            return unchecked
        self.checked.add(code)

        def check(stage: Stage, before: ModuleGraph, after: ModuleGraph) -> None:
            refuse_changed(stage, before, after, call, batches)
            refuse_left(self.job.recipe, stage, after, self.codec)

        return check


def _pass(skeleton: Skeleton, runs: Sequence[_Run]) -> tuple[float, int]:
    """One pass over the model for all runs that are not finished: seconds and peak memory."""
    started = time.perf_counter()
    unfinished = [run for run in runs if not run.writer.finished]
    with PeakMemory() as peak:
        if unfinished:
            data = next((run.job.observed for run in runs if run.job.observed is not None), None)
            _scan(skeleton, unfinished, data)
    return time.perf_counter() - started, peak.bytes


def _sites(path: Path) -> dict[str, Any]:
    return json.loads((path / "qlab.json").read_text())["sites"]


def _scan(skeleton: Skeleton, runs: list[_Run], data: Data | None) -> None:
    """All blocks, in order, from the first one that some run lacks."""
    keeper, paths = runs[0].writer, list(skeleton.blocks)
    windows = in_batches(data)
    inputs = runs[0].job.inputs
    streams = [inputs, "reference"] if any(run.job.runs_reference for run in runs) else [inputs]

    skeleton.load_outside(with_head=False)
    entering, calls = record(skeleton, windows)
    skeleton.drop_outside()
    carries = []
    for i, path in enumerate(paths if data is not None else ()):
        shapes = stored_shapes(calls, path, skeleton.dtype)
        carries.append([keeper.carry(s, i, shapes, skeleton.dtype) for s in streams])
    todo = (
        _blocks_to_do(runs, len(paths), carries)
        if data is not None
        else _unwritten_blocks(runs, len(paths))
    )
    for carry in carries[0] if data is not None and todo[:1] == [0] else ():
        carry.write(flat(entering, skeleton.dtype))
    del entering
    for run in runs:
        if not run.writer.has(0):
            _write_outside(skeleton, run)
    _return_freed_memory()
    doing = "quantizing blocks" if data is None else f"quantizing blocks on {data.count:,} tokens"
    for i in progress(todo, doing):
        path = paths[i]
        before, after = (
            ([], []) if data is None else (carries[i], carries[i + 1] if i + 1 < len(paths) else [])
        )
        entering_it = [partial(_batches, calls, path, carry, skeleton.device) for carry in before]
        _block(
            skeleton,
            runs,
            calls[0][path],
            i,
            entering_it or [_no_batches],
            after,
        )
        for carry in before if after else ():
            carry.path.unlink(missing_ok=True)
    for run in runs:
        _finish(skeleton, run)


def _unwritten_blocks(runs: Sequence[_Run], blocks: int) -> list[int]:
    """The blocks that some job lacks: without data each one is solved by itself."""
    written = [[run.writer.has(i + 1) for run in runs] for i in range(blocks)]
    return [i for i in range(blocks) if not all(written[i])]


def _blocks_to_do(
    runs: Sequence[_Run], blocks: int, carries: Sequence[Sequence[Carry]]
) -> list[int]:
    """The blocks from the first one on that some job lacks, or from an earlier one, whose hidden
    states are still there as they were written: they are let go of as the scan goes on. What is
    behind them is of no more use."""
    damaged = [
        carry.path
        for carry in chain.from_iterable(carries)
        if carry.path.exists() and not carry.is_sound()
    ]
    for path in damaged:
        say(f"{path} is not what was written; the blocks before it are run again")
    sound = [
        all(carry.path.exists() and carry.path not in damaged for carry in streams)
        for streams in carries
    ]
    done = min(run.writer.blocks_done(blocks, sound.__getitem__) for run in runs)
    for carry in chain(*carries[:done], *carries[done + 1 :]):
        carry.path.unlink(missing_ok=True)
    return list(range(done, blocks))


def _write_outside(skeleton: Skeleton, run: _Run) -> None:
    """What surrounds the blocks, one leaf at a time."""
    notes: dict[str, dict[str, Any]] = {"sites": {}, "certificates": {}, "changed": {}}
    beside = carried(skeleton)
    made_of = {
        f"{skeleton.module_name(name)}.weight": weight_of(skeleton, name)
        for name in outside_sites(skeleton)
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, leaf in outside_leaves(skeleton, run.job.recipe, notes["sites"].update):
            for section, rows in certificates({name: leaf}, skeleton, made_of=made_of).items():
                notes[section].update(rows)
            if name in beside and isinstance(leaf, Tensor):  # whatever numbers it holds
                yield name, leaf
            else:
                yield from encode({name: leaf}, run.codec, {}).items()

    run.writer.write_shard(0, tensors())
    run.writer.write_notes(0, notes)


def _return_freed_memory() -> None:
    """What tokenizing, tracing and the embedding leave behind: glibc keeps it, a tenth of the peak
    of a small model; other C libraries have no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _block(
    skeleton: Skeleton,
    runs: Sequence[_Run],
    call: Call,
    index: int,
    streams: Sequence[Batches],
    after: Sequence[Carry],
) -> None:
    """One block, solved and written for every job, and what leaves it written to `after`, stream by
    stream. Nothing of it outlives the call. call: one that shows the form of all."""
    batches = streams[0]
    graph = solved = skeleton.graph(list(skeleton.blocks)[index], call, decoded=True)
    if any(run.job.observed is not None for run in runs):
        for name, dtype in graph.held.items():
            refuse_overflow(
                f"{skeleton.checkpoint.path}: {graph.path}.{name}", dense(graph.params[name]), dtype
            )
    reference = Reference(graph, streams[1]) if streams[1:] else None

    def look(now: ModuleGraph, wanted: set[tuple[str, str]]) -> Stats:
        return observe(now, wanted, batches(), runs[0].job.calibrate_all_experts, reference)

    watch = _watcher(graph, look) if len(runs) > 1 else look
    leaving: list[Iterator[State]] = []
    for run in runs:
        solved = graph  # lets go of the job before
        check = run.check(graph.code, call, batches)
        if run.job.in_order(graph.code):
            solved, leaving = solve_in_order(
                graph, run.job.recipe, batches, run.experts_at_once, reference, check
            )
        else:
            solved, _ = solve(graph, run.job.recipe, watch, check)
        refuse_unwritten(skeleton, graph, solved)
        leaves, others = as_stored(skeleton, solved), changed(skeleton, graph, solved)
        run.writer.write_shard(
            index + 1,
            encode(leaves, run.codec, online_at(skeleton, solved, run.codec)).items(),
        )
        run.writer.write_notes(
            index + 1,
            {
                "sites": site_rows(solved),
                **certificates(leaves, skeleton, others),
                **unused(skeleton, graph),
                **shared(skeleton, solved, others),
            },
        )
    passed = [solved if runs[0].job.inputs == "quantized" else graph, graph][: len(streams)]
    del graph, solved, watch  # one version of the block per stream is enough from here on
    for carry, left in zip(
        after, leaving or [push(g, enter()) for g, enter in zip(passed, streams)]
    ):
        carry.write(flat(left, skeleton.dtype))


def _batches(
    calls: Sequence[Mapping[str, Call]], path: str, states: Carry, device: torch.device
) -> Iterator[Batch]:
    return zip((call[path] for call in calls), states_of(states.read(), calls, path, device))


def _no_batches() -> Iterator[Batch]:
    return iter(())


def _watcher(
    graph: ModuleGraph, look: Callable[[ModuleGraph, set], Stats]
) -> Callable[[ModuleGraph, set], Stats]:
    """look() that remembers what it saw of `graph` itself, so that several recipes share it."""
    seen: dict[tuple[str, str], Any] = {}

    def watch(now: ModuleGraph, wanted: set[tuple[str, str]]) -> Stats:
        if now.params is not graph.params or now.online != graph.online:
            return look(now, wanted)
        if missing := wanted - seen.keys():
            seen.update(look(graph, missing))
        return {key: seen[key] for key in wanted}

    return watch


def _finish(skeleton: Skeleton, run: _Run) -> None:
    model, notes = skeleton.checkpoint, run.writer.notes()
    refuse_divided(notes)
    specs: dict[str, Spec | None] = {}
    inputs: dict[str, InputSpec | None] = {}
    for name, row in notes["sites"].items():
        specs[name] = parse_spec(row["spec"]) if row["spec"] else None
        rounded_inputs = parse_input_spec(row["inputs"]) if row.get("inputs") else None
        inputs |= dict.fromkeys(skeleton.modules(name), rounded_inputs)
    rounding = [inputs] if any(inputs.values()) else []
    together = {*skeleton.tied, *skeleton.tied.values()}
    around = notes["sites"].keys() & outside_sites(skeleton).keys()
    separated = any(f"{name}.weight" in together for name in around)
    raw = untied(model.raw) if separated or skeleton.apart else model.raw
    config = {
        **raw,
        "quantization_config": run.codec.config(by_module(skeleton, specs), *rounding),
    }
    run.writer.finish(written(config, run.identity, notes), model.path)
