"""The result of a check of a directory."""

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
    """What a check of a directory against its reference found.

    path: the directory. sites: module -> its spec, its weight error against the reference, the
    certified error, and its fault or None. missing: tensors of the reference that the directory
    lacks. extra: tensors of the directory that the reference lacks. changed: unquantized tensor
    that differs from the reference's -> what explains it, or None. certified: whether the directory
    holds certificates; without them nothing explains a change, and no change is a fault. extras:
    tensor beside the weights that the configuration calls for -> its fault, or None. config: key of
    config.json that differs, nested ones with dots -> the directory's value and the reference's
    (None: it has no such key). retold: whether the quantization_config does not hash to what was
    recorded. lost: whether the job of qlab.json writes certificates, and there are none. unlike:
    weight -> what it is, where the recorded recipe makes something else of it.
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
        faults = [
            f"config.json has {_says(key, ours)} where the reference has {_says('', theirs)}"
            for key, (ours, theirs) in self.config.items()
        ]
        if self.retold:
            faults.append(
                "the quantization_config of its config.json is not the one that was written with "
                "its codes, and readers may compute something else or nothing; restore it, or "
                "quantize or convert again"
            )
        if self.lost:
            faults.append(
                "its qlab.json has lost its certificates; quantize or convert again, or remove "
                "that file"
            )
        faults += [f"{name}: {row['fault']}" for name, row in self.sites.items() if row["fault"]]
        faults += [
            f"{name}: {fault}"
            for name, fault in self.unlike.items()
            if not self.sites.get(name, {}).get("fault")
        ]
        faults += [f"{name} {fault}" for name, fault in self.extras.items() if fault]
        faults += [f"{name} is missing" for name in self.missing]
        faults += [f"{name} is not in the reference" for name in self.extra]
        faults += [
            f"{name} differs from the reference and no certificate says why"
            for name, why in self.changed.items()
            if self.certified and why is None
        ]
        return faults

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
        for fault in self.faults:
            yield Text.assemble(("fault", "bold"), f" {printable(fault)}")
        against = (
            "its certificates"
            if self.certified
            else "no certificates: only grids and the reference were checked"
        )
        beside = f"{len(self.extras)} tensors of what happens at run time, " if self.extras else ""
        yield f"{len(self.sites)} quantized weights, {beside}{len(self.faults)} faults, {against}"


def _says(key: str, value: Any) -> str:
    """A key and its value, in a few words."""
    if value is None:
        return f"no {key}" if key else "none"
    return f"{key} {json.dumps(value, default=str):.60}".strip()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"
