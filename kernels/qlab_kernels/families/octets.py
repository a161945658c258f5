"""8-bit weights and 8-bit activations: tiles that multiply rows of bytes with rows of bytes as they
lie. What families of such products share."""

from collections.abc import Callable
from math import ceil

from qlab_kernels.capability import Capability, KernelError, target
from qlab_kernels.layout import round_up
from qlab_kernels.problem import Config, Problem

SMS = {(8, 0): 108, (8, 6): 84, (8, 7): 16, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
MOST_SUMS = 64  # of 32 bits per thread; twice as many spill with what follows the loop
SPLITS = (2, 4, 8, 16)
LIBRARY = Config("library")
# bm, bn, bk, warps, stages
TILES = (
    (16, 64, 256, 4, 4),
    (16, 128, 128, 4, 4),
    (16, 64, 128, 4, 6),
    (32, 64, 256, 4, 3),
    (32, 128, 128, 4, 4),
    (128, 128, 128, 8, 3),
    (64, 128, 128, 4, 4),
    (64, 128, 128, 8, 4),
    (128, 128, 64, 8, 4),
    (64, 256, 128, 8, 3),
    (256, 64, 128, 8, 3),
)
FEW = 64  # tokens, up to which the memory decides


def capability_name(cc: Capability | str) -> str:
    """'8.9' of (8, 9)."""
    return cc if isinstance(cc, str) else ".".join(map(str, cc))


def legal_tile(p: Problem, c: Config, copies: int = 1) -> str | None:
    """Why a tile computes no product of bytes on the device, or None. copies: how many sums of
    the same size a thread holds at once."""
    assert not isinstance(p.cc, str)
    if c.bm not in (16, 32, 64, 128, 256) or c.bn not in (64, 128, 256):
        return f"bm is a power of two in 16..256 and bn in 64..256, not {c.bm} and {c.bn}"
    if c.bk not in (64, 128, 256) or c.warps not in (4, 8) or not 1 <= c.stages <= 6:
        return f"bk is 64, 128 or 256, warps 4 or 8, stages 1..6, not {c.bk}, {c.warps}, {c.stages}"
    need, smem = c.stages * (c.bn + c.bm) * c.bk, target(p.cc).smem
    if need > smem:
        return (
            f"{c.stages} stages of {c.bm}x{c.bn}x{c.bk} take {need} bytes of shared memory, and "
            f"capability {capability_name(p.cc)} has {smem}"
        )
    sums = copies * c.bn * c.bm // (32 * c.warps)
    if sums > MOST_SUMS:
        return (
            f"{c.bm}x{c.bn} over {c.warps} warps holds {sums} sums per thread: it would spill past "
            f"{MOST_SUMS}"
        )
    return None


def legal_split(p: Problem, c: Config) -> str | None:
    """Why the split does not suit the kind, or None."""
    tiles = ceil(p.k / c.bk)
    fewest, most = (1, 1) if c.kind == "gemm" else (2, tiles)
    if fewest <= c.split <= most:
        return None
    return (
        f"split {c.split} does not suit {c.kind} over {tiles} k tiles: gemm has 1, split_k "
        f"2..{tiles}"
    )


def splits(p: Problem, c: Config) -> list[Config]:
    """A tile without and with splits of k, those that leave a k tile for each part."""
    return [
        c,
        *(
            Config("split_k", c.bm, c.bn, c.bk, s, c.warps, c.stages)
            for s in SPLITS
            if s <= p.k // c.bk
        ),
    ]


def menu(p: Problem, legal: Callable[[Problem, Config], str | None]) -> list[Config]:
    """Every configuration worth timing, the most promising first and the library's product last;
    KernelError when none is legal."""
    tiles = [Config("gemm", *t[:3], 1, *t[3:]) for t in TILES]
    suited = [c for c in tiles if p.grouped or c.bm < 2 * max(p.bucket, 16)]
    listed = [d for c in suited for d in (splits(p, c) if c.bm <= FEW else [c])]
    allowed = [c for c in listed if legal(p, c) is None]
    library = [LIBRARY] if legal(p, LIBRARY) is None else []
    if not allowed and not library:
        raise KernelError(legal(p, LIBRARY) or f"no configuration computes {p}")
    return sorted(allowed, key=lambda c: waste(p, c)) + library


def waste(p: Problem, c: Config) -> tuple[float, ...]:
    """How far a tile is from the expected best: no padded tokens; of few tokens about four programs
    per multiprocessor and wide rows of W, of many the fewest bytes read for a result."""
    assert not isinstance(p.cc, str)
    tokens = round_up(max(ceil(p.rows), 1), c.bm)
    if p.rows > FEW:
        return tokens, 1 / c.bm + 1 / c.bn, c.stages
    programs = p.reached * (tokens // c.bm) * ceil(p.n / c.bn) * c.split
    excess = programs / (4 * SMS[p.cc]) - 1
    return tokens, tokens // c.bm, abs(excess) if excess < 0 else excess / 4, -c.bn, c.stages


def weight_bytes(p: Problem) -> float:
    """Bytes of the codes of weights that are read; their scales are few."""
    return p.reached * p.n * p.k


def moved(p: Problem) -> float:
    """Bytes that any kernel must move: codes of weights and of x once, y in 16 bits once."""
    return weight_bytes(p) + p.m * p.k + 2.0 * p.m * p.n
