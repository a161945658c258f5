"""4- and 8-bit floats beside 16-bit activations: the operators, which configurations are allowed
and worth timing, and the one that runs when nothing was timed.

The operator says the bits of a code, and the group of a problem which scales it has: bytes, which
multiply the weight, of groups of 16 and 32, fp32 numbers on the sums of wider ones, and one factor
of a row where group >= k.
"""

from dataclasses import replace

from qlab_kernels.capability import KIB, Capability, KernelError, target
from qlab_kernels.families.int4 import waste
from qlab_kernels.float_layout import FINE, REVISION, padded_columns
from qlab_kernels.layout import ATOM, round_up
from qlab_kernels.problem import Config, Family, Problem

BITS = {"float4_mm": 4, "float4_grouped_mm": 4, "float8_mm": 8, "float8_grouped_mm": 8}
_SIZES = (16, 32, 64, 128, 256)


def refusal(cc: Capability, dtype: str) -> str | None:
    """Why a capability has no such kernels for activations of this dtype, or None."""
    name = f"compute capability {cc[0]}.{cc[1]}"
    try:
        row = target(cc)
    except KernelError as error:
        return str(error)
    if row.path != "fused":
        return f"Triton compiles no tensor-core product for {name}; 8.0 is the first"
    if dtype not in ("float16", "bfloat16"):
        return f"{name} multiplies floats with float16 and bfloat16 activations, not with {dtype}"
    return None


def as_packed(p: Problem) -> tuple[int, int]:
    """(padded k, group or 0 for one scale per row) of a problem. KernelError for other groups."""
    group = 0 if p.group >= p.k else p.group
    return padded_columns(p.k, group), group


def scale_on(group: int) -> str:
    """What the scales of groups multiply; the factors of rows follow all sums."""
    return "weight" if group in FINE else "accumulator"


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    if isinstance(p.cc, str):
        return f"{p.op} runs on GPUs, not on {p.cc}"
    reason = refusal(p.cc, p.dtype)
    if reason:
        return reason
    try:
        k_pad, group = as_packed(p)
    except KernelError as error:
        return str(error)
    if p.zeros:
        return "floats have no zero points"
    if c.scale_on != scale_on(group):
        return f"scales of groups of {p.group} are on the {scale_on(group)}, not the {c.scale_on}"
    return (
        _legal_kind(p, c, k_pad)
        or _legal_tile(p, c)
        or _legal_division(p, c, k_pad, group)
        or _legal_resources(p, c, group)
    )


def _legal_kind(p: Problem, c: Config, k_pad: int) -> str | None:
    kinds = ("gemm",) if p.grouped else ("gemm", "split_k")
    if c.kind not in kinds:
        return f"{p.op} is computed by {' and '.join(kinds)}, not by {c.kind}"
    tiles = k_pad // max(c.bk, 1)
    fewest, most = (1, 1) if c.kind == "gemm" else (2, tiles)
    if fewest <= c.split <= most:
        return None
    return (
        f"split {c.split} does not suit {c.kind} over {tiles} k tiles: gemm has 1, split_k "
        f"2..{tiles}"
    )


def _legal_tile(p: Problem, c: Config) -> str | None:
    if c.bm not in _SIZES or c.bn not in _SIZES[2:] or c.bk not in (64, 128):
        return (
            f"bm is 16..256, bn 64..256 and bk 64 or 128, powers of two, not {c.bm}, {c.bn} and "
            f"{c.bk}"
        )
    if c.warps not in (4, 8) or not 1 <= c.stages <= 6:
        return f"warps are 4 or 8 and stages 1..6, not {c.warps} and {c.stages}"
    if c.bn < 16 * c.warps:
        return (
            f"{c.warps} warps need bn >= {16 * c.warps}, not {c.bn}: each owns 16 rows, and "
            "others would dequantize them again"
        )
    return None


def _legal_division(p: Problem, c: Config, k_pad: int, group: int) -> str | None:
    n_pad = round_up(p.n, ATOM)
    if n_pad % c.bn or k_pad % c.bk:
        return (
            f"tiles of {c.bn}x{c.bk} do not divide the padded weight {n_pad}x{k_pad}: the rest "
            "would be dropped"
        )
    if group not in FINE and group % c.bk:
        return f"a k tile of {c.bk} straddles groups of {group}: take bk = 64"
    return None


def _legal_resources(p: Problem, c: Config, group: int) -> str | None:
    smem, need = target(p.cc).smem, shared_bytes(p, c)  # type: ignore[arg-type]
    if need > smem:
        return (
            f"{c.stages} stages of {c.bm}x{c.bn}x{c.bk} take {need} bytes of shared memory, and "
            f"{p.cc} has {smem}"
        )
    # a sum that is scaled stands beside the sum that it is added to
    accumulators = c.bn * c.bm // (32 * c.warps) * (1 if group in FINE or group == 0 else 2)
    if accumulators > 128:
        return (
            f"{c.bm}x{c.bn} over {c.warps} warps holds {accumulators} accumulators per thread: it "
            "would spill past 128"
        )
    return None


def shared_bytes(p: Problem, c: Config) -> int:
    """Shared memory of a tile, at most: all stages of packed W, x and scales, or what the store
    passes through."""
    words = 4 * c.bn * max(1, c.bk // (4 * p.group))
    stage = c.bn * c.bk * BITS[p.op] // 8 + 2 * c.bm * c.bk + words
    return max(c.stages * stage, min(4 * c.bn * c.bm, 64 * KIB))


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing for `p`, all legal, the most promising first; at least one,
    or KernelError saying why there is none."""
    allowed = [c for c in _menu(p) if legal(p, c) is None]
    if not allowed:
        on = scale_on(0 if p.group >= p.k else p.group)
        reason = legal(p, Config("gemm", 16, 64, 64, scale_on=on))  # type: ignore[arg-type]
        raise KernelError(reason or f"no configuration computes {p}")
    return sorted(allowed, key=lambda c: waste(p, c))


def heuristic(p: Problem) -> Config:
    """A configuration from the shape alone: what runs when nothing was tuned. KernelError when none
    is legal."""
    return candidates(p)[0]


def _menu(p: Problem) -> list[Config]:
    """Small tiles with several splits for few tokens, and larger tiles for more tokens, where small
    ones would dequantize the weights too often."""
    if p.grouped:  # The router decides how many rows each expert gets.
        return _tiles(p)
    menu = []
    for c in _tiles(p):
        if c.bm > 16 and p.bucket <= c.bm // 2:
            continue
        splits = (1, 2, 4, 8, 16) if c.bm <= 64 else (1,)
        several = {min(s, max(1, round_up(p.k, ATOM) // c.bk)) for s in splits}
        menu += [replace(c, kind="gemm" if s == 1 else "split_k", split=s) for s in sorted(several)]
    return menu


def _tiles(p: Problem) -> list[Config]:
    """The tiles that compile without spills."""
    small = [
        (16, 64, 128, 4, 3),
        (16, 64, 128, 4, 4),
        (16, 128, 128, 4, 3),
        (32, 128, 128, 4, 3),
        (16, 64, 64, 4, 4),
        (16, 128, 64, 4, 4),
        (32, 128, 64, 4, 3),
    ]
    # tcgen05 works in 128 rows
    if p.cc == (10, 0) and round_up(p.n, ATOM) % 128 == 0:
        small = [t for t in small if t[1] > 64]
    # of mma.sync, 4 warps have too few registers for as many bytes
    warps = 8 if BITS[p.op] == 8 and p.cc not in ((9, 0), (10, 0)) else 4
    large = [(64, 128, 64, warps, 3), (64, 256, 64, 8, 3), (128, 128, 64, 8, 3)]
    on = scale_on(0 if p.group >= p.k else p.group)
    return [
        Config("gemm", *t[:3], 1, *t[3:], on)  # type: ignore[arg-type]
        for t in small + large
    ]


def moved(p: Problem) -> float:
    """Bytes that any kernel must move: codes and scales of the weights that are read, x and y."""
    k_pad, group = as_packed(p)
    per_scale = 1 if group in FINE else 4
    scales = per_scale * k_pad / (group or k_pad)
    weights = p.reached * p.n * (k_pad * BITS[p.op] / 8 + scales)
    return weights + 2.0 * p.m * (p.k + p.n)


FAMILY = Family(
    name="floats",
    operators=tuple(BITS),
    sources=("tile", "device", "rows", "float_tile", "float_mm"),
    layouts=REVISION,
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=moved,
)
