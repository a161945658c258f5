"""The schemes as a table: what each rounds, what multiplies it here, and which engines load it.

Kernels are asked of the table in `qlab.lowering.weights.kernels`, engines of
`qlab.codecs.engines`. The first compute capability is that whose tensor cores multiply such
numbers; of integers of up to 4 bits beside inputs of 8, that which `int4_a8` runs on. Sources: PTX
ISA 9.0, mma (int8 and int4 from 7.5, e4m3 from 8.9, block scales from 10.0), mma.sp (from 8.0).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import FLOATS, Float, Int, Spec
from qlab.codecs import CODECS
from qlab.codecs.around import Rows
from qlab.codecs.engines import TARGETS, refusal, refusal_at_run_time, refusal_of_inputs
from qlab.driver.job import CODEC
from qlab.lowering.weights import int4_a8
from qlab.lowering.weights.kernels import choose
from qlab.lowering.weights.setting import Setting
from qlab.methods.schemes import SCHEMES, Scheme

HEADS = ("scheme", "weights", "inputs", "cache", "zeros", "bits", "GPU from", "here", "engines")
TENSOR_CORES, SPARSE, FP8, BLOCK_SCALES = (7, 5), (8, 0), (8, 9), (10, 0)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scheme. capability: the first compute capability that multiplies such numbers. here: the
    kernel that multiplies its weights on this machine, or what happens to its cache. engines:
    engine -> the format from which it loads the scheme."""

    scheme: Scheme
    capability: tuple[int, int]
    here: str
    engines: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        """Everything as plain data; numbers by their names."""
        scheme = self.scheme
        inputs, cache = (part and _by_token(str(part)) for part in (scheme.inputs, scheme.cache))
        return {
            "scheme": scheme.name,
            "weights": scheme.weights and str(scheme.weights),
            "inputs": inputs,
            "cache": cache,
            "zeros": scheme.sparsity,
            "bits_per_weight": scheme.bits_per_weight,
            "capability": list(self.capability),
            "here": self.here,
            "engines": dict(self.engines),
        }


@dataclass(frozen=True)
class Schemes:
    """All schemes, one row for each."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def json(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [row.json() for row in self.rows]

    def _cells(self) -> list[list[str]]:
        return [_cells(row.json()) for row in self.rows]

    def __str__(self) -> str:
        lines = [list(HEADS), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(*HEADS, caption=f"engines load {CODEC} where no other format is named")
        table.columns[0].no_wrap = True
        for cells in self._cells():
            table.add_row(*cells)
        yield table


def schemes() -> Schemes:
    """Which schemes there are: what each rounds, its bits per weight, what runs it, and who loads
    it.

    Returns:
        A table with a row for each scheme that `qlab.scheme` knows.

    Example:
        >>> import qlab
        >>> table = {row.scheme.name: row for row in qlab.schemes()}
        >>> table["FP8_DYNAMIC"].capability, table["FP8_DYNAMIC"].engines["vllm"]
        ((8, 9), 'compressed-tensors')
        >>> "lmdeploy" in table["W8A8"].engines
        False
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Schemes(tuple(_row(scheme, device) for scheme in SCHEMES.values()))


def _row(scheme: Scheme, device: torch.device) -> Row:
    return Row(
        scheme=scheme,
        capability=first_capability(scheme),
        here=_here(scheme, device),
        engines=_engines(scheme),
    )


def first_capability(scheme: Scheme) -> tuple[int, int]:
    """The first compute capability that multiplies the numbers of a scheme on tensor cores. Weights
    alone are multiplied as 16-bit floats; integers of up to 4 bits as what their inputs are."""
    needed = [TENSOR_CORES, SPARSE if scheme.sparsity else TENSOR_CORES]
    if scheme.inputs:
        needed.append(_of_numbers(scheme.inputs.spec))
    if scheme.inputs and isinstance(scheme.weights, Int) and scheme.weights.bits <= 4:
        numbers = "int8" if isinstance(scheme.inputs.spec, Int) else "fp8"
        needed.append(int4_a8.first_capability(numbers))
    if scheme.cache:
        needed.append(_of_numbers(scheme.cache.spec))
    return max(needed)


def _of_numbers(spec: Spec) -> tuple[int, int]:
    if not isinstance(spec, Float):
        return TENSOR_CORES
    grouped = spec.outer or spec.scale_dtype == torch.float8_e8m0fnu
    if grouped or (spec.exponent, spec.mantissa) != FLOATS["fp8"]:
        return BLOCK_SCALES
    return FP8


def _here(scheme: Scheme, device: torch.device) -> str:
    """The kernel of the table that takes a weight of the scheme in bfloat16."""
    if scheme.weights is None:
        return "rounded by eval and lower"
    weight = torch.linspace(-1, 1, 256 * 256, dtype=torch.float32).view(256, 256)
    leaf = encode(minmax, weight, scheme.weights)
    setting = Setting(dtype=torch.bfloat16, device=device, inputs=_form(scheme, "inputs"))
    kernel, passed = choose(leaf, setting)
    return "; ".join([kernel.name, *(each.short for each in passed)])


def _form(scheme: Scheme, part: str) -> QuantizeInput | None:
    """The rounding of inputs or cache as formats and kernels are asked about it."""
    stages = scheme.on_inputs() if part == "inputs" else scheme.on_cache()
    forms = [op for stage in stages for op in stage.view.operations]
    return next((op for op in forms if isinstance(op, QuantizeInput)), None)


def _engines(scheme: Scheme) -> dict[str, str]:
    """Engine -> the first format from which it loads the scheme."""
    found: dict[str, str] = {}
    for name, target in TARGETS.items():
        codecs = [CODEC] if scheme.weights is None else [row.codec for row in target.rows]
        loaded = [codec for codec in codecs if _loads(name, codec, scheme)]
        found |= {name: loaded[0]} if loaded else {}
    return found


def _loads(name: str, codec: str, scheme: Scheme) -> bool:
    """Whether an engine loads a scheme from this format."""
    form = _form(scheme, "inputs")
    if scheme.weights and CODECS[codec].refusal(scheme.weights, (form,) if form else ()):
        return False
    reasons = []
    if scheme.weights:
        reasons.append(refusal(name, codec, scheme.weights))
    if scheme.weights and scheme.inputs:
        reasons.append(refusal_of_inputs(name, scheme.weights, scheme.inputs))
    if scheme.cache:
        reasons.append(refusal_at_run_time(name, _rows_of_cache(scheme)))
    return not any(reasons)


def _rows_of_cache(scheme: Scheme) -> Rows:
    """What compressed-tensors says of an attention with such a cache."""
    around, form = CODECS[CODEC].around, _form(scheme, "cache")
    assert around is not None and form is not None  # it has a cache, which the format holds
    return around.encode({"attention": {"key": (form,), "value": (form,)}})[1]


def _by_token(text: str) -> str:
    """The name of an input or cache, in which a row is a token."""
    return text.replace("-channel", "-token")


def _cells(row: Mapping[str, Any]) -> list[str]:
    bits = row["bits_per_weight"]
    major, minor = row["capability"]
    named = [row[key] or "-" for key in ("scheme", "weights", "inputs", "cache", "zeros")]
    engines = [
        name if codec == CODEC else f"{name} ({codec})" for name, codec in row["engines"].items()
    ]
    return [
        *named,
        "-" if bits is None else f"{bits:.3f}",
        f"{major}.{minor}",
        row["here"],
        ", ".join(engines) or "-",
    ]
