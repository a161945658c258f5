"""Which products are tuned: shapes and numbers of tokens from a command line, or the shapes of a
directory's weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.errors import QlabError
from qlab.lowering.devices import device_named
from qlab.lowering.weights import cuda
from qlab.lowering.weights.int4 import implementation
from qlab.lowering.weights.nibbles import Planes, planes_of, refusal

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"bf16": "bfloat16", "fp16": "float16"}
Shape = tuple[int, int]  # n, k


@dataclass(frozen=True, order=True)
class Form:
    """What weights of several shapes share. group: codes per scale; zeros: whether they have zero
    points; experts: how many of the shape one grouped product multiplies by, or 0 for a linear."""

    group: int = 128
    zeros: bool = False
    experts: int = 0


LINEAR = Form()


def check(shapes: Sequence[Shape], tokens: Sequence[int], dtype: str, group: int) -> None:
    """Refuse what no int4 product is defined for."""
    check_tokens(tokens, dtype)
    for n, k in shapes:
        if n < 1 or k < 1 or group < 1 or k % group:
            raise QlabError(
                f"groups of {group} do not divide a weight of {n}x{k}; choose another --group or "
                "shape"
            )
        reason = refusal(Int(4, Tile(1, group)), torch.Size((n, k)))
        if reason:
            raise QlabError(f"--group {group}: {reason}")


def check_tokens(tokens: Sequence[int], dtype: str) -> None:
    """Refuse numbers that are none of tokens, and dtypes that nothing is tuned for."""
    if dtype not in DTYPES:
        raise QlabError(f"--dtype {dtype!r} is unknown; it is {' or '.join(DTYPES)}")
    too_few = [m for m in tokens if m < 1]
    if too_few:
        raise QlabError(f"--m {too_few[0]} is no number of tokens; give 1 or more")


def weights_of(directory: str | Path, device: torch.device | str) -> dict[Form, list[Shape]]:
    """The distinct (n, k) of a directory's quantized weights, by their form, as the device's
    kernels hold them.

    A channel's scale may be cut into groups, and 5 to 8 bits are two planes beside each other: see
    qlab.lowering.weights.nibbles. Weights that no kernel takes are left out; a directory of nothing
    else is refused.
    """
    from qlab.files.record import read_report

    where = device_named(device)
    shapes: dict[Form, set[Shape]] = {}
    reasons: list[str] = []
    sites = read_report(Path(directory))["sites"].values()
    for text, shape in {(row["spec"], torch.Size(row["shape"])) for row in sites if row["spec"]}:
        reason = refusal(parse_spec(text), shape)
        if reason:
            reasons.append(reason)
            continue
        planes = _planes_of_shape(f"{directory}, {text}", text, shape[-2:], where)
        experts = shape[0] if len(shape) == 3 and not one_by_one(where) else 0
        form = Form(planes.group, planes.zeros is not None, experts)
        shapes.setdefault(form, set()).add((planes.q.shape[0], planes.q.shape[1]))
    if not shapes:
        reason = reasons[0] if reasons else "nothing in it is quantized"
        raise QlabError(f"{directory} has no weight for a kernel to be tuned for: {reason}")
    return {form: sorted(sizes) for form, sizes in sorted(shapes.items())}


def _planes_of_shape(path: str, text: str, shape: torch.Size, device: torch.device) -> Planes:
    """A weight of zeros of this spec and shape, as the device's kernels hold it."""
    spec = parse_spec(text)
    scales = torch.zeros(spec.tile.scales_shape(shape), dtype=torch.float32)
    codes = torch.zeros(shape, dtype=spec.code_dtype)
    zeros = None if spec.symmetric else scales.to(torch.int8)
    leaf = QTensor(codes, scales, zeros, spec)
    return planes_of(path, leaf, whole_rows=implementation(device).WHOLE_ROWS)


def one_by_one(device: torch.device) -> bool:
    """Whether experts are multiplied as linears, one after the other: on a CPU, and on GPUs without
    the fused kernel."""
    return device.type == "cpu" or cuda.reads_dense(device, experts=True)


def parse_shapes(text: str) -> list[Shape]:
    """'8192x8192,4096x14336' -> [(8192, 8192), (4096, 14336)]: rows n (output channels) x columns k
    (input channels), each once."""
    try:
        pairs = [part.lower().split("x") for part in text.split(",")]
        return list(dict.fromkeys((int(n), int(k)) for n, k in pairs))
    except ValueError:
        raise QlabError(
            f"--shapes {text!r} is no list of NxK, for example 8192x8192,4096x14336"
        ) from None


def parse_tokens(text: str) -> list[int]:
    """'1,2,16' -> [1, 2, 16], each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise QlabError(f"--m {text!r} is no list of token counts, for example 1,16,256") from None
