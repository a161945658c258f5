"""What a model directory holds, read from headers and JSON files alone: no tensor is loaded and no
model is built."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.errors import LONGEST, shortened
from qlab.files.checkpoint import GGUF, Checkpoint, open_checkpoint
from qlab.files.record import recorded
from qlab.process.extras import needed
from qlab.process.shown import Shown, family, size
from qlab.process.surroundings import undisturbed

SHOWN = ("spec", "shape", "bits_per_weight", "weight_error", "loss", "tokens", "stored", "bytes")


@dataclass(frozen=True, repr=False, kw_only=True)
class Inspection(Shown):
    """What a model directory holds.

    path: the directory. model_type, format: the architecture, and the format of its codes. files:
    the number of safetensors files. dtypes: dtype -> bytes. sites: quantized module -> its spec,
    tensors and bytes, with what qlab recorded of it. unquantized: tensor -> its dtype and shape.
    extras: key of the quantization_config -> what readers do beside weights, and with how many
    tensors. record: qlab.json, or {} where another tool wrote the directory.
    """

    path: Path
    model_type: str
    format: str
    files: int
    dtypes: Mapping[str, int]
    sites: Mapping[str, Mapping[str, Any]]
    unquantized: Mapping[str, str]
    extras: Mapping[str, str]
    record: Mapping[str, Any]

    @property
    def _kept(self) -> int:
        """The number of weights that a recipe left unquantized."""
        return sum(row.get("spec") is None for row in self.sites.values())

    def summary(self) -> dict[str, str]:
        """The facts that are printed, which leave out the sites."""
        specs = Counter(row["spec"] for row in self.sites.values() if "stored" in row)
        quantized = ", ".join(f"{count} weights in {spec}" for spec, count in specs.items())
        kept = f", {self._kept} of them weights that a recipe kept" if self._kept else ""
        bytes_held = size(sum(self.dtypes.values()))
        facts = {
            "directory": str(self.path),
            "model": f"{self.model_type}, {self.format}",
            "size": f"{bytes_held} in {self.files} files ({', '.join(self.dtypes)})",
            "quantized": quantized or "no weight",
            "not quantized": f"{len(self.unquantized)} tensors{kept}",
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
        for key, says in self.extras.items():
            yield shortened(f"{key}: {says}", LONGEST)
        megabytes = ", ".join(f"{dtype} {count / 1e6:,.1f}" for dtype, count in self.dtypes.items())
        yield (
            f"{shortened(self.model_type)}, {self.format}: {self.files} files, "
            f"{sum(self.dtypes.values()) / 1e6:,.1f} MB ({megabytes})"
        )
        yield f"{self._weights()}, {len(self.unquantized)} other tensors"

    def _weights(self) -> str:
        """How many weights are quantized, to how many bits, and how their inputs are rounded."""
        quantized = sum("stored" in row for row in self.sites.values())
        if not self.record:
            return f"{quantized} weights quantized"
        said = f"{quantized} of {quantized + self._kept} weights quantized"
        if "bits_per_weight" in self.record:
            said += f", {self.record['bits_per_weight']:.3f} bits per weight"
        inputs = self.record.get("job", {}).get("inputs")
        return f"{said}, {inputs} inputs" if inputs else said

    def _recorded(self) -> Table:
        """One row per site, with what was measured of it."""
        columns = ("site", "spec", "shape", "weight error", "loss", "tokens", "notes")
        table = Table(*columns, title=str(self.path))
        table.columns[0].overflow = "fold"  # a site is looked up by its whole name
        for name, row in self.sites.items():
            table.add_row(
                name,
                row.get("spec") or "-",
                "x".join(map(str, row.get("shape") or ())),
                _figure(row.get("weight_error")),
                _figure(row.get("loss")),
                f"{row['tokens']:,}" if row.get("tokens") else "-",
                _others(row),
            )
        return table

    def _families(self) -> Table:
        """One row for all modules whose names differ in numbers only, and that hold the same."""
        rows = [(family(name), row["spec"], row["stored"]) for name, row in self.sites.items()]
        rows += [(family(name), "-", stored) for name, stored in self.unquantized.items()]
        table = Table("weights", "count", "spec", "stored", title=str(self.path))
        table.columns[0].overflow = "fold"
        for (name, spec, stored), count in Counter(rows).items():
            table.add_row(name, str(count), spec, stored)
        return table


def _others(row: Mapping[str, Any]) -> str:
    """What a row of a report holds beside the columns of the table."""
    words = []
    for key, value in row.items():
        if key not in SHOWN:
            words.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(words)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3e}"


@undisturbed
def inspect(path: str | Path) -> Inspection:
    """What a directory holds, in any format that qlab reads, quantized or not, of any size.

    Only headers and JSON files are read.

    Args:
        path: The model directory, or a GGUF file.

    Returns:
        Specs, tensors and bytes of every weight, with what qlab measured if it wrote the directory.

    Raises:
        QlabError: The path is no model directory, or its files are damaged or in no format that
            qlab reads.

    Example:
        >>> import qlab
        >>> held = qlab.inspect("demo-int4")
        >>> held.model_type, held.files
        ('llama', 3)
        >>> held.sites["model.layers.0.self_attn.q_proj"]["spec"]
        'int4-g64'
    """
    file = Path(path).expanduser()
    if file.suffix == GGUF and file.is_file():
        needed("gguf", "gguf")  # directories do without it
        from qlab.directories.inspect_gguf import facts_of

        return Inspection(**facts_of(file))
    model = open_checkpoint(path)
    record, quantization = recorded(model.path), model.raw.get("quantization_config") or {}
    dtypes: Counter[str] = Counter()
    for stored in model.stored.values():
        dtypes[stored.dtype] += stored.nbytes
    rows = dict(record.get("sites", {}))
    sites = {name: {**rows.pop(name, {}), **_codes(model, name)} for name in model.quantized}
    parts = {part for module in model.quantized for part in model.parts(module)} | model.beside
    return Inspection(
        path=model.path,
        model_type=str(model.raw.get("model_type")),
        format=_format(quantization),
        files=len(set(model.files.values())),
        dtypes=dict(dtypes.most_common()),
        sites={**sites, **rows},
        unquantized={name: _tensor(model, name) for name in model.stored if name not in parts},
        extras={e.key: f"{e.says}; {len(e.tensors)} tensors" for e in model.extras},
        record=record,
    )


def _format(quantization: Mapping[str, Any]) -> str:
    """The format of the codes, in the words of the configuration."""
    words = [quantization.get(key) for key in ("quant_method", "format", "version")]
    return " ".join(word for word in words if isinstance(word, str)) or "unquantized"


def _codes(model: Checkpoint, module: str) -> dict[str, Any]:
    """The spec of a quantized module, its tensors and their bytes."""
    parts = sorted(model.parts(module))
    stored = [f"{name.removeprefix(f'{module}.')} {_tensor(model, name)}" for name in parts]
    return {
        "spec": str(model.quantized[module] or "dense"),
        "stored": ", ".join(stored),
        "bytes": sum(model.stored[name].nbytes for name in parts),
    }


def _tensor(model: Checkpoint, name: str) -> str:
    """The dtype and the shape of a tensor."""
    stored = model.stored[name]
    return f"{stored.dtype} {'x'.join(map(str, stored.shape)) or 'scalar'}"
