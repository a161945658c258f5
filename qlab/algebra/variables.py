"""Numbers that a whole model learns, with Adam's moments, in files of a temporary folder: what one
segment learns is in memory while that segment runs.

    mean = b1 mean + (1 - b1) g      square = b2 square + (1 - b2) g^2
    move -= rate * mean / (1 - b1^t) / (sqrt(square / (1 - b2^t)) + eps)        (Kingma and Ba 2014)
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

B1, B2 = 0.9, 0.95
IN_CACHE = 1 << 16  # numbers that are moved at once
EPS = 1e-12  # far below the gradient of a mean over all tokens with respect to one scale


class Variables:
    """How far each of some tensors has moved, all 0 at first.

    Args:
        shapes: name -> the shape of the tensor that moves.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._folder = tempfile.TemporaryDirectory(prefix="qlab-learned-")
        self._moves, self._means, self._squares, self._best = (
            self._file(kind) for kind in ("moves", "means", "squares", "best")
        )
        self._reached: dict[str, Tensor] = {}
        self._steps = dict.fromkeys(self.shapes, 0)

    def _file(self, kind: str) -> Mapping[str, Tensor]:
        """One number for each number that moves, in a file; name -> its part of it."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        flat = torch.from_file(
            str(Path(self._folder.name) / kind), shared=True, size=sum(sizes), dtype=torch.float32
        )
        parts = flat.split(sizes)
        return {name: part.view(self.shapes[name]) for name, part in zip(self.shapes, parts)}

    def moves(self, names: Sequence[str], device: Any = "cpu") -> dict[str, Tensor]:
        """How far tensors have moved: views, whose numbers `update` changes. Where gradients are
        on, the moves require them, and `update` takes them."""
        moves = {name: self._moves[name].detach().to(device) for name in names}
        if torch.is_grad_enabled():
            for name, move in moves.items():
                self._reached[name] = move.requires_grad_()
        return moves

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One step of Adam on what `moves` gave since the last update, and let go of it."""
        for name, move in self._reached.items():
            if move.grad is None:
                continue
            self._steps[name] += 1
            self._step(name, move.grad.float().cpu(), rate)
        self._reached = {}

    def _step(self, name: str, gradient: Tensor, rate: float) -> None:
        """One step of a tensor, some of its numbers after the other: they stay in a cache."""
        tensors = self._moves[name], self._means[name], self._squares[name], gradient
        t = self._steps[name]
        for move, mean, square, g in zip(*(x.reshape(-1).split(IN_CACHE) for x in tensors)):
            mean.lerp_(g, 1 - B1)
            square.lerp_(g.square(), 1 - B2)
            size = (square / (1 - B2**t)).sqrt_().add_(EPS)
            move.addcdiv_(mean, size, value=-rate / (1 - B1**t))

    def keep(self) -> None:
        """Remember the moves as the best ones."""
        for name, best in self._best.items():
            best.copy_(self._moves[name])

    def best(self, name: str, device: Any = "cpu") -> Tensor:
        """How far a tensor had moved when the moves were last kept; 0 if they never were."""
        return self._best[name].clone().to(device)


class Stored(torch.autograd.Function):
    """Numbers rounded to what a dtype holds, in fp32; gradients pass straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        most = torch.finfo(dtype).max
        return x.clamp(-most, most).to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient, None
