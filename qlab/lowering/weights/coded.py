"""Quantized weights that no kernel multiplies: their codes are held as bit streams and dequantized
for every call.

    qlab::dense(words, scales, zeros, outer, perm, k, spec, dtype)     -> W [..., n, k]:
                                                                       qlab.algebra.qtensor.dense,
                                                                       bit for bit
    qlab::experts_mm(x, words, scales, ..., dense, ends, n, k, spec)   -> y [s, n]: rows
                                                                       ends[e-1]:ends[e] of x @
                                                                       W_e.T
    qlab::experts_back(g, words, scales, ..., dense, ends, k, spec)    -> its gradient by x [s, k]:
                                                                       rows of g @ W_e

words: int32 [..., n, ceil(k bits / 32)], codes one behind the other (qlab.algebra.bits), floats by
their place among the numbers of their grid; codes of 8 bits are bytes [..., n, k]. scales, zeros,
outer, perm: those of the leaf, in the dtype of the activations where that is narrower than their
own, because they are read in it.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.bits import pack, pack_signed, unpack, unpack_signed
from qlab.algebra.experts import each_expert, per_row
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.qtensor import dense as dense_of
from qlab.algebra.spec import Float, Int, Spec, parse_spec
from qlab.errors import QlabError
from qlab.lowering.weights.linear import LinearOfCodes, QuantizedWeight, refuse_lost

Part = Tensor | None


@torch.library.custom_op("qlab::dense", mutates_args=())
def dense(
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    k: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """W [..., n, k] in `dtype`, contiguous."""
    grid = parse_spec(spec)
    return dense_of(
        QTensor(_codes(words, grid, k), scales, zeros, grid, outer, perm), dtype
    ).contiguous()


@dense.register_fake
def _(words, scales, zeros, outer, perm, k, spec, dtype):
    return words.new_empty((*words.shape[:-1], k), dtype=dtype)


@torch.library.custom_op(
    "qlab::experts_mm", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)  # waits for `ends`
def experts_mm(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    copy: Part,
    ends: Tensor,
    k: int,
    spec: str,
) -> Tensor:
    """y [s, n] in x's dtype; one expert that has rows is dense at a time. copy: W [e, n, k], or
    None."""

    def product(e: int, x_mk: Tensor) -> Tensor:
        if not len(x_mk):
            return x_mk.new_empty(0, words.shape[1])
        return F.linear(x_mk, _expert(e, words, scales, zeros, outer, perm, copy, k, spec, x.dtype))

    return each_expert(x, ends, product)


@experts_mm.register_fake
def _(x, words, scales, zeros, outer, perm, copy, ends, k, spec):
    return x.new_empty(x.shape[0], words.shape[1])


@torch.library.custom_op(
    "qlab::experts_back", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)  # waits for `ends`
def experts_back(
    g: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    copy: Part,
    ends: Tensor,
    k: int,
    spec: str,
) -> Tensor:
    """The gradient by x [s, k] of experts_mm, from that by its result: g [s, n]."""

    def product(e: int, g_mn: Tensor) -> Tensor:
        if not len(g_mn):
            return g_mn.new_empty(0, k)
        return g_mn @ _expert(e, words, scales, zeros, outer, perm, copy, k, spec, g.dtype)

    return each_expert(g, ends, product)


@experts_back.register_fake
def _(g, words, scales, zeros, outer, perm, copy, ends, k, spec):
    return g.new_empty(g.shape[0], k)


def _expert(
    e: int,
    words: Tensor,
    scales: Tensor,
    zeros: Part,
    outer: Part,
    perm: Part,
    copy: Part,
    k: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """W_e [n, k]."""
    if copy is not None:
        return copy[e]
    z, o = (None if part is None else part[e] for part in (zeros, outer))
    return dense(words[e], scales[e], z, o, perm, k, spec, dtype)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *parts, k, spec = inputs
    ctx.save_for_backward(*parts)
    ctx.form = k, spec


def _gradients(ctx: Any, g_sn: Tensor) -> tuple[Tensor | None, ...]:
    return experts_back(g_sn, *ctx.saved_tensors, *ctx.form), *[None] * 9


experts_mm.register_autograd(_gradients, setup_context=_save)


def _codes(words: Tensor, spec: Spec, k: int) -> Tensor:
    if isinstance(spec, Int):
        return words if spec.bits == 8 else unpack_signed(words, spec.bits, k)
    octets = (
        words if spec.bits == 8 else _numbers(spec, words.device)[unpack(words, spec.bits, k).int()]
    )
    return octets.view(spec.code_dtype)


def _words(path: str, codes: Tensor, spec: Spec) -> Tensor:
    """The inverse of _codes; refuses codes that are not on the grid."""
    octets = codes.contiguous().view(torch.int8 if isinstance(spec, Int) else torch.uint8)
    if spec.bits == 8:
        return octets
    words = (
        pack_signed(octets, spec.bits)
        if isinstance(spec, Int)
        else pack(_places(octets, spec), spec.bits)
    )
    if not torch.equal(_codes(words, spec, codes.shape[-1]).view(octets.dtype), octets):
        raise QlabError(
            f"{path} has codes that are no numbers of {spec}; the file or its config is wrong"
        )
    return words


def _places(octets: Tensor, spec: Float) -> Tensor:
    """The place of every number among those of the grid: uint8."""
    numbers = _numbers(spec, CPU)
    table = torch.zeros(256, dtype=torch.uint8)
    table[numbers.int()] = torch.arange(len(numbers), dtype=torch.uint8)
    return table[octets.int()]


CPU = torch.device("cpu")


@cache
def _numbers(spec: Float, device: torch.device) -> Tensor:
    """The e4m3 bytes that are numbers of the grid, zeros of both signs among them: uint8 [2^bits].
    One for each device: no CUDA graph could record a copy to it."""
    octets = torch.arange(256, dtype=torch.uint8)
    values = octets.view(spec.code_dtype).float()
    return octets[spec.nearest_(values.clone()) == values].to(device)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize == 1


class CodedWeight(QuantizedWeight):
    """Held as bit streams: of every grid, granularity and order of channels."""

    outer: Tensor | None
    perm: Tensor | None

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        dtype: torch.dtype,
        device: torch.device,
        dense_cache: bool,
        inputs: QuantizeInput | None = None,
    ):
        super().__init__(path, leaf, str(leaf.spec), device, inputs)
        refuse_lost(path, [leaf.scales], dtype)
        self.dtype = dtype
        self.register_buffer("words", _words(path, leaf.codes, leaf.spec).to(device))
        for name in ("scales", "zeros", "outer", "perm"):
            part = getattr(leaf, name)
            if part is not None and part.is_floating_point() and part.itemsize > dtype.itemsize:
                part = part.to(dtype)
            self.register_buffer(name, None if part is None else part.to(device))
        self.register_buffer(
            "dense", self.columns().contiguous() if dense_cache else None, persistent=False
        )

    def dequantized(self) -> Tensor:
        return dense(
            self.words,
            self.scales,
            self.zeros,
            self.outer,
            self.perm,
            self.in_features,
            self.spec,
            self.dtype,
        )

    def held(self) -> tuple[Tensor | None, ...]:
        return *super().held(), self.outer, self.perm

    def __getstate__(self) -> dict[str, Any]:
        """For pickles, which torch cannot read back from tensors of 8-bit floats: their bytes, and
        what these are."""
        held = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and _is_narrow(tensor)
        }
        octets = {name: tensor.view(torch.uint8) for name, tensor in held.items()}
        narrow = {name: tensor.dtype for name, tensor in held.items()}
        return {**self.__dict__, "_buffers": {**self._buffers, **octets}, "_narrow": narrow}

    def __setstate__(self, state: dict[str, Any]) -> None:
        narrow = state.pop("_narrow")
        super().__setstate__(state)
        for name, dtype in narrow.items():
            self._buffers[name] = state["_buffers"][name].view(dtype)

    def _rows(self, x: Tensor) -> Tensor:
        if x.dtype != self.dtype:
            raise QlabError(
                f"a model lowered for {self.dtype} got {x.dtype} activations; lower it for that "
                "dtype instead"
            )
        return super()._rows(x)


class CodedLinear(CodedWeight, LinearOfCodes):
    """y = x @ W.T + b, dequantized for the call."""

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        dense_cache: bool,
        inputs: QuantizeInput | None = None,
    ):
        super().__init__(path, leaf, dtype, device, dense_cache, inputs)
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]"""
        y = F.linear(
            self._rows(x), self.dequantized() if self.dense is None else self.dense, self.bias
        )
        return y.view(*x.shape[:-1], self.out_features)


class CodedExperts(CodedWeight):
    """A fused weight [e, n, k] of experts: each row of x is multiplied by the weight of its own
    one, dequantized for the call."""

    def __len__(self) -> int:
        return len(self.words)

    def forward(self, x: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
        """Rows ends[e-1]:ends[e] of x [s, k] times W_e.T, plus bias [e, n] if there is one -> [s,
        n]"""
        y = experts_mm(
            self._rows(x),
            self.words,
            self.scales,
            self.zeros,
            self.outer,
            self.perm,
            self.dense,
            ends,
            self.in_features,
            self.spec,
        )
        return y if bias is None else y + per_row(bias, ends, len(y))
