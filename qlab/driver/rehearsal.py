"""The first blocks of a job really quantized, before days are spent on all of them: what they take,
and what the whole will take by that."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from qlab.algebra.transform import Transform
from qlab.codecs import CODECS
from qlab.data.calibration import Data
from qlab.driver.duration import said
from qlab.driver.job import CODEC, Job
from qlab.driver.observe import Inputs
from qlab.driver.plan import Plan, plan_of
from qlab.driver.ranks import Ranks
from qlab.driver.report import PeakMemory
from qlab.driver.run import Run, write_blocks
from qlab.driver.scan import begin
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.hashed import HashedFiles
from qlab.files.offload import scratch
from qlab.files.writer import Writer
from qlab.model.skeleton import Skeleton
from qlab.process.shown import Shown, size
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, repr=False, kw_only=True)
class Rehearsal(Shown):
    """What the first blocks of a job took.

    Args:
        plan: The plan of the whole job.
        blocks: The number of blocks of the model.
        start: Seconds before the first block: loading, tracing, and what enters the first block.
        seconds: What each block took that was run: reading, solving, writing and reading back.
        peak_rss_bytes: The peak of the process's memory meanwhile.
    """

    plan: Plan
    blocks: int
    start: float
    seconds: Sequence[float]
    peak_rss_bytes: int

    @property
    def whole(self) -> float:
        """Seconds of the whole job by that: the blocks that were not run take as long as those
        behind the first one, which checks what all others are spared. What lies around the blocks
        is not counted."""
        first, *others = self.seconds
        each = sum(others) / len(others) if others else first
        return self.start + first + each * (self.blocks - 1)

    def summary(self) -> dict[str, str]:
        """The facts that are printed."""
        each = ", ".join(map(said, self.seconds))
        return {
            "blocks": f"{len(self.seconds)} of {self.blocks}, which took {each}",
            "peak memory": f"{size(self.peak_rss_bytes)} ({size(self.plan.peak_bytes)} predicted)",
            "time for the whole": f"{said(self.whole)} by these blocks",
        }

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "plan": self.plan.json(),
            "blocks": self.blocks,
            "start": self.start,
            "seconds": list(self.seconds),
            "whole": self.whole,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@undisturbed
@torch.no_grad()
def rehearse(
    model: Checkpoint,
    recipe: Transform,
    data: Data | None = None,
    *,
    blocks: int = 2,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
    offload: str | Path | None = None,
) -> Rehearsal:
    """Quantize the first blocks of a model as `quantize` does, write them to a folder that is
    removed at once, and say what the whole will take.

    Args:
        model: See `quantize`.
        recipe: See `quantize`. Steps that see the whole model are refused: the first blocks do not
            tell what they take.
        data: See `quantize`.
        blocks: How many blocks are run, at least 1.
        inputs: See `quantize`.
        dtype: See `quantize`.
        device: See `quantize`.
        memory: See `quantize`.
        calibrate_all_experts: See `quantize`.
        codec: See `quantize`.
        target: See `quantize`.
        offload: See `quantize`; the blocks are written there, too.

    Returns:
        The plan, the seconds of every block that was run, the peak of memory, and the seconds of
        the whole by that.

    Raises:
        QlabError: As of `quantize`; also where the model has fewer blocks, or a step sees the whole
            model.

    Example:
        >>> import qlab
        >>> rehearsal = qlab.rehearse(qlab.open("demo"), qlab.rtn("int4-g64"), blocks=1)
        >>> len(rehearsal.seconds), rehearsal.blocks
        (1, 2)
    """
    source = HashedFiles(model.path, model.stored)
    job = Job(
        model=replace(model, reader=source.read),
        recipe=recipe,
        data=data,
        inputs=inputs,
        calibrate_all_experts=calibrate_all_experts,
        dtype=dtype,
        device=device,
        memory=memory,
        codec=codec,
        target=target,
        offload=offload,
    )
    if job.measures:
        raise QlabError(
            "the recipe has a step that measures the whole model, which the first blocks do not "
            "show; rehearse the recipe without it"
        )
    started = time.perf_counter()
    with PeakMemory() as peak:
        skeleton = Skeleton(job.model, job.dtype or job.model.running_dtype, job.device)
        planned = plan_of(job, skeleton)
        planned.check(job.memory)
        if not 1 <= blocks <= len(skeleton.blocks):
            raise QlabError(
                f"{blocks} blocks cannot be run of a model that has {len(skeleton.blocks)}; give "
                "a number from 1 to that"
            )
        start, seconds = _timed(skeleton, job, planned, source, blocks, started)
    return Rehearsal(
        plan=planned,
        blocks=len(skeleton.blocks),
        start=start,
        seconds=seconds,
        peak_rss_bytes=peak.bytes,
    )


def _timed(
    skeleton: Skeleton,
    job: Job,
    planned: Plan,
    source: HashedFiles,
    blocks: int,
    started: float,
) -> tuple[float, list[float]]:
    """The seconds before the first block, and those of each of so many blocks."""
    first: Callable[[object], Sequence[int]] = lambda carries: range(blocks)
    with (
        scratch("rehearsal", job.offload) as folder,
        Writer(Path(folder) / "out", False, False) as writer,
    ):
        writer.begin({"rehearsal": blocks}, len(skeleton.blocks) + 1, source=source)
        run = Run(
            job=job,
            plan=planned,
            ranks=Ranks(),
            own_writer=writer,
            codec=CODECS[job.codec or CODEC],
        )
        scan = begin(skeleton, [run.solver], writer, first)
        times = [time.perf_counter()]
        for _ in write_blocks(scan, [run]):
            times.append(time.perf_counter())
        times[-1] = time.perf_counter()  # without data the last block is written behind the loop
    return times[0] - started, [after - before for before, after in pairwise(times)]
