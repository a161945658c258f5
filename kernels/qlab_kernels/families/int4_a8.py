"""int4 weights and activations of 8 bits, int8 or e4m3: the operators, which configurations are
allowed and worth timing, and the one that runs when nothing was timed.

A problem's dtype is that of the results. Scales multiply sums over a k tile, so that a tile lies in
one group; a tile of 64 channels may hold two groups of 32.
"""

from dataclasses import replace

from qlab_kernels.capability import KIB, KernelError, target
from qlab_kernels.families.int4 import waste
from qlab_kernels.layout import ATOM, padded_group, round_up
from qlab_kernels.layout8 import REVISION, layout_of
from qlab_kernels.problem import Config, Family, Problem

NUMBERS = {
    "int4_int8_mm": "int8",
    "int4_int8_grouped_mm": "int8",
    "int4_fp8_mm": "fp8",
    "int4_fp8_grouped_mm": "fp8",
}
RESULTS = {"bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a number
SMALLEST = 32  # a group of which two lie in a tile
# A sum over a whole row of int8 16 q times int8 p, at most 2^14 each, fits in 31 bits.
CHANNELS = 2**17


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    if isinstance(p.cc, str):
        return f"{p.op} runs on GPUs, not on {p.cc}"
    try:
        layout_of(p.cc, NUMBERS[p.op])
        k_pad, group = padded_group(p.k, p.group)
    except KernelError as refusal:
        return str(refusal)
    if p.dtype not in RESULTS:
        return f"results are {', '.join(RESULTS)}, not {p.dtype}"
    if NUMBERS[p.op] == "int8" and p.group >= p.k and k_pad >= CHANNELS:
        return f"a sum over {p.k} channels may not fit in 32 bits: quantize in groups"
    return (
        _legal_kind(p, c, k_pad)
        or _legal_tile(p, c)
        or _legal_division(p, c, k_pad, group)
        or _legal_resources(p, c)
    )


def _legal_kind(p: Problem, c: Config, k_pad: int) -> str | None:
    kinds = ("gemm",) if p.grouped else ("gemm", "split_k")
    if c.kind not in kinds:
        return f"{p.op} is computed by {' and '.join(kinds)}, not by {c.kind}"
    if c.scale_on != "accumulator":
        return "weights of 8 bits hold no scale: it is on the accumulator"
    tiles = k_pad // max(c.bk, 1)
    fewest, most = (1, 1) if c.kind == "gemm" else (2, tiles)
    if fewest <= c.split <= most:
        return None
    return (
        f"split {c.split} does not suit {c.kind} over {tiles} k tiles: gemm has 1, split_k "
        f"2..{tiles}"
    )


def _legal_tile(p: Problem, c: Config) -> str | None:
    # tensor cores of 9.0 add products of e4m3 in fewer bits than fp32 has
    deepest = 256 if NUMBERS[p.op] == "int8" else 128
    if c.bm not in (16, 32, 64, 128) or c.bn not in (64, 128, 256):
        return f"bm is 16..128 and bn 64..256, powers of two, not {c.bm} and {c.bn}"
    if c.bk not in (64, 128, 256) or c.bk > deepest:
        return f"bk is a power of two in 64..{deepest}, not {c.bk}"
    if c.warps not in (4, 8) or not 1 <= c.stages <= 6:
        return f"warps are 4 or 8 and stages 1..6, not {c.warps} and {c.stages}"
    if c.bn < 16 * c.warps:
        return (
            f"{c.warps} warps need bn >= {16 * c.warps}, not {c.bn}: each owns 16 rows, and "
            "others would widen them again"
        )
    return None


def _legal_division(p: Problem, c: Config, k_pad: int, group: int) -> str | None:
    n_pad = round_up(p.n, ATOM)
    if n_pad % c.bn or k_pad % c.bk:
        return (
            f"tiles of {c.bn}x{c.bk} do not divide the padded weight {n_pad}x{k_pad}: the rest "
            "would be dropped"
        )
    if group % c.bk and not (group == SMALLEST and c.bk == 2 * SMALLEST):
        return f"a k tile of {c.bk} straddles groups of {group}: take bk <= {max(group, 64)}"
    return None


def _legal_resources(p: Problem, c: Config) -> str | None:
    smem, need = target(p.cc).smem, shared_bytes(p, c)  # type: ignore[arg-type]
    if need > smem:
        return (
            f"{c.stages} stages of {c.bm}x{c.bn}x{c.bk} take {need} bytes of shared memory, and "
            f"{p.cc} has {smem}"
        )
    accumulators = c.bn * c.bm // (32 * c.warps)
    if accumulators > 64:
        return (
            f"{c.bm}x{c.bn} over {c.warps} warps holds {accumulators} sums per thread, and those "
            "of a group beside them: it would spill past 64"
        )
    return None


def shared_bytes(p: Problem, c: Config) -> int:
    """Shared memory of a tile, at most: all stages of packed W, codes of x, scales, zeros and sums,
    or what the store passes through."""
    groups = max(1, c.bk // p.group)
    beside = groups * (4 * c.bn * (2 if p.zeros else 1) + (4 * c.bm if p.zeros else 0))
    stage = c.bn * c.bk // 2 + c.bm * c.bk + beside
    return max(c.stages * stage, min(4 * c.bn * c.bm, 64 * KIB))


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing for `p`, all legal; at least one, or KernelError saying why
    there is none."""
    allowed = [c for c in _menu(p) if legal(p, c) is None]
    if not allowed:
        raise KernelError(legal(p, Config("gemm", 16, 64, 64)) or f"no configuration computes {p}")
    return sorted(allowed, key=lambda c: waste(p, c))


def _menu(p: Problem) -> list[Config]:
    """Small tiles with several splits for few tokens, and larger tiles for more tokens, where small
    ones would read the weights too often."""
    if isinstance(p.cc, str) or (p.group < p.k and p.group not in (32, 64, 128, 256)):
        return []
    if p.grouped:  # The router decides how many rows each expert gets.
        return _tiles(p)
    menu = []
    k_pad = padded_group(p.k, p.group)[0]
    for c in _tiles(p):
        tokens = round_up(max(p.m, 1), c.bm) // c.bm
        if (c.bm > 16 and p.bucket <= c.bm // 2) or (c.bm < 64 and tokens > c.bm // 8):
            continue
        splits = {min(s, k_pad // c.bk) for s in ((1, 2, 4, 8, 16) if c.bm <= 64 else (1,))}
        menu += [
            replace(c, kind="gemm" if s == 1 else "split_k", split=s) for s in sorted(splits) if s
        ]
    return menu


def _tiles(p: Problem) -> list[Config]:
    """The tiles that compile without spills, in k tiles as wide as groups allow."""
    k_pad, group = padded_group(p.k, p.group)
    bk = 128 if group % 128 == 0 and k_pad % 128 == 0 else 64
    tiles = [
        (16, 64, bk, 4, 3),
        (16, 64, bk, 4, 4),
        (16, 64, bk, 4, 5),
        (16, 128, bk, 4, 3),
        (16, 128, bk, 4, 4),
        (32, 64, bk, 4, 4),
        (32, 128, bk, 4, 3),
        (64, 128, bk, 4, 3),
        (64, 128, bk, 8, 3),
        (64, 64, bk, 4, 3),
        (128, 128, bk, 8, 3),
        (64, 256, bk, 8, 3),
    ]
    if group == SMALLEST:  # sums of two groups beside those of the tile spill from 4 warps on 8.9
        tiles.remove((64, 128, bk, 4, 3))
    if group % 256 == 0 and k_pad % 256 == 0:
        tiles += [(16, 64, 256, 4, 3), (16, 128, 256, 4, 3)]
    # tcgen05 works in 128 rows: 64 of them cost twice the instructions, and 8 warps widen twice.
    if p.cc == (10, 0) and NUMBERS[p.op] == "fp8" and round_up(p.n, ATOM) % 128 == 0:
        tiles = [tile for tile in tiles if tile[1] > 64 and tile[1] >= 32 * tile[3]]
    return [Config("gemm", *tile[:3], 1, *tile[3:]) for tile in tiles]


def heuristic(p: Problem) -> Config:
    """A configuration from the shape alone: what runs when nothing was tuned. KernelError when none
    is legal."""
    return candidates(p)[0]


def moved(p: Problem) -> float:
    """Bytes that any kernel must move: packed codes, scales and zeros of the experts that are
    reached, codes of x and y once each."""
    k, group = padded_group(p.k, p.group)
    weights = p.reached * p.n * k * (0.5 + (4 if p.zeros else 2) / group)
    return weights + p.m * (p.k + RESULTS[p.dtype] * p.n)


FAMILY = Family(
    name="int4_a8",
    operators=tuple(NUMBERS),
    sources=("tile8", "rows", "int4_a8", "int4_a8_grouped"),
    layouts=REVISION,
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=moved,
)
