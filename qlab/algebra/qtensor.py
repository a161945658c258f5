"""A quantized weight: W ~ (codes - zeros) * scales, an immutable dataclass and a pytree.

Legend: W_ok a weight of o output and k input channels; [a, g] its scales, a tiles down and g tiles
across (`qlab.algebra.tile`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.e4m3 import numbers
from qlab.algebra.leaf import dense as dense
from qlab.algebra.spec import Float, Int, Spec
from qlab.errors import QlabError

IN_CACHE = 1 << 18  # numbers of a weight that are worked on at once, few enough to stay there


@dataclass(frozen=True)
class QTensor:
    """W[..., o, k] ~ (codes - zeros) * scales, or codes * (scales / outer) where there is an outer
    scale.

    Args:
        codes: [..., o, k] in spec.code_dtype, which is int8, or an 8-bit float that holds values.
        scales: float [..., a, g], one per tile; they may be negative.
        zeros: [..., a, g] in spec.zero_dtype, None for a symmetric spec.
        spec: the grid that the codes belong to.
        outer: fp32 [..., 1], the global scale of NVFP4, or None.
        perm: int64 [k] or None; column j of codes is input channel perm[j]. Formats with g_idx need
            it, whose groups hold channels in an order of their own.

    Raises:
        QlabError: the parts do not fit each other or the spec, in shape or dtype.

    Example:
        >>> import qlab, torch
        >>> codes = torch.tensor([[1, -2, 0, 3]], dtype=torch.int8)
        >>> scales = torch.tensor([[0.5, 2.0]])
        >>> leaf = qlab.QTensor(codes, scales, None, qlab.parse_spec("int4-g2"))
        >>> leaf.dense()
        tensor([[ 0.5000, -1.0000,  0.0000,  6.0000]])
        >>> leaf.at(torch.tensor([[0.6, -1.0, 0.0, 5.0]]))
        tensor([[ 1.2000, -2.0000,  0.0000,  2.5000]])
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: Spec
    outer: Tensor | None = None
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.codes, Tensor):  # a pytree map may put anything in its place
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

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """(codes - zeros) * scales, computed in the dtype: by default that of the scales, and fp32
        for scales of 8 bits."""
        dtype = dtype or (self.scales.dtype if self.scales.dtype.itemsize > 1 else torch.float32)
        x = self.spec.tile.split(numbers(self.codes, dtype))
        if self.zeros is not None:
            x = x - self.zeros.to(dtype)[..., None]
        x = x * steps(self.scales, self.outer, dtype)[..., None]
        return self._laid(self.spec.tile.join(x, self.shape))

    def at(self, W_ok: Tensor) -> Tensor:
        """Where weights [..., o, k] lie among the codes, in fp32: W / scales + zeros, unrounded."""
        W_ok = W_ok if self.perm is None else W_ok[..., self.perm]
        step = steps(self.scales, self.outer, torch.float32)
        x = self.spec.tile.split(W_ok.float()) / step[..., None]
        x = x if self.zeros is None else x + self.zeros.float()[..., None]
        return self._laid(self.spec.tile.join(x, self.shape))

    def with_codes(self, x: Tensor) -> "QTensor":
        """The same scales with other codes: the nearest ones that the grid has, of numbers
        [..., o, k] as `at` gives them."""
        x = x if self.perm is None else x[..., self.perm]
        codes = self.spec.nearest_(x.float().clone()).to(self.spec.code_dtype)
        return replace(self, codes=codes)

    def rows(self, rows: slice, tiles: slice) -> "QTensor":
        """Some rows of a leaf [o, k], and the rows of its scales, as `Tile.parts` gives them."""
        zeros = None if self.zeros is None else self.zeros[tiles]
        return replace(self, codes=self.codes[rows], scales=self.scales[tiles], zeros=zeros)

    def _laid(self, columns: Tensor) -> Tensor:
        """Columns of codes [..., o, k] in the order of the input channels."""
        return columns if self.perm is None else columns[..., self.perm.argsort()]

    def bits(self) -> float:
        """Those of codes, scales and zero points, as formats store them."""
        return self.spec.bits_per_weight(self.shape, self.scales.dtype) * self.codes.numel()


Leaf = Tensor | QTensor  # as files hold it
Params = Mapping[str, Any]  # path -> any leaf: a tensor, a QTensor or another `leaf.Structured`


def steps(scales: Tensor, outer: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The step from one code to the next, [..., a, g] in `dtype`: scales, or scales / outer."""
    return scales.to(dtype) if outer is None else scales.to(dtype) / outer.to(dtype)[..., None]


def shared_outer(weights: Iterable[Tensor], spec: Spec) -> Tensor | None:
    """The outer scale [..., 1] that several weights [..., o, k] share, or None where the spec has
    no outer scale."""
    if not (isinstance(spec, Float) and spec.outer):
        return None
    largest = [W.abs().amax((-2, -1)) for W in weights]
    return spec.global_scale(torch.stack(largest).amax(0))


def joined_rows(parts: Sequence[QTensor]) -> QTensor:
    """The leaf [o, k] whose rows are those of its parts, of one outer scale: what `QTensor.rows`
    takes apart."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def by_rows(leaf: QTensor) -> QTensor:
    """The same numbers with scales for each row, also where one scale covered several rows."""
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
    """codes = round(W / scales + zeros), or round(W / (scales / outer)): [..., o, k] in
    spec.code_dtype, computed in the dtype of W."""
    if W_ok.ndim == 2 and W_ok.numel() > IN_CACHE and spec.tile.rows is not None:
        codes = torch.empty(W_ok.shape, dtype=spec.code_dtype, device=W_ok.device)
        for rows, tiles in spec.tile.parts(W_ok.shape, IN_CACHE):
            z_ag = None if zeros is None else zeros[tiles]
            codes[rows] = _rounded(W_ok[rows], scales[tiles], z_ag, spec, outer)
        return codes
    return _rounded(W_ok, scales, zeros, spec, outer)


def _rounded(
    W_ok: Tensor, scales: Tensor, zeros: Tensor | None, spec: Spec, outer: Tensor | None
) -> Tensor:
    """`round_codes` of all rows at once."""
    x = spec.tile.split(W_ok) / steps(scales, outer, W_ok.dtype)[..., None]
    if zeros is not None:
        x.add_(zeros.to(x.dtype)[..., None])
    return spec.tile.join(spec.nearest_(x), W_ok.shape).to(spec.code_dtype)


pytree.register_pytree_node(
    QTensor,
    lambda q: ([q.codes, q.scales, q.zeros, q.outer, q.perm], q.spec),
    lambda parts, spec: QTensor(*parts[:3], spec, *parts[3:]),  # type: ignore
)


def largest_step(leaf: QTensor, D_ok: Tensor) -> float:
    """max |D| / |scale| over an error D = W' - W: at most 0.5 for integer codes that are the
    nearest and were not clipped."""
    D = leaf.spec.tile.split(D_ok)
    # two passes, each many times as fast as aminmax along an axis
    error_ag = torch.maximum(-D.amin(-1), D.amax(-1))
    error_in_steps = error_ag / steps(leaf.scales, leaf.outer, torch.float32).abs()
    return float(error_in_steps.nan_to_num(0.0).max())  # 0 / 0 where the scale is 0


def off_grid(leaf: QTensor) -> str | None:
    """Why the leaf is not on the grid that its spec names, or None. Shapes are the leaf's own
    invariants."""
    if not torch.isfinite(leaf.scales.float()).all():
        return "a scale is NaN or Inf"
    if leaf.outer is not None and not (torch.isfinite(leaf.outer) & (leaf.outer != 0)).all():
        return "its global scale is 0, NaN or Inf"
    if isinstance(leaf.spec, Int):
        named = {
            "codes": leaf.codes,
            "zeros": leaf.zeros if leaf.spec.zero_dtype == torch.int8 else None,
        }
        for name, tensor in named.items():
            low, high = (0, 0) if tensor is None else (int(x) for x in tensor.aminmax())
            if low < leaf.spec.qmin or high > leaf.spec.qmax:
                return (
                    f"{name} span [{low}, {high}] and {leaf.spec} has [{leaf.spec.qmin}, "
                    f"{leaf.spec.qmax}]"
                )
    elif (
        not torch.isfinite(leaf.codes.float()).all()
        or float(leaf.codes.float().abs().max()) > leaf.spec.max
    ):
        return f"a code is NaN or above {leaf.spec.max}"
    if leaf.zeros is not None and not torch.isfinite(leaf.zeros.float()).all():
        return "a zero point is NaN or Inf"
    return None
