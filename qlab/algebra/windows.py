"""Which windows a step that learns in a block sees: some, drawn at random, in every step, and all
of them whenever the loss is looked at."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

LOOKS = 8  # how often the loss over all windows is looked at, at most
BACKWARD = 3  # a window forward and backward takes as long as so many forward
OF_STEPS = 0.5  # what looks may take of the time of steps; the last step is looked at always
DRAWING = "windows of learning"  # what the random numbers are for


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """steps: how many steps are taken. windows: how many windows a step sees, drawn at random."""

    steps: int
    windows: int

    def drawn(self, count: int, numbers: torch.Generator) -> Iterator[list[int]]:
        """The windows of each step, of `count`. numbers: random ones, for `DRAWING`."""
        for _ in range(self.steps):
            yield torch.randperm(count, generator=numbers)[: self.windows].tolist()

    def looks(self, count: int) -> list[int]:
        """The steps, from 0, behind which the loss over `count` windows is looked at."""
        forward = BACKWARD * self.steps * self.windows
        times = max(1, min(LOOKS, int(OF_STEPS * forward / count)))
        apart = math.ceil(self.steps / times)
        return [t for t in range(self.steps) if t + 1 == self.steps or (t + 1) % apart == 0]
