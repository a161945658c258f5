"""The pass over the blocks, in order."""

import ctypes
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

import torch

from qlab.data.calibration import Data
from qlab.driver.batches import Batch, in_batches, record
from qlab.driver.report import PeakMemory
from qlab.driver.run import Run, finish
from qlab.driver.segments import write_block, write_outside
from qlab.driver.states import flat, states_of, stored_shapes
from qlab.files.carry import Carry
from qlab.model.calls import Call
from qlab.model.loading import drop_outside, load_outside
from qlab.model.skeleton import Skeleton
from qlab.process.progress import progress, say


def one_pass(skeleton: Skeleton, runs: Sequence[Run]) -> tuple[float, int]:
    """One pass over the model for all runs that are not finished: seconds and peak memory."""
    started = time.perf_counter()
    unfinished = [run for run in runs if not run.writer.finished]
    with PeakMemory() as peak:
        if unfinished:
            data = next((run.job.observed for run in runs if run.job.observed is not None), None)
            scan(skeleton, unfinished, data)
    return time.perf_counter() - started, peak.bytes


def scan(skeleton: Skeleton, runs: list[Run], data: Data | None) -> None:
    """All blocks, in order, from the first one that some run lacks."""
    keeper, paths = runs[0].writer, list(skeleton.blocks)
    windows = in_batches(data)
    inputs = runs[0].job.inputs
    streams = [inputs, "reference"] if any(run.job.runs_reference for run in runs) else [inputs]

    load_outside(skeleton, with_head=False)
    entering, calls = record(skeleton, windows)
    drop_outside(skeleton)
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
            write_outside(skeleton, run)
    _return_freed_memory()
    doing = "quantizing blocks" if data is None else f"quantizing blocks on {data.count:,} tokens"
    for i in progress(todo, doing):
        path = paths[i]
        before, after = (
            ([], []) if data is None else (carries[i], carries[i + 1] if i + 1 < len(paths) else [])
        )
        entering_it = [
            partial(_batches_entering, calls, path, carry, skeleton.device) for carry in before
        ]
        write_block(
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
        finish(skeleton, run, calls[0])


def _batches_entering(
    calls: Sequence[Mapping[str, Call]], path: str, states: Carry, device: torch.device
) -> Iterator[Batch]:
    return zip((call[path] for call in calls), states_of(states.read(), calls, path, device))


def _no_batches() -> Iterator[Batch]:
    return iter(())


def _unwritten_blocks(runs: Sequence[Run], blocks: int) -> list[int]:
    """The blocks that some job lacks: without data each one is solved by itself."""
    written = [[run.writer.has(i + 1) for run in runs] for i in range(blocks)]
    return [i for i in range(blocks) if not all(written[i])]


def _blocks_to_do(
    runs: Sequence[Run], blocks: int, carries: Sequence[Sequence[Carry]]
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


def _return_freed_memory() -> None:
    """Give freed memory back to the system: glibc keeps what tokenizing, tracing and the embedding
    leave, a tenth of the peak of a small model. Other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
