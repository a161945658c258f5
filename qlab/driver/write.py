"""What recipes make of a model, written as model directories, one segment in memory at a time."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from qlab.algebra.compiled import expect
from qlab.codecs import CODECS, codec_of_directories
from qlab.driver.apply import Quantized
from qlab.driver.batches import batch_tokens, in_batches, sharing_a_pass
from qlab.driver.job import CODEC, Job
from qlab.driver.plan import plan_of
from qlab.driver.ranks import Ranks, refuse_unlike, together
from qlab.driver.report import PeakMemory, describe
from qlab.driver.result import Result
from qlab.driver.run import Run, finish, write_blocks, write_outside
from qlab.driver.scan import Carries, begin
from qlab.driver.shelved import Keeping, Known, Shelved, refuse_unkept
from qlab.files.hashed import HashedFiles
from qlab.files.place import places
from qlab.files.record import recorded, versions
from qlab.files.statistics import Shelf
from qlab.files.writer import Writer
from qlab.model.device import name_of, usable
from qlab.model.skeleton import Skeleton
from qlab.process.progress import say
from qlab.process.surroundings import undisturbed


def write(
    quantized: Quantized,
    out: str | Path,
    *,
    codec: str = CODEC,
    target: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Result:
    """Write what a recipe makes of a model (`apply`) as a model directory.

    The blocks are solved while they are written, one in memory at a time. The same value gives the
    same bytes, also when a killed run is continued.

    Args:
        quantized: The value of `apply`.
        out: The directory that is written. It appears whole, at the end.
        codec: The format that is written, a name in `qlab.codecs.CODECS`.
        target: The engine that is to load the directory, a name in `qlab.codecs.engines`, whose
            limits are checked before anything runs. None checks no engine's.
        overwrite: Whether an output that qlab wrote, and nobody changed since, may be replaced.
        resume: Whether to go on with a killed run of the same job. A stage of your own is the same
            one where its name, spec and `detail` are.

    Returns:
        The directory, the report's row of every site, the plan, and what the run cost.

    Raises:
        QlabError: The format or the engine does not hold something that the recipe makes, or `out`
            may not be written to; names the site or the path. Everything that can be known before
            the work is refused before it.

    Example:
        >>> import qlab
        >>> quantized = qlab.apply(qlab.open("demo"), qlab.rtn("int4-g64"), None)
        >>> result = qlab.write(quantized, "written-int4")
        >>> result.path.name, result.bits_per_weight
        ('written-int4', 4.25)
    """
    results = write_all(
        {"": quantized}, out, codec=codec, target=target, overwrite=overwrite, resume=resume
    )
    return results[""]


@undisturbed
@torch.no_grad()
def write_all(
    named: Mapping[str, Quantized],
    out: str | Path,
    *,
    codec: str,
    target: str | None,
    overwrite: bool,
    resume: bool,
    keep_statistics: str | Path | None = None,
) -> dict[str, Result]:
    """Write what several recipes make of one model, each into a folder of its own.

    Args:
        named: Name of a folder in `out` -> its value, whose jobs differ in their recipes alone.
        out: The directory around the folders.
        codec: See `write`; of every folder.
        target: See `write`; of every folder.
        overwrite: See `write`; of every folder.
        resume: See `write`; of every folder.
        keep_statistics: See `quantize`.
    """
    if not named:
        return {}
    first = next(iter(named.values())).job
    with together(first.device) as ranks:
        shelf = None
        if keep_statistics is not None:
            refuse_unkept([quantized.job for quantized in named.values()])
            shelf = Shelf(Path(os.path.expanduser(keep_statistics)))
        return _write_together(
            named,
            out,
            ranks,
            codec=codec,
            target=target,
            overwrite=overwrite,
            resume=resume,
            shelf=shelf,
        )


def _write_together(
    named: Mapping[str, Quantized],
    out: str | Path,
    ranks: Ranks,
    *,
    codec: str,
    target: str | None,
    overwrite: bool,
    resume: bool,
    shelf: Shelf | None,
) -> dict[str, Result]:
    """See `write_all`; by all ranks, of which rank 0 writes. shelf: where statistics are kept."""
    first = next(iter(named.values())).job
    source = HashedFiles(first.model.path, first.model.stored)
    # rank 0 vouches for what is read
    model = replace(first.model, reader=source.read) if ranks.is_first else first.model
    reads = [*set(model.files.values()), *getattr(first.data, "files", ())]
    outs = places(out, list(named), model.path, reads)
    if codec in CODECS:  # the plan refuses others
        codec_of_directories(codec)

    def of_format(job: Job) -> Job:
        device = job.device if ranks.device is None else str(ranks.device)
        return replace(job, model=model, codec=codec, target=target, device=device)

    asked = {name: of_format(quantized.job) for name, quantized in named.items()}
    if ranks.world > 1:  # what tells models apart is read for it
        refuse_unlike(ranks, {name: _asked(job, shelf) for name, job in asked.items()})
    keeping = None if shelf is None else Keeping(shelf=shelf, known=Known(first.model, ranks=ranks))
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(Writer(place, overwrite, resume, first.offload))
            for name, place in outs.items()
            if ranks.is_first
        }
        started = time.perf_counter()
        with PeakMemory() as measuring:
            for job in asked.values():
                if job.measures:  # refuses what is known before anything is measured
                    plan_of(job, ranks=ranks.world).check(first.memory)
            jobs = {name: of_format(each.resolved_by(ranks)) for name, each in named.items()}
        results = _written(jobs, outs, writers, ranks, source, stack, started, keeping)
    return {
        name: replace(result, peak_rss_bytes=max(measuring.bytes, result.peak_rss_bytes))
        for name, result in results.items()
    }


def _written(
    jobs: Mapping[str, Job],
    outs: Mapping[str, Path],
    writers: Mapping[str, Writer],
    ranks: Ranks,
    source: HashedFiles,
    stack: ExitStack,
    started: float,
    keeping: Keeping | None,
) -> dict[str, Result]:
    """Plan all jobs, begin them, and do them.

    writers: of rank 0; none on others. stack: is left when they are done. started: when the work
    on them began. keeping: where statistics are kept.
    """
    first = next(iter(jobs.values()))
    with PeakMemory() as planning:
        skeleton = Skeleton(first.model, first.dtype or first.model.running_dtype, first.device)
        process = max(ranks.all_told(psutil.Process().memory_info().rss))
        plans = {name: plan_of(job, skeleton, ranks.world, process) for name, job in jobs.items()}
    for planned in plans.values():
        planned.check(first.memory)
    seconds_of_planning = time.perf_counter() - started
    runs: dict[str, Run] = {}
    for name, job in jobs.items():
        runs[name] = Run(
            job=job,
            plan=plans[name],
            ranks=ranks,
            own_writer=writers.get(name),
            codec=CODECS[job.codec or CODEC],
        )
    expect(sum(math.prod(tensor.shape) for tensor in first.model.stored.values()))
    _begin(runs, skeleton, source, stack)
    finished = ranks.first(lambda: [name for name, run in runs.items() if run.writer.finished])
    results: dict[str, Result] = {}
    for names in sharing_a_pass(
        {name: job.remaining.recipe for name, job in jobs.items()}, first.inputs
    ):
        unfinished = [runs[name] for name in names if name not in finished]
        seconds, peak_bytes = _one_pass(skeleton, unfinished, keeping)
        sent_bytes = sum(ranks.all_told(ranks.sent_bytes))
        for name in names:
            sites = ranks.first(partial(_sites, outs[name]))
            results[name] = Result(
                path=outs[name],
                sites=sites,
                plan=plans[name],
                inputs=first.inputs,
                seconds=seconds_of_planning + seconds,
                peak_rss_bytes=max(planning.bytes, peak_bytes),
                seconds_of_binds=jobs[name].seconds,
                ranks=ranks.world,
                sent_bytes_per_block=sent_bytes // len(skeleton.blocks),
            )
    return results


def _sites(out: Path) -> Mapping[str, Mapping[str, Any]]:
    """The report's row of every site."""
    return recorded(out)["sites"]


def _begin(
    runs: Mapping[str, Run], skeleton: Skeleton, source: HashedFiles, stack: ExitStack
) -> None:
    """Begin the jobs where they are written."""
    writing = [run for run in runs.values() if run.own_writer is not None]
    for run in writing:
        identity, segments = identity_of(run.job, skeleton), len(skeleton.blocks) + 1
        run.writer.begin(identity, segments, run.job.model.path, source=source)
    for run in writing:
        if not run.writer.finished:
            stack.enter_context(run.writer.refusing())


def _asked(job: Job, shelf: Shelf | None) -> dict[str, Any]:
    """What all ranks have to see alike, in words that name it."""
    return {
        "models": job.model.fingerprint(),
        "recipes": [[*map(str, (s.name, s.spec, s.detail, s.scope))] for s in job.recipe],
        "calibration data": job.data and job.data.describe(),
        "modes of calibration": [job.inputs, job.calibrate_all_experts, str(job.dtype)],
        "devices": usable(job.device).type,
        "budgets of memory": job.memory,
        "formats": [job.codec, job.target],
        "folders of statistics": shelf and str(shelf.folder),
        "versions": versions(),
    }


def identity_of(job: Job, skeleton: Skeleton) -> dict[str, Any]:
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


def _one_pass(
    skeleton: Skeleton, runs: Sequence[Run], keeping: Keeping | None
) -> tuple[float, int]:
    """One pass over the model for all runs, none of which is finished: seconds and peak memory."""
    started = time.perf_counter()
    with PeakMemory() as peak:
        if runs:
            jobs = [run.job for run in runs]
            shelved = None if keeping is None else keeping.of(jobs, skeleton, runs[0].ranks)
            _write_segments(skeleton, runs, shelved)
    return time.perf_counter() - started, peak.bytes


def _write_segments(skeleton: Skeleton, runs: Sequence[Run], shelved: Shelved | None) -> None:
    """All segments, in order, from the first block on that some run lacks. Of several ranks, rank 0
    writes what all solve."""

    def todo(carries: Carries) -> Sequence[int]:
        blocks = len(skeleton.blocks)
        if shelved is None and carries:
            return _blocks_to_do(runs, blocks, carries)
        return _unwritten_blocks(runs, blocks)

    ranks = runs[0].ranks
    scan = begin(skeleton, [run.solver for run in runs], runs[0].own_writer, todo, shelved)
    writing = runs if ranks.is_first else ()
    for run in writing:
        if not run.writer.has(0):
            write_outside(skeleton, run)
    for _ in write_blocks(scan, runs):
        pass
    recipes = [run.job.recipe for run in runs]
    first, *_ = in_batches(scan.data, batch_tokens(recipes))
    for run in writing:
        finish(skeleton, run, scan.calls[0], first["input_ids"].shape)
    ranks.told(None)  # the others wait until all is in place


def _unwritten_blocks(runs: Sequence[Run], blocks: int) -> list[int]:
    """The blocks that some job lacks. Each one is solved by itself, without data and where the
    states in front of it are made when it asks for them."""
    written = [[run.writer.has(i + 1) for run in runs] for i in range(blocks)]
    return [i for i in range(blocks) if not all(written[i])]


def _blocks_to_do(runs: Sequence[Run], blocks: int, carries: Carries) -> list[int]:
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
