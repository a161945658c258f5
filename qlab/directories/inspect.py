"""What a model directory holds, read from headers and JSON files alone: no tensor is loaded and no
model is built."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.files.record import recorded
from qlab.process.shown import Shown, size
from qlab.process.surroundings import undisturbed

SHOWN = ("spec", "shape", "bits_per_weight", "weight_error", "loss", "tokens", "stored", "bytes")


@dataclass(frozen=True, repr=False, kw_only=True)
class Inspection(Shown):
    """sites: quantized module -> its spec, tensors and bytes, with what qlab recorded of it.
    unquantized: name -> dtype and shape. extras: key of its quantization_config -> what its readers
    do beside, and with how many tensors. dtypes: bytes by dtype. record: qlab.json, or {} where
    another tool wrote the directory."""

    path: Path
    model_type: str
    format: str
    files: int
    dtypes: Mapping[str, int]
    sites: Mapping[str, Mapping[str, Any]]
    unquantized: Mapping[str, str]
    extras: Mapping[str, str]
    record: Mapping[str, Any]

    def summary(self) -> dict[str, str]:
        """Without the sites."""
        specs = Counter(row["spec"] for row in self.sites.values() if "stored" in row)
        kept = sum(row.get("spec") is None for row in self.sites.values())
        facts = {
            "directory": str(self.path),
            "model": f"{self.model_type}, {self.format}",
            "size": (
                f"{size(sum(self.dtypes.values()))} in {self.files} files "
                f"({', '.join(self.dtypes)})"
            ),
            "quantized": ", ".join(f"{count} weights in {spec}" for spec, count in specs.items())
            or "no weight",
            "not quantized": f"{len(self.unquantized)} tensors"
            + (f", {kept} of them weights that a recipe kept" if kept else ""),
        }
        if "bits_per_weight" in self.record:
            facts["bits per weight"] = f"{self.record['bits_per_weight']:.3f}"
        return facts | dict(self.extras)

    def json(self) -> dict[str, Any]:
        """The record with what the headers say added to it."""
        return {
            **self.record,
            "path": str(self.path),
            "model_type": self.model_type,
            "format": self.format,
            "files": self.files,
            "dtypes": dict(self.dtypes),
            "sites": dict(self.sites),
            "unquantized": dict(self.unquantized),
            "extras": dict(self.extras),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._recorded() if self.record else self._families()
        size = ", ".join(f"{dtype} {held / 1e6:,.1f}" for dtype, held in self.dtypes.items())
        quantized = sum("stored" in row for row in self.sites.values())
        left = sum(row.get("spec") is None for row in self.sites.values())
        yield from (f"{key}: {says}" for key, says in self.extras.items())
        yield (
            f"{self.model_type}, {self.format}: {self.files} files, "
            f"{sum(self.dtypes.values()) / 1e6:,.1f} MB ({size})"
        )
        weights = (
            f"{quantized} of {quantized + left} weights quantized"
            if self.record
            else f"{quantized} weights quantized"
        )
        more = (
            f", {self.record['bits_per_weight']:.3f} bits per weight"
            if "bits_per_weight" in self.record
            else ""
        )
        inputs = self.record.get("job", {}).get("inputs")
        yield (
            f"{weights}{more}{f', {inputs} inputs' if inputs else ''}, {len(self.unquantized)} "
            "other tensors"
        )

    def _recorded(self) -> Table:
        table = Table(
            "site", "spec", "shape", "weight error", "loss", "tokens", "notes", title=str(self.path)
        )
        table.columns[0].overflow = "fold"  # a site is looked up by its whole name
        for name, row in self.sites.items():
            rest = ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row.items()
                if k not in SHOWN
            )
            table.add_row(
                name,
                row.get("spec") or "-",
                "x".join(map(str, row.get("shape") or ())),
                _figure(row.get("weight_error")),
                _figure(row.get("loss")),
                f"{row['tokens']:,}" if row.get("tokens") else "-",
                rest,
            )
        return table

    def _families(self) -> Table:
        """Modules that differ in numbers only, and not in what is stored, are one row."""
        rows = [
            (re.sub(r"\d+", "*", name), row["spec"], row["stored"])
            for name, row in self.sites.items()
        ]
        rows += [
            (re.sub(r"\d+", "*", name), "-", stored) for name, stored in self.unquantized.items()
        ]
        table = Table("weights", "count", "spec", "stored", title=str(self.path))
        table.columns[0].overflow = "fold"
        for (family, spec, stored), count in Counter(rows).items():
            table.add_row(family, str(count), spec, stored)
        return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


@undisturbed
def inspect(path: str | Path) -> Inspection:
    """A directory in any format that qlab reads, quantized or not, of any size."""
    model = open_checkpoint(path)
    record, quantization = recorded(model.path), model.raw.get("quantization_config") or {}
    dtypes: Counter[str] = Counter()
    for stored in model.stored.values():
        dtypes[stored.dtype] += stored.nbytes
    noted = dict(record.get("sites", {}))
    sites = {name: {**noted.pop(name, {}), **_held(model, name)} for name in model.quantized}
    taken = {part for module in model.quantized for part in model.parts(module)} | {
        n for e in model.extras for n in e.tensors
    }
    plain = {name: _said(model, name) for name in model.stored if name not in taken}
    return Inspection(
        path=model.path,
        model_type=str(model.raw.get("model_type")),
        format=" ".join(
            str(quantization[key])
            for key in ("quant_method", "format", "version")
            if isinstance(quantization.get(key), str)
        )
        or "unquantized",
        files=len(set(model.files.values())),
        dtypes=dict(dtypes.most_common()),
        sites={**sites, **noted},
        unquantized=plain,
        extras={e.key: f"{e.says}; {len(e.tensors)} tensors" for e in model.extras},
        record=record,
    )


def _held(model: Checkpoint, module: str) -> dict[str, Any]:
    parts = sorted(model.parts(module))
    stored = ", ".join(f"{name.removeprefix(f'{module}.')} {_said(model, name)}" for name in parts)
    size = sum(model.stored[name].nbytes for name in parts)
    return {"spec": str(model.quantized[module] or "dense"), "stored": stored, "bytes": size}


def _said(model: Checkpoint, name: str) -> str:
    stored = model.stored[name]
    return f"{stored.dtype} {'x'.join(map(str, stored.shape)) or 'scalar'}"
