"""Tokens of keys or values as codes, as an attention rounds them, and back.

    write:  x -> codes = round(f(x) / s + z), and s and z of each token where they are not fixed
    read:   (codes - z) * s

f, s and z are those of the attention (`qlab.lowering.around.attended`), so that it reads what it
would make of each token itself. One operator writes, and one reads out of slots: on a CPU those of
`qlab_kernels.code_tokens` and `qlab_kernels.read_tokens`, where this machine compiles them.
Elsewhere reading is plain torch, which a compiler joins with what gathers the tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlab.algebra.spec import Float, Int
from qlab.lowering.around.attention import is_plain
from qlab.lowering.around.coded_heads import coded, decoded, in_pairs
from qlab.lowering.around.coded_heads import refusal as reason_of
from qlab.lowering.around.inputs import RoundedInput, operation_of
from qlab.lowering.weights.exact import spec_of


def refusal(steps: nn.ModuleList, channels: int) -> str | None:
    """Why what these steps make of keys or values is not kept as codes, or None. channels: of a
    head."""
    if not len(steps) or not isinstance(steps[-1], RoundedInput):
        return "nothing is rounded at last"
    return reason_of(steps[-1].operation, channels)


class Coder:
    """Writes and reads the keys or the values of one attention.

    Args:
        steps: what the attention makes of them; the last step rounds.
        channels: of a head.
        heads: that an attention reads, where it is known.
    """

    def __init__(self, steps: nn.ModuleList, channels: int, heads: int | None = None):
        self.rounding: Any
        *self.before, self.rounding = steps
        self.of_head, self.heads = channels, heads
        self.channels = channels if in_pairs(self.rounding.operation) else None
        self.is_float = isinstance(self.rounding.spec, Float)

    def fits(self, x_bhnd: Tensor) -> bool:
        """Whether these are as many heads and channels as the attention reads."""
        return x_bhnd.shape[1] == self.heads and x_bhnd.shape[-1] == self.of_head

    def written(self, x_bhnd: Tensor) -> list[Tensor]:
        """Tokens as tensors [b * n, ...]: codes [h, d] or pairs of them, and where tokens have them
        scales and zero points [h or 1, groups]."""
        x_nk = x_bhnd.transpose(1, 2).flatten(0, 1).flatten(1)
        for step in self.before:
            x_nk = step(x_nk)
        codes, *own = self.coded(x_nk)
        return [codes[:, : x_bhnd.shape[1]], *own]

    def coded(self, x_nk: Tensor) -> list[Tensor]:
        """What is rounded, the channels of as many heads as there are, as such tensors."""
        of, heads = self.rounding, x_nk.shape[1] // self.of_head
        if self._is_kernels(x_nk):
            from qlab_kernels.code_tokens import code

            return code(x_nk, self._coding(heads), of.scales, of.zeros)
        return code_tokens(x_nk, heads, of.scales, of.zeros, of.text, of.share)

    def _is_kernels(self, x_nk: Tensor) -> bool:
        """Whether the kernel codes these tokens."""
        from qlab_kernels.code_tokens import DTYPES, takes

        spec, scales = self.rounding.spec, self.rounding.spec.scale_dtype or torch.float32
        if scales not in DTYPES or (isinstance(spec, Int) and spec.zero_dtype != torch.int8):
            return False
        return is_plain(x_nk) and takes(x_nk) and why_not() is None

    def _coding(self, heads: int) -> Any:
        """The rounding as the kernel takes it."""
        from qlab_kernels.code_tokens import E4M3, Coding

        of, spec = self.rounding, self.rounding.spec
        of_tokens = heads * self.of_head if of.scales is None else self.of_head
        return Coding(
            heads=heads,
            group=spec.tile.cols or of_tokens,
            bits=E4M3 if self.is_float else spec.bits,
            in_pairs=self.channels is not None,
            is_symmetric=spec.symmetric,
            scale_dtype=spec.scale_dtype or torch.float32,
            share=of.share,
        )

    def read(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What was written, as tensors [b, n, ...] -> x [b, h, n, d]."""
        codes, scales, zeros = self._parts(parts, (1, 1, -1, 1))
        codes = codes.view(torch.float8_e4m3fn) if self.is_float else codes
        return decoded(codes, scales, zeros, dtype, self.channels).transpose(1, 2)

    def read_at(self, slots: Sequence[Tensor], at_bl: Tensor, dtype: torch.dtype) -> Tensor:
        """What was written to slots, as tensors [slots, ...], of those at [b, l] -> x [b, h, l,
        d]."""
        from qlab_kernels.read_tokens import read, takes

        parts = self._parts(slots, (1, -1, 1))
        if not (is_plain(slots[0]) and takes(*parts, dtype) and why_not_read() is None):
            return self.read([part[at_bl] for part in slots], dtype)
        form: Any = {"channels": self.of_head, "is_float": self.is_float}
        return read(*parts, at_bl, dtype, **form).transpose(1, 2)

    def _parts(
        self, parts: Sequence[Tensor], of_heads: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes, scales and zero points. of_heads: the shape of those that are fixed beforehand."""
        codes, *own = parts
        given = (self.rounding.scales, self.rounding.zeros)
        scales, *zeros = own or [t.view(of_heads) for t in given if t is not None]
        return codes, scales, zeros[0] if zeros else None


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Why there is no kernel that writes here; None where there is one."""
    from qlab_kernels.code_tokens import why_not

    return why_not()


@torch.compiler.assume_constant_result
def why_not_read() -> str | None:
    """Why there is no kernel that reads here; None where there is one."""
    from qlab_kernels.read_tokens import why_not

    return why_not()


@torch.library.custom_op("qlab::code_tokens", mutates_args=())
def code_tokens(
    x_nk: Tensor, heads: int, scales: Tensor | None, zeros: Tensor | None, spec: str, share: float
) -> list[Tensor]:
    """Codes [n, h, d] or pairs of them [n, h, ceil(d / 2)], 8-bit floats as the bytes that they
    are, and scales and zero points of the tokens where none are given."""
    op = operation_of(scales, zeros, None, spec, share)
    of_heads = coded(op, x_nk.unflatten(1, (heads, -1)).transpose(0, 1)[None])
    parts = [of_heads.codes] if scales is not None else [of_heads.codes, of_heads.scales]
    if scales is None and of_heads.zeros is not None:
        parts.append(of_heads.zeros)
    return [_as_octets(part[0].transpose(0, 1).contiguous()) for part in parts]


def _as_octets(t: Tensor) -> Tensor:
    """torch indexes no 8-bit floats on every device."""
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


@code_tokens.register_fake
def _(
    x_nk: Tensor, heads: int, scales: Tensor | None, zeros: Tensor | None, spec: str, share: float
) -> list[Tensor]:
    grid, n = spec_of(spec), x_nk.shape[0]
    op = operation_of(scales, zeros, None, spec, share)
    d = x_nk.shape[1] // heads
    pairs, is_float = in_pairs(op), isinstance(grid, Float)
    codes = x_nk.new_empty(
        n, heads, -(-d // 2) if pairs else d, dtype=torch.uint8 if pairs or is_float else torch.int8
    )
    if scales is not None:
        return [codes]
    cols = grid.tile.cols
    shape = (n, heads, d // cols) if cols else (n, 1, 1)
    found = [codes, x_nk.new_empty(shape, dtype=grid.scale_dtype or torch.float32)]
    return (
        found
        if isinstance(grid, Float) or grid.symmetric
        else [*found, x_nk.new_empty(shape, dtype=grid.zero_dtype)]
    )
