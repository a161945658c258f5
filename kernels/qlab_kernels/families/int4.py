"""int4 weights and 16-bit activations: the operators, the configurations worth timing, and the one
that runs when nothing was timed."""

from dataclasses import replace
from math import ceil

from qlab_kernels.capability import KernelError
from qlab_kernels.families.int4_legal import FMA_TOKENS, legal
from qlab_kernels.layout import ATOM, REVISION, padded_group, round_up
from qlab_kernels.problem import Config, Family, Problem

# above, the heuristic dequantizes and calls the library: the crossover expected on the published
# tables
DENSE_TOKENS = 256
MULTIPROCESSORS = {
    (8, 0): 108,
    (8, 6): 84,
    (8, 7): 16,
    (8, 9): 128,
    (9, 0): 132,
    (10, 0): 148,
    (12, 0): 170,
}


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
    return min(fused, key=lambda c: waste(p, c))


def waste(p: Problem, c: Config) -> tuple[float, ...]:
    """How far a tile is from the expected best: no padded tokens, about four programs per
    multiprocessor, wide rows of W."""
    assert not isinstance(p.cc, str)
    tokens = round_up(max(ceil(p.rows), 1), c.bm)
    programs = p.reached * (tokens // c.bm) * (round_up(p.n, ATOM) // c.bn) * c.split
    programs_expected = MULTIPROCESSORS[p.cc] * (4 if c.bm <= 32 else 1)
    excess = programs / programs_expected - 1
    return (
        tokens // c.bm,
        tokens,
        abs(excess) if excess < 0 else excess / 4,
        -c.bn,
        c.stages,
    )


def weight_bytes(p: Problem) -> float:
    """Bytes of packed codes, scales and zeros, of the experts that are reached."""
    k, group = padded_group(p.k, p.group)
    return p.reached * p.n * k * (0.5 + (4 if p.zeros else 2) / group)


def true_bytes(p: Problem) -> float:
    """Bytes that any int4 kernel must move: weights once, x once, y once."""
    return weight_bytes(p) + 2.0 * p.m * (p.k + p.n)


FAMILY = Family(
    name="int4",
    operators=("int4_mm", "int4_grouped_mm", "int4_linear_cpu", "int4_linear_cpu_beside_dense"),
    sources=("tile", "device", "int4_mm", "grouped", "fma", "dequantize"),
    layouts=REVISION,
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=true_bytes,
)
