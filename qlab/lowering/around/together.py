"""Inputs that are rounded by a scale for all channels of a token, where each rank has some of the
channels: the ranks agree on the range, and every one rounds its part as one process would.

    lo_m, hi_m = the least and the largest of row m over all ranks;  s_m, z_m = the grid of the two
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlab.algebra.grid import fit, minmax
from qlab.algebra.qtensor import shared_outer
from qlab.algebra.spec import Spec
from qlab.lowering.around.inputs import RoundedInput, round_input
from qlab.lowering.weights.exact import spec_of
from qlab.lowering.weights.modules import QuantizedWeight

Part = Tensor | None


@dataclass(frozen=True)
class Agreed:
    """The scales of x [m, k] of which each rank has some columns, as all of them compute them.

    spec: the grid. group: torch's process group of all ranks.
    """

    spec: Spec
    group: Any

    def __call__(self, x_mk: Tensor) -> tuple[Part, Part, Part]:
        """scales [m, 1] or [1, 1], zeros alike or None, and outer [1] or None. Of a spec with an
        outer scale only that one is of all columns."""
        lo, hi = x_mk.float().aminmax(dim=-1)
        ends_2m = torch.stack([-lo, hi])
        dist.all_reduce(ends_2m, dist.ReduceOp.MAX, group=self.group)
        ends_m2 = torch.stack([-ends_2m[0], ends_2m[1]], -1)
        outer = shared_outer([ends_m2], self.spec)
        return (*fit(minmax, ends_m2, self.spec), None) if outer is None else (None, None, outer)


class RoundedTogether(RoundedInput):
    """The same of a part of the channels."""

    def __init__(self, inputs: RoundedInput, group: Any):
        super().__init__(inputs.operation, torch.device("cpu"))  # it has no tensors
        self.agreed = Agreed(inputs.spec, group)

    def forward(self, x: Tensor) -> Tensor:
        return round_input(x, *self.agreed(x), self.text) if len(x) else x


def round_together(module: QuantizedWeight, group: Any) -> None:
    """Let a module that has some input channels of a weight round them as one with all of them
    does. Nothing changes where scales are stored, or are of groups of channels."""
    inputs, packed = module.inputs, module.packed
    if inputs is not None and _is_of_all(inputs, inputs.spec):
        module.inputs = RoundedTogether(inputs, group)
    if not module.kernel.rounds or "in_scales" not in module.kernel.tensors:
        return
    spec = spec_of(packed.spec)
    if packed.in_scales is None and spec.tile.cols is None:
        module.kernel = _with_scales(module.kernel, Agreed(spec, group))


def _is_of_all(inputs: RoundedInput, spec: Spec) -> bool:
    """Whether a scale is computed from all channels of an input."""
    is_stored = inputs.scales is not None or inputs.outer is not None
    return not is_stored and (spec.tile.cols is None or spec.outer)


def _with_scales(kernel: Any, agreed: Agreed) -> Any:
    """A kernel that rounds activations, by the scales on which ranks agree."""

    def scaled(x: Tensor, packed: Any) -> Any:
        if not len(x):
            return packed
        scales, zeros, _ = agreed(x)
        there = {"in_scales": scales, "in_zeros": zeros}
        return packed._replace(**{name: there[name] for name in there if name in packed._fields})

    return replace(
        kernel,
        mm=lambda x, packed, *rest: kernel.mm(x, scaled(x, packed), *rest),
        grouped_mm=lambda x, packed, *rest: kernel.grouped_mm(x, scaled(x, packed), *rest),
    )
