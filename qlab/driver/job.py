"""A job as a value: what is asked of a model, handed on whole instead of option by option."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from qlab.algebra.bind import Bind, Bound
from qlab.algebra.frame import framing
from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.stats import name_of
from qlab.algebra.transform import Transform
from qlab.algebra.views import WholeModel
from qlab.data.calibration import Data
from qlab.driver.learning import split
from qlab.driver.observe import Inputs, runs_reference
from qlab.driver.solve import in_order
from qlab.driver.turned import turned_first
from qlab.files.checkpoint import Checkpoint

CODEC = "compressed-tensors"  # what is written unless another codec is named


class Begun(Protocol):
    """Blocks that the first steps of a recipe were applied to. recipe: those steps."""

    @property
    def recipe(self) -> Transform: ...

    def block(self, path: str, device: torch.device | str) -> ModuleGraph:
        """A block behind those steps."""

    def unchanged(self, graph: ModuleGraph) -> Mapping[str, Any]:
        """The leaves of such a block that no file holds and no step changed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe for a model, and how it is applied.

    Args:
        model: The model that is quantized.
        recipe: The stages, in order.
        data: Calibration samples, or None where no stage needs statistics.
        inputs: Whether a site is calibrated on what the quantized model before it produces, or on
            the unquantized model's activations.
        calibrate_all_experts: Whether statistics of an expert are of all tokens, or of those that
            the router sends to it.
        dtype: Of the activations while calibrating; None stands for the model's own.
        device: The name of the device on which blocks are run and solved.
        memory: A bound on the process's memory in bytes, or None.
        codec: The name of the format that is written (`qlab.codecs.CODECS`), or None where nothing
            is.
        target: The name of the engine that is to load the directory (`qlab.codecs.engines`), or
            None.
        offload: The folder of what is kept beside the output (`qlab.files.offload`), or None: in
            the output's work folder, and where the system has its temporary files.
    """

    model: Checkpoint
    recipe: Transform
    data: Data | None = None
    inputs: Inputs = "quantized"
    calibrate_all_experts: bool = False
    dtype: torch.dtype | None = None
    device: str = "cpu"
    memory: int | None = None
    codec: str | None = CODEC
    target: str | None = None
    offload: str | Path | None = None

    @property
    def done(self) -> int:
        """The number of stages that were applied before a bind of the recipe was measured."""
        return 0

    @property
    def begun(self) -> Begun | None:
        """The blocks behind those stages; None where they change nothing."""
        return None

    @property
    def seconds(self) -> Mapping[str, float]:
        """What each bind took that was measured, by its name and place in the recipe."""
        return {}

    @property
    def remaining(self) -> "Job":
        """The job of the stages that are not done."""
        return self

    @property
    def measures(self) -> bool:
        """Whether the recipe has a bind whose value is not known yet."""
        return any(isinstance(stage, Bind) for stage in self.recipe)

    @property
    def statistics(self) -> list[str]:
        """The names of the statistics that the recipe needs, sorted."""
        return sorted({name_of(need) for stage in self.recipe for need in stage.needs})

    @property
    def observed(self) -> Data | None:
        """The calibration samples, where the recipe needs statistics of them, or a measurement of
        the whole model may."""
        measured = any(isinstance(stage, Bind | Bound) for stage in self.recipe)
        return self.data if self.statistics or measured else None

    @property
    def runs_reference(self) -> bool:
        """Whether the unquantized model runs beside the quantized one."""
        return runs_reference([self.recipe], self.inputs)

    def in_order(self, code: Code) -> bool:
        """Whether the sources of this block are solved one after another, each on what the
        quantized ones before it produce, up to the first stage that sees the whole block, and
        behind those that turn it first."""
        _, behind = self.turned_first(code)
        return in_order(code, behind, self.inputs, self.calibrate_all_experts)

    def source_by_source(self, code: Code) -> bool:
        """Whether the statistics of this block, too, are observed for one source at a time."""
        turning, _ = self.turned_first(code)
        return self.in_order(code) and not any(stage.needs for stage in turning)

    def turned_first(self, code: Code) -> tuple[Transform, Transform]:
        """The stages that turn this block first, and those behind, up to the first that sees the
        whole block."""
        _, in_basis = framing(self.recipe)
        in_blocks = tuple(s for s in in_basis if not isinstance(s.view, WholeModel))
        site_by_site, _ = split(in_blocks)
        return turned_first(site_by_site, code)


@dataclass(frozen=True, kw_only=True)
class Resolved(Job):
    """A job whose binds are measured.

    Args:
        stages: The number of stages up to the last bind, which are done.
        blocks: The blocks behind them; None where they change nothing.
        measured: What each bind took in seconds, by its name and place in the recipe.
    """

    stages: int
    blocks: Begun | None
    measured: Mapping[str, float]

    @property
    def done(self) -> int:
        return self.stages

    @property
    def begun(self) -> Begun | None:
        return self.blocks

    @property
    def seconds(self) -> Mapping[str, float]:
        return self.measured

    @property
    def remaining(self) -> Job:
        return replace(self, recipe=self.recipe[self.stages :], stages=0)
