"""What a recipe makes of a model, as a value: nothing is written, and no format has to hold it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.qtensor import Leaf
from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.job import Job
from qlab.driver.observe import Inputs
from qlab.driver.outside import rounded_outside
from qlab.driver.plan import Plan, plan_of
from qlab.driver.scan import begin, solved_blocks
from qlab.driver.segments import Solved, Solver
from qlab.files.carry import Carry
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
    def plan(self) -> Plan:
        """What the recipe does and costs, whatever format it is written in."""
        return plan_of(self.job, self._skeleton)

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
        skeleton = self.skeleton()
        solver = Solver(job=self.job, experts_at_once=self.plan.experts_at_once)
        with tempfile.TemporaryDirectory(prefix="qlab-states-") as folder:
            every = range(len(skeleton.blocks))
            scan = begin(skeleton, [solver], _Folder(Path(folder)), lambda carries: every)
            yield from solved_blocks(scan)

    @streamed
    def around(self) -> Iterator[tuple[str, Leaf]]:
        """Every weight around the blocks that the recipe rounds (a head, a projector), by its name
        in the model."""
        yield from rounded_outside(self.skeleton(), self.recipe)

    def summary(self) -> dict[str, str]:
        """The recipe, its specs and the bits per weight."""
        facts = self.plan.summary()
        specs = sorted({row["spec"] for row in self.plan.sites.values() if row["spec"]})
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
    )
    quantized = Quantized(job=job)
    quantized.plan.check(memory)
    return quantized


class _Folder:
    """Hidden states between blocks in the files of a folder that nobody else writes to."""

    def __init__(self, path: Path):
        self.path = path

    def carry(
        self, stream: str, index: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> Carry:
        """See `qlab.driver.scan.Keeper`."""
        name = f"{stream}-{index}"
        return Carry(self.path / name, shapes, dtype, name, _write)


def _write(path: Path, fill: Callable[[Path], object]) -> None:
    fill(path)
