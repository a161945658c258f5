"""Linears of a lowered model whose inputs or outputs are multiplied with a matrix at run time.

    x -> x @ M before the module runs (and rounds x), y -> y @ M behind it

M is in the module's `input_rotation` or `output_rotation`, by its factors where it is a Hadamard
matrix and these are faster. The directory holds it, and a state of the model does not.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlab.algebra.graph import Op
from qlab.algebra.online import MatMul
from qlab.lowering.around.hadamard import rotation
from qlab.model.online import at_input, at_output
from qlab.model.skeleton import Skeleton

# Linear -> the matrices at its input and at its output.
Rotations = Mapping[str, tuple[Tensor | None, Tensor | None]]


def rotations(skeleton: Skeleton) -> Rotations:
    """Those of the linears that have any; what many of them share is in memory once."""
    shared: list[Tensor] = []

    def matrix(ops: Iterable[Op]) -> Tensor | None:
        M = next((op.M_nn for op in ops if isinstance(op, MatMul)), None)
        if M is None:
            return None
        if not any(torch.equal(M, other) for other in shared):
            shared.append(M)
        return next(other for other in shared if torch.equal(M, other))

    pairs = {
        name: (matrix(at_input(skeleton, name)), matrix(at_output(skeleton, name)))
        for name in skeleton.names.linears()
    }
    return {name: pair for name, pair in pairs.items() if pair != (None, None)}


def attach(model: nn.Module, rotations: Rotations, device: torch.device) -> None:
    """Let the linears of a model do it."""
    there: dict[int, nn.Module] = {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, (before, behind) in rotations.items():
        module = model.get_submodule(name)
        for key, M in (("input_rotation", before), ("output_rotation", behind)):
            if M is None:
                continue
            if id(M) not in there:
                there[id(M)] = rotation(M, device, dtype)
            setattr(module, key, there[id(M)])
        if before is not None:
            module.register_forward_pre_hook(_rotate_input)
        if behind is not None:
            module.register_forward_hook(_rotate_output)


def is_rotated(module: nn.Module) -> bool:
    """Whether `attach` gave the module a matrix."""
    return hasattr(module, "input_rotation") or hasattr(module, "output_rotation")


def _rotate_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return module.input_rotation(args[0]), *args[1:]


def _rotate_output(module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return module.output_rotation(y)
