"""What a check of a directory found."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qlab.errors import printable
from qlab.process.shown import Shown, some


@dataclass(frozen=True, repr=False, kw_only=True)
class Verdict(Shown):
    """sites: module -> spec, weight error against the reference, what was certified of it, and its
    fault or None.

    missing, extra: tensors of the reference that the directory lacks, and the other way round.
    changed: unquantized tensors that differ from the reference, with what explains each or None.
    certified: whether the directory holds certificates; without them nothing explains a change, and
    none is a fault. extras: tensor that its configuration calls for beside weights
    -> what is wrong with it, or None. config: key of config.json, nested ones with dots -> the
    directory's value and the reference's, None where there is none, if what they compute differs.
    retold: whether its quantization_config is another than the certified one. lost: whether its
    qlab.json is of a job that certifies, and holds no certificates. unlike: weight -> what it is
    and the recipe of its qlab.json makes another of.
    """

    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    missing: Sequence[str]
    extra: Sequence[str]
    changed: Mapping[str, str | None]
    certified: bool
    extras: Mapping[str, str | None]
    config: Mapping[str, tuple[Any, Any]]
    retold: bool
    lost: bool
    unlike: Mapping[str, str] = field(default_factory=dict)

    @property
    def faults(self) -> list[str]:
        """What is wrong, one sentence each; empty when the directory is what it claims to be."""
        found = [
            f"config.json has {_says(key, ours)} where the reference has {_says('', theirs)}"
            for key, (ours, theirs) in self.config.items()
        ]
        if self.retold:
            found.append(
                "the quantization_config of its config.json is not the one that was written with "
                "its codes, and readers may compute something else or nothing; restore it, or "
                "quantize or convert again"
            )
        if self.lost:
            found.append(
                "its qlab.json has lost its certificates; quantize or convert again, or remove "
                "that file"
            )
        found += [f"{name}: {row['fault']}" for name, row in self.sites.items() if row["fault"]]
        found += [
            f"{name}: {fault}"
            for name, fault in self.unlike.items()
            if not self.sites.get(name, {}).get("fault")
        ]
        found += [f"{name} {fault}" for name, fault in self.extras.items() if fault]
        found += [f"{name} is missing" for name in self.missing]
        found += [f"{name} is not in the reference" for name in self.extra]
        return found + [
            f"{name} differs from the reference and no certificate says why"
            for name, why in self.changed.items()
            if self.certified and why is None
        ]

    def summary(self) -> dict[str, str]:
        """The faults, and what was checked."""
        against = "grids, the reference's tensors" + (
            ", certificates" if self.certified else "; there are no certificates"
        )
        return {
            "directory": str(self.path),
            "faults": f"{len(self.faults)}: {some(self.faults)}" if self.faults else "none",
            "checked": f"{len(self.sites)} quantized weights; {against}",
        }

    def json(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {
            "path": str(self.path),
            "certified": self.certified,
            "faults": self.faults,
            "sites": dict(self.sites),
            "missing": list(self.missing),
            "extra": list(self.extra),
            "changed": dict(self.changed),
            "extras": dict(self.extras),
            "config": dict(self.config),
            "retold": self.retold,
            "lost": self.lost,
            "unlike": dict(self.unlike),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table("site", "spec", "weight error", "certified", "verdict", title=str(self.path))
        table.columns[0].overflow = "fold"
        for name, row in self.sites.items():
            table.add_row(
                name,
                row["spec"],
                _figure(row["weight_error"]),
                _figure(row["certified_error"]),
                row["fault"] or "good",
            )
        yield table
        for name, why in self.changed.items():
            yield f"{name} differs from the reference: {why or 'nothing says why'}"
        yield from (
            Text.assemble(("fault", "bold"), f" {printable(fault)}") for fault in self.faults
        )
        against = (
            "its certificates"
            if self.certified
            else "no certificates: only grids and the reference were checked"
        )
        beside = f"{len(self.extras)} tensors of what happens at run time, " if self.extras else ""
        yield f"{len(self.sites)} quantized weights, {beside}{len(self.faults)} faults, {against}"


def _says(key: str, value: Any) -> str:
    """A key and its value, in few words."""
    if value is None:
        return f"no {key}" if key else "none"
    return f"{key} {json.dumps(value, default=str):.60}".strip()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"
