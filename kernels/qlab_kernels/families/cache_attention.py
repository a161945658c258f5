"""Attention over a quantized cache: the configurations worth timing, and the one that runs when
nothing was timed.

Of a problem m are the query rows that share a head of keys, n the positions, k the channels of a
head, and experts the sequences times heads of keys. A program takes bm query rows and every
split-th part of the positions, bn at a time.
"""

from math import ceil

from qlab_kernels.capability import KIB, Capability, KernelError, target
from qlab_kernels.families.int4 import MULTIPROCESSORS
from qlab_kernels.problem import Config, Family, Problem

OPERATORS = {"int8": "int8_attention", "fp8": "fp8_attention", "int4": "int4_attention"}
BITS = {operator: 4 if name == "int4" else 8 for name, operator in OPERATORS.items()}
LEAST = 16  # rows and channels that tensor cores multiply
MOST_SPLITS = 64
LARGEST_HEAD = 512
MOST_SUMS = 64  # of a thread, in registers
REGISTERS = 192  # of a thread at most; with those of three blocks the assembler spills a few
PROGRAMS = 2  # for each multiprocessor, that one waits while another computes


def padded(width: int) -> int:
    """Channels that a program has for so many."""
    return max(LEAST, 1 << (width - 1).bit_length())


def positions_tuned(n: int) -> int:
    """Positions rounded up to a power of two: what is tuned holds for all of them."""
    return 1 << max(n - 1, 0).bit_length()


def refusal(cc: Capability, dtype: str, channels: int) -> str | None:
    """Why no kernel attends with queries of a dtype over heads of so many channels, or None."""
    name = f"compute capability {cc[0]}.{cc[1]}"
    try:
        row = target(cc)
    except KernelError as error:
        return str(error)
    able = [str(kind).removeprefix("torch.") for kind in row.dtypes]
    if row.path != "fused":
        return f"{name} has no tensor cores in Triton, which attention multiplies on"
    if dtype not in able:
        return f"{name} has kernels for {' and '.join(able)} queries, not {dtype}"
    if channels > LARGEST_HEAD:
        return f"heads of {channels} channels have more than {LARGEST_HEAD}"
    return None


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` and fits the device."""
    if isinstance(p.cc, str):
        return "a CPU attends over numbers, a part of the positions at a time"
    reason = refusal(p.cc, p.dtype, p.k)
    if reason:
        return reason
    if c.kind != "split_k" or c.bm not in (16, 32, 64) or c.bn not in (16, 32, 64, 128):
        return f"split_k with bm 16 to 64 and bn 16 to 128, not {c.kind} with {c.bm} and {c.bn}"
    if c.warps not in (4, 8) or not 1 <= c.stages <= 4 or not 1 <= c.split <= MOST_SPLITS:
        return (
            f"warps 4 or 8, stages 1 to 4, split 1 to {MOST_SPLITS}, not {c.warps}, {c.stages}, "
            f"{c.split}"
        )
    if p.group < p.k and c.stages > 1:
        return "scales of groups of channels are not copied ahead: stages=1"
    need, smem = shared_bytes(p, c), target(p.cc).smem
    if need > smem:
        return f"{c.stages} stages of {c.bn} positions take {need} bytes, and {p.cc} has {smem}"
    if c.bm * padded(p.k) // (32 * c.warps) > MOST_SUMS:
        return f"{c.bm} rows of {p.k} channels over {c.warps} warps would spill"
    return None


def shared_bytes(p: Problem, c: Config) -> int:
    """Shared memory at most: all stages of codes with their scales, queries, and one exchange of
    keys and values in 16 bits."""
    row = padded(-(-p.k // 2)) if BITS[p.op] == 4 else padded(p.k)
    return c.stages * c.bn * 2 * (row + 8) + 2 * c.bm * padded(p.k) + 2 * KIB


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing; KernelError saying why there is none."""
    if isinstance(p.cc, str):
        raise KernelError("a CPU attends over numbers, a part of the positions at a time")
    fitting = [rows for rows in (16, 32, 64) if rows * padded(p.k) <= MOST_SUMS * 128]
    bm = next((rows for rows in fitting if rows >= p.m), fitting[-1] if fitting else 16)
    stages = (1,) if p.group < p.k else (3, 2)
    splits = _splits(p, bm)
    tiles = [(bn, n) for n in stages for bn in (64, 128, 32)]
    menu = [Config("split_k", bm, bn, 0, split, 4, n) for split in splits for bn, n in tiles]
    menu += [Config("split_k", bm, 64, 0, splits[0], 8, n) for n in stages]
    allowed = [c for c in menu if legal(p, c) is None]
    if not allowed:
        raise KernelError(legal(p, menu[0]) or f"no configuration computes {p}")
    return allowed


def _splits(p: Problem, bm: int) -> list[int]:
    """As many parts as fill the multiprocessors, and half and twice as many; a part has 64
    positions at least."""
    assert not isinstance(p.cc, str)
    programs = p.experts * ceil(p.m / bm)
    filling = ceil(PROGRAMS * MULTIPROCESSORS.get(p.cc, 128) / max(programs, 1))
    most = min(MOST_SPLITS, max(1, p.n // 64))
    return list(dict.fromkeys(min(max(s, 1), most) for s in (filling, filling // 2, 2 * filling)))


def heuristic(p: Problem) -> Config:
    """The first candidate: 64 positions at a time, and enough parts to fill the device."""
    return candidates(p)[0]


def moved(p: Problem) -> float:
    """Bytes of codes, scales, queries and results."""
    zeros = 5 if p.zeros else 4
    of_cache = 2 * p.experts * p.n * (p.k * BITS[p.op] / 8 + zeros * p.k / p.group)
    return of_cache + 4.0 * p.experts * p.m * p.k


FAMILY = Family(
    name="cache_attention",
    operators=tuple(OPERATORS.values()),
    sources=("cache_attention", "attend", "cached"),
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=moved,
)
