"""Weights and specs that hypothesis draws."""

import torch
from hypothesis import strategies as st
from segments import normal

from qlab.algebra.spec import Int, Tile

KINDS = (
    "normal",
    "positive",
    "negative",
    "outlier",
    "constant",
    "zeros",
    "some zero groups",
    "offset",
)


def weight(o, k, seed, kind="normal"):
    """A weight [o, k] of one of KINDS."""
    W = normal(o, k, seed=seed)
    if kind == "positive":
        return W.abs() + 0.1
    if kind == "negative":
        return -W.abs() - 0.1
    if kind == "outlier":
        return W.masked_fill(
            torch.rand(o, k, generator=torch.Generator().manual_seed(seed)) < 0.03, 20.0
        )
    if kind == "constant":
        return torch.full((o, k), float(W[0, 0]))
    if kind == "zeros":
        return torch.zeros(o, k)
    if kind == "some zero groups":
        return W * (torch.arange(k) >= k // 2)
    return W + 3 if kind == "offset" else W


@st.composite
def problems(draw, symmetric=None, scale_dtype=torch.float32, kinds=KINDS, blocks=True):
    """(W_ok, spec): shapes, bits, zero points and every kind of tile."""
    symmetric = draw(st.booleans()) if symmetric is None else symmetric
    group = draw(st.sampled_from([1, 4, 16]))
    o, k = 2 * draw(st.integers(1, 6)), group * draw(st.integers(1, 6))
    tiles = [Tile(None, None), Tile(1, None), Tile(1, group)] + ([Tile(2, group)] if blocks else [])
    spec = Int(draw(st.integers(2, 8)), draw(st.sampled_from(tiles)), symmetric, scale_dtype)
    return weight(o, k, draw(st.integers(0, 999)), draw(st.sampled_from(kinds))), spec
