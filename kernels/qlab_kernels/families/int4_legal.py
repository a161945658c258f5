"""Which configurations compute a product of int4 weights correctly and fit the device."""

import torch

from qlab_kernels.capability import KIB, KernelError, admit
from qlab_kernels.layout import ATOM, padded_group, round_up
from qlab_kernels.problem import Config, Problem

FMA_TOKENS = 8  # above, 7.5 dequantizes and calls the library
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    if isinstance(p.cc, str):
        return _legal_cpu(p, c)
    if p.op not in ("int4_mm", "int4_grouped_mm"):
        return f"{p.op} runs on a CPU, not on compute capability {p.cc[0]}.{p.cc[1]}"
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
