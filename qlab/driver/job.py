"""A job as a value: what is asked of a model, handed on whole instead of option by option."""

from dataclasses import dataclass

import torch

from qlab.algebra.graph import Code
from qlab.algebra.stats import name_of
from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.learning import split
from qlab.driver.observe import Inputs, runs_reference
from qlab.driver.solve import in_order
from qlab.files.checkpoint import Checkpoint

CODEC = "compressed-tensors"  # what is written unless another codec is named


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

    @property
    def statistics(self) -> list[str]:
        """The names of the statistics that the recipe needs, sorted."""
        return sorted({name_of(need) for stage in self.recipe for need in stage.needs})

    @property
    def observed(self) -> Data | None:
        """The calibration samples, where the recipe needs statistics of them."""
        return self.data if self.statistics else None

    @property
    def runs_reference(self) -> bool:
        """Whether the unquantized model runs beside the quantized one."""
        return runs_reference([self.recipe], self.inputs)

    def in_order(self, code: Code) -> bool:
        """Whether the sources of this block are solved one after another, each on what the
        quantized ones before it produce, up to the first stage that sees the whole block."""
        site_by_site, _ = split(self.recipe)
        return in_order(code, site_by_site, self.inputs, self.calibrate_all_experts)
