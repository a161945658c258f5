"""The quantized value: W ~ (codes - zeros) * scales, a plain immutable dataclass and pytree."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.spec import Float, Spec
from qlab.errors import QlabError


@dataclass(frozen=True)
class QTensor:
    """W[..., o, k] ~ (codes - zeros) * scales, one scale per tile of `spec.tile`; with outer: codes
    * (scales / outer).

    codes: [..., o, k] in spec.code_dtype: signed int8, or an 8-bit float that holds the value
    itself.
    scales: float [..., a, g]; they may be negative (signed full range). zeros: [..., a, g] in
    spec.zero_dtype, or None when the spec is symmetric. outer: fp32 [..., 1], the global scale of
    NVFP4, which scales are divided by, or None. perm: int64 [k], or None. Column j of codes is
    input channel perm[j]: the order in which channels share groups in formats with g_idx.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: Spec
    outer: Tensor | None = None
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.codes, Tensor):  # pytree maps may carry anything
            return
        expected = self.spec.tile.scales_shape(self.codes.shape)
        if tuple(self.scales.shape) != expected:
            raise QlabError(
                f"codes {tuple(self.codes.shape)} at {self.spec} need scales {expected}, "
                f"not {tuple(self.scales.shape)}"
            )
        if self.codes.dtype != self.spec.code_dtype:
            raise QlabError(
                f"codes of {self.spec} are {self.spec.code_dtype}, not {self.codes.dtype}"
            )
        if (self.zeros is None) != self.spec.symmetric:
            raise QlabError(
                f"{self.spec} has {'no' if self.spec.symmetric else 'a'} zero point per scale"
            )
        if (self.outer is None) == self.spec.outer:
            raise QlabError(
                f"{self.spec} has {'one' if self.spec.outer else 'no'} outer scale per weight"
            )
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise QlabError(
                f"zeros {tuple(self.zeros.shape)} and scales {tuple(self.scales.shape)} differ in "
                "shape"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape


Leaf = Tensor | QTensor
Params = Mapping[str, Leaf]


def steps(scales: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What one unit of the codes weighs, [..., a, g] in `dtype`: scales, or scales / outer."""
    return scales.to(dtype) if outer is None else scales.to(dtype) / outer.to(dtype)[..., None]


def shared_outer(weights: Iterable[Tensor], spec: Spec) -> Tensor | None:
    """The outer scale [..., 1] that weights [..., o, k] have in common, or None where the spec has
    no such scale."""
    if not (isinstance(spec, Float) and spec.outer):
        return None
    return spec.global_scale(torch.stack([W.abs().amax((-2, -1)) for W in weights]).amax(0))


def by_rows(leaf: QTensor) -> QTensor:
    """The same numbers, with scales for every row by itself where one covers several."""
    rows, tile = leaf.shape[-2], leaf.spec.tile

    def spread(t: Tensor) -> Tensor:
        return t.repeat_interleave(tile.rows or rows, -2)[..., :rows, :]

    return replace(
        leaf,
        scales=spread(leaf.scales),
        zeros=None if leaf.zeros is None else spread(leaf.zeros),
        spec=replace(leaf.spec, tile=replace(tile, rows=1)),
    )


def round_codes(
    W_ok: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec, outer: Tensor | None = None
) -> Tensor:
    """codes = the nearest to W / scales + zeros (or W / (scales / outer)) in the dtype of W, [...,
    o, k] in spec.code_dtype."""
    x = spec.tile.split(W_ok) / steps(scales, outer, W_ok.dtype)[..., None]
    if zeros is not None:
        x = x + zeros.to(x.dtype)[..., None]
    return spec.tile.join(spec.nearest_(x), W_ok.shape).to(spec.code_dtype)


def dense(leaf: Leaf, dtype: torch.dtype | None = None) -> Tensor:
    """(codes - zeros) * scales computed in `dtype` (default: the scales', or fp32 where those have
    8 bits), or the plain tensor in `dtype`."""
    if isinstance(leaf, Tensor):
        return leaf if dtype is None else leaf.to(dtype)
    dtype = dtype or (leaf.scales.dtype if leaf.scales.dtype.itemsize > 1 else torch.float32)
    x = leaf.spec.tile.split(leaf.codes.to(dtype))
    if leaf.zeros is not None:
        x = x - leaf.zeros.to(dtype)[..., None]
    x = x * steps(leaf.scales, leaf.outer, dtype)[..., None]
    W_ok = leaf.spec.tile.join(x, leaf.shape)
    return W_ok if leaf.perm is None else W_ok[..., leaf.perm.argsort()]


def nbytes(leaf: Leaf) -> int:
    """Bytes a leaf takes in memory."""
    parts = (
        [leaf]
        if isinstance(leaf, Tensor)
        else [leaf.codes, leaf.scales, leaf.zeros, leaf.outer, leaf.perm]
    )
    return sum(t.numel() * t.itemsize for t in parts if t is not None)


pytree.register_pytree_node(
    QTensor,
    lambda q: ([q.codes, q.scales, q.zeros, q.outer, q.perm], q.spec),
    lambda parts, spec: QTensor(*parts[:3], spec, *parts[3:]),  # type: ignore
)


def largest_step(leaf: QTensor, D_ok: Tensor) -> float:
    """max |D| / |scale| of an error D = W' - W: at most 0.5 for a weight that was rounded to the
    nearest integer unclipped. No error at a scale of 0 is none."""
    low, high = leaf.spec.tile.split(D_ok).aminmax(dim=-1)
    return float(
        (torch.maximum(-low, high) / steps(leaf.scales, leaf.outer, torch.float32).abs())
        .nan_to_num(0.0)
        .max()
    )
