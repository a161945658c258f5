"""The rows of the table of kernels beside each other: the same weight, held by every row that takes
it, by torchao where it has a tensor, and dense."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.lowering import QLinear, torchao_bytes
from qlab.lowering.assembling import plain
from qlab.lowering.devices import device_label, device_named
from qlab.lowering.tuning.timing import copies, microseconds
from qlab.lowering.weights.kernels import KERNELS
from qlab.lowering.weights.setting import Setting

# (weights, inputs that are rounded or None)
FORMS: Sequence[tuple[str, str | None]] = (
    ("int8-channel", None),
    ("int8-channel", "int8-channel"),
    ("int8-g128", "int8-channel"),
    ("int4-g128", None),
    ("fp8-channel", "fp8-channel"),
    ("fp8-b128x128", "fp8-g128"),
    ("mxfp4", None),
)
TORCHAO, DENSE = "torchao", "dense"


def measure(
    forms: Sequence[tuple[str, str | None]],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    device: str,
    seconds: float,
    said: Callable[[str], None],
) -> dict[str, Any]:
    """Median microseconds of a product by each row. seconds: spent on one of them at most."""
    where = device_named(device)
    rows = []
    for text, inputs in forms:
        for n, k in shapes:
            said(f"{text} x {inputs or 'bfloat16'}, {n}x{k}")
            leaf, rounding = _weight(text, n, k), _rounding(inputs)
            for name, module in _modules(leaf, rounding, where):
                calls = [copy.deepcopy(module) for _ in range(copies(2 * n * k, where))]
                for m in tokens:
                    x = torch.randn(
                        m, k, generator=torch.Generator().manual_seed(m), dtype=torch.float32
                    )
                    taken = _time(calls, x.to(where, torch.bfloat16), where, seconds)
                    row = {"weights": text, "inputs": inputs, "n": n, "k": k, "m": m}
                    rows.append({**row, "kernel": name, "microseconds": taken})
    return {"device": device_label(where), "torch": torch.__version__, "rows": rows}


def _weight(text: str, n: int, k: int) -> QTensor:
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return encode(minmax, W, parse_spec(text))


def _rounding(inputs: str | None) -> QuantizeInput | None:
    return None if inputs is None else QuantizeInput(parse_spec(inputs))


def _modules(
    leaf: QTensor, inputs: QuantizeInput | None, device: torch.device
) -> Iterator[tuple[str, nn.Module]]:
    """The weight by every row that takes it, in the order of the table; then by torchao, and dense,
    whose inputs stay as they are."""
    setting = Setting(dtype=torch.bfloat16, device=device, inputs=inputs)
    for kernel in KERNELS:
        if kernel.meant(leaf, setting) and kernel.takes(leaf, setting) is None:
            yield (
                kernel.name,
                QLinear(
                    "the weight",
                    leaf,
                    None,
                    torch.bfloat16,
                    device,
                    False,
                    inputs=inputs,
                    kernel=kernel,
                ),
            )
    theirs = _torchao(leaf, inputs)
    if theirs is not None:
        yield TORCHAO, _linear(theirs.to(device))
    yield DENSE, plain(dense(leaf, torch.bfloat16), None, torch.bfloat16, device)


def _torchao(leaf: QTensor, inputs: QuantizeInput | None) -> Tensor | None:
    """torchao's tensor of the weight, or None where it has none or is not installed."""
    if not torchao_bytes.holds(leaf.spec):
        return None
    try:
        return torchao_bytes.tensor("the weight", leaf, inputs, rotated=False)
    except (ImportError, QlabError):
        return None


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@torch.no_grad()
def _time(modules: Sequence[nn.Module], x: Tensor, device: torch.device, seconds: float) -> float:
    return microseconds([partial(one, x) for one in modules], 100, device, seconds)


def table(record: Mapping[str, Any]) -> Table:
    """One row per kernel, its times beside that of the first kernel in the table."""
    tokens = list(dict.fromkeys(row["m"] for row in record["rows"]))
    columns = [f"{m} tokens" for m in tokens]
    shown = Table("weights", "inputs", "size", "kernel", *columns, title=record["device"])
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in record["rows"]:
        key = (row["weights"], row["inputs"], row["n"], row["k"], row["kernel"])
        groups.setdefault(key, {})[row["m"]] = row["microseconds"]
    first: dict[tuple[Any, ...], dict[int, float]] = {}
    for key, times in groups.items():
        best = first.setdefault(key[:-1], times)
        cells = [f"{times[m]:,.0f} us ({times[m] / best[m]:.2f})" for m in tokens]
        shown.add_row(key[0], key[1] or "-", f"{key[2]}x{key[3]}", key[4], *cells)
    return shown
