"""What a recipe makes of a model, as a value: nothing is written, and no format has to hold it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from qlab.algebra.frame import in_frame
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.qtensor import Leaf
from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.bound import resolved
from qlab.driver.job import Job
from qlab.driver.kept import solved_in_order
from qlab.driver.observe import Inputs
from qlab.driver.outside import rounded_outside
from qlab.driver.plan import plan_of
from qlab.driver.planned import Plan
from qlab.driver.ranks import Ranks
from qlab.driver.segments import Solved
from qlab.files.checkpoint import Checkpoint
from qlab.model.skeleton import Skeleton
from qlab.process.shown import Shown
from qlab.process.surroundings import streamed, undisturbed


@dataclass(frozen=True, repr=False, kw_only=True)
class Quantized(Shown):
    """A model as a recipe makes it, which is computed when it is asked for, block by block.

    job: the recipe, the model and the calibration, without a format.
    """

    job: Job

    @property
    def model(self) -> Checkpoint:
        """The model that the recipe is applied to."""
        return self.job.model

    @property
    def recipe(self) -> Transform:
        """The stages, in order."""
        return self.job.recipe

    @cached_property
    def resolved(self) -> Job:
        """The job without binds (`qlab.bind`), which are measured when this is first asked for."""
        return _measured(self.job, Ranks())

    def resolved_by(self, ranks: Ranks) -> Job:
        """The same of several ranks, all of which ask for it."""
        return self.resolved if ranks.world == 1 else _measured(self.job, ranks)

    @cached_property
    def asked(self) -> Plan:
        """The plan of the recipe before any bind is measured."""
        return plan_of(self.job, self._skeleton)

    @cached_property
    def plan(self) -> Plan:
        """What the recipe does and costs, whatever format it is written in. Binds are measured for
        it."""
        return plan_of(self.resolved, self._skeleton) if self.job.measures else self.asked

    @property
    def bits_per_weight(self) -> float:
        """Over all sites, with scales and zero points, as of the plan."""
        return self.plan.bits_per_weight

    def skeleton(self) -> Skeleton:
        """The model around its blocks, in the dtype of the calibration; every call gives one and
        the same."""
        return self._skeleton

    @cached_property
    def _skeleton(self) -> Skeleton:
        return Skeleton(self.model, self.job.dtype or self.model.running_dtype, self.job.device)

    def segments(self) -> Iterator[tuple[str, ModuleGraph]]:
        """Every block as the recipe solves it, with its path, in running order.

        One block is in memory at a time, besides the one that the caller holds; hidden states lie
        in a temporary folder. Each pass gives the same bits.
        """
        for block in self.solved():
            path = block.after.path
            yield path, block.after
            del block

    @streamed
    def solved(self) -> Iterator[Solved]:
        """Every block before and after the recipe, in running order; as `segments`."""
        solved = solved_in_order(self.skeleton(), self.resolved, self.plan.experts_at_once)
        for block in solved:
            yield replace(block, after=in_frame(block.after))
            del block

    @streamed
    def around(self) -> Iterator[tuple[str, Leaf]]:
        """Every weight around the blocks that the recipe rounds (a head, a projector), by its name
        in the model."""
        yield from rounded_outside(self.skeleton(), self.resolved.recipe)

    def summary(self) -> dict[str, str]:
        """The recipe, its specs and the bits per weight."""
        facts = self.asked.summary()
        specs = sorted({row["spec"] for row in self.asked.sites.values() if row["spec"]})
        return {
            "model": str(self.model.path),
            "stages": facts["stages"],
            "specs": ", ".join(specs) or "none",
            "weights": facts["weights"],
        }


@undisturbed
@torch.no_grad()
def apply(
    model: Checkpoint,
    recipe: Transform,
    data: Data | None,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    calibrate_all_experts: bool = False,
    offload: str | Path | None = None,
) -> Quantized:
    """What a recipe makes of a model, as a value that `evaluate`, `lower` and `write` take.

    Nothing is computed but the checks, and nothing is written; no format has to hold what comes
    out. The blocks are solved whenever the value is used, with one block in memory at a time.

    Args:
        model: The model that the recipe is applied to.
        recipe: The stages, applied to each block in their order.
        data: Calibration tokens, or samples of images and text; None for recipes that need no
            statistics.
        inputs: See `quantize`.
        dtype: See `quantize`.
        device: See `quantize`.
        memory: See `quantize`.
        calibrate_all_experts: See `quantize`.
        offload: See `quantize`.

    Returns:
        The value. Its `segments()` are the solved blocks, and its `plan` says what they cost.

    Raises:
        QlabError: What the recipe asks for cannot be done, whatever the format; names the site or
            the pattern.

    Example:
        >>> import qlab
        >>> quantized = qlab.apply(qlab.open("demo"), qlab.rtn("int3-g32"), None)
        >>> quantized.bits_per_weight
        3.5
        >>> [path for path, block in quantized.segments()]
        ['model.layers.0', 'model.layers.1']
    """
    job = Job(
        model=model,
        recipe=recipe,
        data=data,
        inputs=inputs,
        calibrate_all_experts=calibrate_all_experts,
        dtype=dtype,
        device=device,
        memory=memory,
        codec=None,
        offload=offload,
    )
    quantized = Quantized(job=job)
    quantized.asked.check(memory)
    return quantized


@undisturbed
@torch.no_grad()
def _measured(job: Job, ranks: Ranks) -> Job:
    return resolved(job, ranks)
