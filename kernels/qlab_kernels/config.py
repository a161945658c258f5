"""What is multiplied (`Problem`), how (`Config`), and which configurations are allowed; pure
Python, no device is asked.

Names: y[m, n] = x[m, k] @ W[n, k].T; a program computes a tile of bm tokens x bn rows of W in steps
of bk along k.
"""

import ast
import hashlib
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from pathlib import Path
from typing import Literal

import torch

from qlab_kernels.capability import KIB, Capability, KernelError, admit
from qlab_kernels.layout import ATOM, REVISION, padded_group, round_up

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUPED_BUCKETS = (*BUCKETS, 8192, 16384, 32768, 65536)  # of the rows of all experts
FMA_TOKENS = 8  # above, 7.5 dequantizes and calls the library
# above, the heuristic dequantizes and calls the library: the crossover expected on the published
# tables
DENSE_TOKENS = 256
_SMS = {(8, 0): 108, (8, 6): 84, (8, 7): 16, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

OPERATORS = ("int4_mm", "int4_grouped_mm", "int4_linear_cpu", "int4_linear_cpu_beside_dense")
Kind = Literal["split_k", "gemm", "dequant", "fma", "int4pack", "dense"]


@dataclass(frozen=True)
class Problem:
    """One product to configure. n, k are the true sizes; group >= k means one scale per row. device
    is a name, for the cache.

    op: one of OPERATORS; cc of the last two is "cpu-<isa>". "int4_grouped_mm" multiplies by one of
    `experts` weights [n, k] each, and its m counts the rows of all of them: a token is one row for
    each of its experts.
    """

    op: str
    cc: Capability | str
    device: str
    dtype: str
    group: int
    zeros: bool
    n: int
    k: int
    m: int
    experts: int = 1

    @property
    def bucket(self) -> int:
        """m rounded up to the sizes that are tuned; larger m counts as the largest."""
        sizes = GROUPED_BUCKETS if self.op == "int4_grouped_mm" else BUCKETS
        return next((b for b in sizes if b >= self.m), sizes[-1])

    @property
    def reached(self) -> float:
        """How many weights are read."""
        return reached(self.m, self.experts)

    @property
    def rows(self) -> float:
        """How many rows of x a weight that is read multiplies, on average."""
        return rows_each(self.m, self.experts)


def reached(m: int, experts: int) -> float:
    """How many of e experts m rows reach where each is as likely: e (1 - (1 - 1/e)^m)."""
    return experts * (1 - (1 - 1 / experts) ** max(m, 1))


def rows_each(m: int, experts: int) -> float:
    """Rows of an expert that has any."""
    return m / reached(m, experts)


@dataclass(frozen=True)
class Config:
    """How one product is computed.

    kind: "split_k" writes `split` fp32 partial products that torch sums; "gemm" is the same kernel
    without the split; "fma" multiplies on the CUDA cores; "dequant" dequantizes and calls the
    library. On a CPU: "int4pack" and "dense".
    scale_on: what the group's scale multiplies, the fp32 "accumulator" after each k tile or the
    16-bit "weight".
    """

    kind: Kind
    bm: int = 0
    bn: int = 0
    bk: int = 0
    split: int = 1
    warps: int = 4
    stages: int = 1
    scale_on: Literal["accumulator", "weight"] = "accumulator"


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    if isinstance(p.cc, str):
        return _legal_cpu(p, c)
    if p.op not in ("int4_mm", "int4_grouped_mm"):
        return (
            f"no operator {p.op!r}: there are int4_mm, int4_grouped_mm and, on a CPU, "
            "int4_linear_cpu"
        )
    try:
        row = admit(p.cc, _DTYPES.get(p.dtype, torch.float32))
        k_pad, group = padded_group(p.k, p.group)
    except KernelError as refusal:
        return str(refusal)
    if p.op == "int4_grouped_mm" and (row.path != "fused" or c.kind != "gemm"):
        return (
            "int4_grouped_mm has the one kind gemm, for compute capability 8.0 and newer: "
            "elsewhere multiply expert by expert"
        )
    if c.kind == "dequant":
        return None
    kinds = {"fused": ("split_k", "gemm"), "fma": ("fma",), "dequantize": ()}[row.path]
    if c.kind not in kinds:
        return (
            f"compute capability {p.cc[0]}.{p.cc[1]} runs {', '.join((*kinds, 'dequant'))}, not "
            f"{c.kind}"
        )
    n_pad = round_up(p.n, ATOM)
    return (
        _legal_fma(p, c, n_pad, k_pad)
        if c.kind == "fma"
        else _legal_tile(p, c, n_pad, k_pad, group, row.smem)
    )


def _legal_cpu(p: Problem, c: Config) -> str | None:
    if c.kind == "dense":
        return None
    if c.kind != "int4pack":
        return f"a CPU runs int4pack and dense, not {c.kind}"
    if p.dtype != "bfloat16":
        return f"int4pack multiplies bfloat16 activations, not {p.dtype}: cast them, or use dense"
    if p.n % 16 or p.k % p.group or p.group not in (32, 64, 128, 256):
        return (
            f"int4pack needs n % 16 == 0 and k % group == 0 with groups 32..256, not n={p.n}, "
            f"k={p.k}, group={p.group}"
        )
    return None


def _legal_fma(p: Problem, c: Config, n_pad: int, k_pad: int) -> str | None:
    if p.m > c.bm:
        return (
            f"fma computes all {p.m} tokens in one tile, but bm={c.bm}: take a larger one up to "
            f"{FMA_TOKENS}, or dequant"
        )
    if c.bm not in (1, 2, 4, 8) or c.bn not in (8, 16, 32, 64) or c.bk not in (64, 128, 256, 512):
        return f"fma has bm 1..8, bn 8..64 and bk 64..512, powers of two, not {c.bm}x{c.bn}x{c.bk}"
    if n_pad % c.bn or k_pad % c.bk:
        return f"tiles of {c.bn}x{c.bk} do not divide the padded weight {n_pad}x{k_pad}"
    return "fma does not split k: split=1" if c.split != 1 else None


def _legal_tile(p: Problem, c: Config, n_pad: int, k_pad: int, group: int, smem: int) -> str | None:
    return (
        _legal_sizes(p, c)
        or _legal_division(c, n_pad, k_pad)
        or _legal_groups(c, group)
        or _legal_split(c, k_pad // c.bk)
        or _legal_resources(p, c, smem)
    )


def _legal_sizes(p: Problem, c: Config) -> str | None:
    # Smaller tiles leave wgmma for mma.sync, whose fragments are ordered otherwise.
    least = 16 if p.cc == (9, 0) else 8
    if c.bm not in (8, 16, 32, 64, 128, 256) or c.bm < least:
        return f"bm is a power of two in {least}..256, not {c.bm}"
    tile = c.bn in (64, 128, 256) and c.bk in (64, 128, 256)
    if not tile or c.warps not in (4, 8) or not 1 <= c.stages <= 6:
        return (
            f"bn and bk are 64, 128 or 256, warps 4 or 8, stages 1..6, not {c.bn}, {c.bk}, "
            f"{c.warps}, {c.stages}"
        )
    return None


def _legal_division(c: Config, n_pad: int, k_pad: int) -> str | None:
    if n_pad % c.bn or k_pad % c.bk:
        return (
            f"tiles of {c.bn}x{c.bk} do not divide the padded weight {n_pad}x{k_pad}: the rest "
            "would be dropped"
        )
    if c.bn < 16 * c.warps:
        return (
            f"{c.warps} warps need bn >= {16 * c.warps}, not {c.bn}: each owns 16 rows, and "
            "others would dequantize them again"
        )
    return None


def _legal_groups(c: Config, group: int) -> str | None:
    if c.scale_on == "accumulator" and group % c.bk:
        return (
            f"a k tile of {c.bk} straddles groups of {group}: scale the weight, or take bk <= "
            f"{group}"
        )
    if c.scale_on == "weight" and group % c.bk and c.bk % group:
        return f"k tiles of {c.bk} and groups of {group} do not nest"
    return None


def _legal_split(c: Config, tiles: int) -> str | None:
    fewest, most = (1, 1) if c.kind == "gemm" else (2, tiles)
    if fewest <= c.split <= most:
        return None
    return (
        f"split {c.split} does not suit {c.kind} over {tiles} k tiles: gemm has 1, split_k "
        f"2..{tiles}"
    )


def _legal_resources(p: Problem, c: Config, smem: int) -> str | None:
    need = shared_bytes(p, c)
    if need > smem:
        return (
            f"{c.stages} stages of {c.bm}x{c.bn}x{c.bk} take {need} bytes of shared memory, and "
            f"{p.cc} has {smem}"
        )
    accumulators = registers(c)
    if accumulators > 128:
        return (
            f"{c.bm}x{c.bn} over {c.warps} warps holds {accumulators} accumulators per thread: it "
            "would spill past 128"
        )
    return None


def shared_bytes(p: Problem, c: Config) -> int:
    """Shared memory of a tensor-core tile, at most: all stages of packed W, x, scales and zeros, or
    what the store passes through."""
    stage = (
        c.bn * c.bk // 2
        + 2 * c.bm * c.bk
        + 4 * c.bn * max(1, c.bk // p.group) * (2 if p.zeros else 1)
    )
    return max(c.stages * stage, min(4 * c.bn * c.bm, 64 * KIB))


def registers(c: Config) -> int:
    """fp32 accumulators per thread; scaling the accumulator keeps the unscaled product beside
    it."""
    return c.bn * c.bm // (32 * c.warps) * (2 if c.scale_on == "accumulator" else 1)


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing for `p`, all legal; at least one, or KernelError saying why
    there is none."""
    on_cpu = isinstance(p.cc, str)
    menu = (
        [Config("int4pack"), Config("dense")]
        if on_cpu
        else [Config("dequant"), *_fma_menu(p), *_tile_menu(p)]
    )
    allowed = [c for c in menu if legal(p, c) is None]
    if not allowed:
        raise KernelError(legal(p, Config("dequant")) or f"no configuration computes {p}")
    return allowed


def _fma_menu(p: Problem) -> list[Config]:
    bm = min(p.bucket, FMA_TOKENS)
    if padded_group(p.k, p.group)[0] % 128:
        return [Config("fma", bm, 16, 64)]
    return [
        Config("fma", bm, bn, bk)
        for bn, bk in ((8, 256), (16, 128), *([(16, 256)] if bm < 8 else []))
    ]


def _tile_menu(p: Problem) -> list[Config]:
    """Small tiles with several splits for few tokens, and larger tiles for more tokens, where small
    ones would read the weights too often."""
    if p.op == "int4_grouped_mm":  # The router decides how many rows each expert gets.
        return _tiles(p)
    menu = []
    k_pad = padded_group(p.k, p.group)[0]
    for c in _tiles(p):
        tokens = round_up(max(p.m, 1), c.bm) // c.bm
        if (c.bm > 16 and p.bucket <= c.bm // 2) or tokens > max(1, c.bm // 8):
            continue
        splits = sorted(
            {min(s, max(1, k_pad // c.bk)) for s in ((1, 2, 4, 8, 16) if c.bm <= 64 else (1,))}
        )
        menu += [replace(c, kind="gemm" if s == 1 else "split_k", split=s) for s in splits]
    return menu


def _tiles(p: Problem) -> list[Config]:
    """The tiles that compile without spills; k tiles as wide as pays, scales on the accumulator of
    small tiles where groups allow."""
    k_pad, group = padded_group(p.k, p.group)
    bk = 64 if k_pad % 128 else 128
    small = [
        (16, 64, bk, 4, 3),
        (16, 64, bk, 4, 4),
        (16, 64, bk, 4, 5),
        (16, 128, bk, 4, 3),
        (16, 128, bk, 4, 4),
        (32, 128, bk, 4, 3),
    ]
    # tcgen05 works in 128 rows: 64 of them cost 3.6 instructions per weight.
    if p.cc == (10, 0) and round_up(p.n, ATOM) % 128 == 0:
        small = [t for t in small if t[1] > 64]
    large = [
        (64, 128, 64, 4, 3),
        (64, 128, 64, 4, 4),
        (64, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
    ]
    if group % 256 == 0:
        small += [] if p.cc == (10, 0) else [(16, 64, 256, 4, 3)]
        small += [(16, 128, 256, 4, 3)] if p.cc == (9, 0) or not p.zeros else []
    # wgmma spreads the accumulator over all warps; mma.sync tiles of these sizes spill or exchange
    # weights.
    if p.cc == (9, 0):
        small += [(32, 64, bk, 4, 4)]
        large += [(64, 128, 128, 4, 3), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3)]
        # Products follow each other where the accumulator of a wgmma is not scaled between them.
        if group % 128 == 0 and bk == 128:
            small += [
                (16, 128, 128, 8, 3),
                (32, 128, 128, 8, 3),
                (64, 128, 128, 4, 3),
                (64, 128, 128, 8, 3),
                (64, 256, 128, 8, 3),
            ]
            small += [(128, 128, 128, 8, 3)]
    on_accumulator = [
        Config("gemm", *t[:3], 1, *t[3:], "accumulator" if group % t[2] == 0 else "weight")
        for t in small
    ]
    return on_accumulator + [Config("gemm", *t[:3], 1, *t[3:], "weight") for t in large]


def heuristic(p: Problem) -> Config:
    """A configuration from the shape alone: what runs when nothing was tuned. KernelError when none
    is legal."""
    allowed = candidates(p)
    if isinstance(p.cc, str):
        return allowed[0] if p.m <= 4 else allowed[-1]
    dense = [c for c in allowed if c.kind == "dequant"]
    fused = [c for c in allowed if c.kind != "dequant"]
    if dense and (p.m > DENSE_TOKENS or not fused):
        return dense[0]
    if fused[0].kind == "fma":
        return min(fused, key=lambda c: (abs(c.bn - 16), abs(c.bk - 256)))
    return min(fused, key=lambda c: _waste(p, c))


def _waste(p: Problem, c: Config) -> tuple[float, ...]:
    """How far a tile is from the expected best: no padded tokens, about four programs per
    multiprocessor, wide rows of W."""
    assert not isinstance(p.cc, str)
    tokens = round_up(max(ceil(p.rows), 1), c.bm)
    programs = p.reached * (tokens // c.bm) * (round_up(p.n, ATOM) // c.bn) * c.split
    programs_expected = _SMS[p.cc] * (4 if c.bm <= 32 else 1)
    excess = programs / programs_expected - 1
    return (
        tokens // c.bm,
        tokens,
        abs(excess) if excess < 0 else excess / 4,
        -c.bn,
        c.stages,
    )


@cache
def kernel_revision() -> str:
    """12 hex digits over the kernels' syntax and the layouts' names: a cached time belongs to one
    of them.

    Line breaks and comments play no part: what is reformatted keeps its times.
    """
    digest = hashlib.sha256(REVISION.encode())
    for name in ("tile", "device", "int4_mm", "grouped", "fma", "dequantize"):
        source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        digest.update(ast.unparse(ast.parse(source)).encode())
    return digest.hexdigest()[:12]
