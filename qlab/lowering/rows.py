"""Which kernel multiplies each weight of a directory here, and why the faster ones do not: read off
the weights one at a time, without building the lowered model."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.algebra.qtensor import QTensor
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering.assembling import loaded, quantized_weights
from qlab.lowering.devices import device_label, device_named
from qlab.lowering.weights.kernels import Passed, choose
from qlab.lowering.weights.setting import Setting, checked_activations
from qlab.model.skeleton import Skeleton
from qlab.process.shown import Shown
from qlab.process.surroundings import undisturbed

DENSE = "dense"  # of weights whose layout is no grid of qlab's, and which have no codes


class Group(NamedTuple):
    """What weights have in common whose names differ in numbers only.

    weights: the name, with a star in the place of each number. inputs: how x is rounded, or None.
    row: the kernel that multiplies them. multiplies: what it multiplies, in words. passed: the
    kernels before it that were meant for them, and why they do not take them.
    """

    weights: str
    spec: str
    inputs: str | None
    row: str
    multiplies: str
    passed: tuple[Passed, ...]


@dataclass(frozen=True, repr=False, kw_only=True)
class Rows(Shown):
    """The kernels of the weights of a directory.

    path: the directory. device: where they run, in words. dtype: of the activations. activations:
    what the user lets kernels round them to, or None. groups: group of weights -> how many.
    """

    path: Path
    device: str
    dtype: str
    activations: str | None
    groups: Mapping[Group, int]

    def summary(self) -> dict[str, str]:
        """How many weights each kernel multiplies."""
        counts: Counter[str] = Counter()
        for group, count in self.groups.items():
            counts[group.row] += count
        return {"directory": str(self.path), "device": self.device} | {
            row: f"{count} weights" for row, count in counts.items()
        }

    def json(self) -> dict[str, Any]:
        """Everything as plain data."""
        groups = [
            {**group._asdict(), "passed": dict(group.passed), "count": count}
            for group, count in self.groups.items()
        ]
        return {
            "device": self.device,
            "dtype": self.dtype,
            "activations": self.activations,
            "groups": groups,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"{self.path} on {self.device}, {self.dtype} activations"
        table = Table("weights", "count", "spec", "inputs", "kernel", "not", title=title)
        table.columns[0].overflow = "fold"
        for group, count in self.groups.items():
            reasons = "\n".join(f"{passed.row}: {passed.reason}" for passed in group.passed)
            table.add_row(
                group.weights,
                str(count),
                group.spec,
                group.inputs or "-",
                f"{group.row} ({group.multiplies})",
                reasons or "-",
            )
        yield table


@undisturbed
def rows_of(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    activations: str | None = None,
) -> Rows:
    """The kernel that `lower` takes for each quantized weight of a directory. Every weight is
    loaded, because some kernels depend on what it holds; one is in memory at a time."""
    rounding = checked_activations(activations)
    where, checkpoint = device_named(device), open_checkpoint(path)
    skeleton = Skeleton(checkpoint, dtype, where)
    groups: Counter[Group] = Counter()
    for name in quantized_weights(skeleton):
        leaf, inputs = loaded(skeleton, name)
        setting = Setting(dtype=dtype, device=where, inputs=inputs, activations=rounding)
        groups[_group(name, leaf, setting)] += 1
    return Rows(
        path=checkpoint.path,
        device=device_label(where),
        dtype=str(dtype).removeprefix("torch."),
        activations=activations,
        groups=dict(groups),
    )


def _group(name: str, leaf: Any, setting: Setting) -> Group:
    """The group of a weight."""
    weights = re.sub(r"\d+", "*", name)
    inputs = None if setting.inputs is None else str(setting.inputs.input_spec)
    if not isinstance(leaf, QTensor):
        return Group(weights, DENSE, inputs, DENSE, "a dense weight x activations", ())
    kernel, passed = choose(leaf, setting)
    return Group(weights, str(leaf.spec), inputs, kernel.name, kernel.multiplies, passed)
