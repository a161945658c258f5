"""Implementations that multiply x [m, k] by the same int4 weight [n, k]: qlab, the library's dense
matmul, and the int4 of other libraries.

A contender prepares some copies of a weight and returns one function of x for each; it raises
Unavailable where it cannot run.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.lowering.tuning.random_weight import random_weight, rounded_once
from qlab.lowering.tuning.shapes import DTYPES
from qlab.lowering.tuning.timing import copies
from qlab.lowering.weights import int4, int4_int8
from qlab.lowering.weights.ops import int4_mm
from qlab.lowering.weights.packed import Packed
from qlab.lowering.weights.setting import Setting

Product = Callable[[Tensor], Tensor]
AnyProduct = TypeVar("AnyProduct", bound=Product)


class Unavailable(Exception):
    """Why a contender does not take part."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A weight shape and its numbers. n, k: rows and columns; dtype: of the activations, by name;
    group: codes per scale; zeros: whether there are zero points."""

    n: int
    k: int
    dtype: str
    group: int
    zeros: bool
    device: torch.device

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def int4_bytes(self) -> float:
        """Codes, 16-bit scales and zero points of one copy."""
        return self.n * self.k * (0.5 + (4 if self.zeros else 2) / self.group)

    @property
    def dense_bytes(self) -> float:
        return 2.0 * self.n * self.k

    def weights(self, weight_bytes: float) -> list[QTensor]:
        """Different weights, as many as keep the caches cold."""
        return [
            random_weight(self.n, self.k, self.group, self.zeros, self.device, i)
            for i in range(copies(weight_bytes, self.device))
        ]


# ---------------------------------------------------------------- ours
def qlab(case: Case) -> Sequence[Product]:
    """The operator of a lowered model, in the configuration that the cache holds."""
    return [partial(int4_mm_of, w, None) for w in _packed(case)]


def qlab_dense_copy(case: Case) -> Sequence[Product]:
    """The same with dense_cache=True; on a GPU the configuration "dequant" uses the copy."""
    dense = [rounded_once(w, case.torch_dtype) for w in case.weights(case.dense_bytes)]
    return [partial(int4_mm_of, w, W) for w, W in zip(_packed(case), dense)]


def qlab_int8(case: Case) -> Sequence[Product]:
    """The operator of a model lowered with activations="int8", which rounds x to it."""
    setting = Setting(dtype=case.torch_dtype, device=case.device, activations="int8")
    weights = case.weights(case.int4_bytes)
    if not int4_int8.meant(weights[0], setting):
        raise Unavailable("runs on CPUs")
    reason = int4_int8.takes(weights[0], setting)
    if reason:
        raise Unavailable(reason)
    packed = [int4_int8.pack("the weight", leaf, setting) for leaf in weights]
    return [partial(_rounding, weight.for_mm()) for weight in packed]


def _rounding(weight: tuple[Any, ...], x: Tensor) -> Tensor:
    return torch.ops.qlab.int4_int8_mm(x, *weight)


def _packed(case: Case) -> list[Packed]:
    return [
        int4.pack("the weight", leaf, Setting(dtype=case.torch_dtype, device=case.device))
        for leaf in case.weights(case.int4_bytes)
    ]


def int4_mm_of(packed: Packed, dense: Tensor | None, x: Tensor) -> Tensor:
    """x [m, k] -> y [m, n]"""
    return int4_mm(*packed.for_mm(x, dense))


# ---------------------------------------------------------------- the library and the compiler
def library(case: Case) -> Sequence[Product]:
    """The dense matmul of torch (cuBLAS, oneDNN) on the dequantized weight."""
    return [
        partial(_swapped, F.linear, rounded_once(w, case.torch_dtype))
        for w in case.weights(case.dense_bytes)
    ]


def _swapped(function: Callable[..., Tensor], weight: Tensor, x: Tensor) -> Tensor:
    return function(x, weight)


def compiled(case: Case) -> Sequence[Product]:
    """torch.compile of unpack, dequantize and matmul, every shape on its own."""
    # all shapes share one code object, and how often that is compiled is limited
    torch._dynamo.reset()

    @partial(torch.compile, dynamic=False, fullgraph=True)
    def product(bytes_nk: Tensor, scales: Tensor, offsets: Tensor, x: Tensor) -> Tensor:
        q = torch.stack((bytes_nk & 15, bytes_nk >> 4), -1).view(*scales.shape, -1)
        W = (q.to(x.dtype) - offsets[..., None]) * scales[..., None]
        return x @ W.view(bytes_nk.shape[0], -1).mT

    def unlimited(*weight: Tensor, x: Tensor) -> Tensor:
        # a bench of many shapes must not end up in eager mode
        with torch._dynamo.config.patch(recompile_limit=256):
            return product(*weight, x)

    products = []
    for w in case.weights(case.int4_bytes):
        u = (w.codes + 8).to(torch.uint8)
        offsets = torch.full_like(w.scales, 8.0) if w.zeros is None else w.zeros + 8
        weight = (
            u[:, ::2] | u[:, 1::2] << 4,
            w.scales.to(case.torch_dtype),
            offsets.to(case.torch_dtype),
        )
        products.append(lambda x, weight=weight: unlimited(*weight, x=x))
    return products


# ---------------------------------------------------------------- other int4
def torch_int4(case: Case) -> Sequence[Product]:
    """aten._weight_int4pack_mm, torch's own: w = (u - 8) * s + z."""
    if case.dtype != "bfloat16":
        raise Unavailable(f"takes bfloat16 activations, not {case.dtype}")
    if case.group not in (32, 64, 128, 256) or case.n % 16:
        raise Unavailable(
            f"takes groups of 32 to 256 and n % 16 == 0, not groups of {case.group} and n={case.n}"
        )
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) < (8, 0):
        raise Unavailable("needs compute capability 8.0")
    aten, products = torch.ops.aten, []
    for w in case.weights(case.int4_bytes):
        u = w.codes.int() + 8
        zeros = torch.zeros_like(w.scales) if w.zeros is None else -w.zeros * w.scales
        scales = torch.stack((w.scales, zeros), -1).transpose(0, 1).contiguous().bfloat16()
        if case.device.type == "cuda":
            bytes_nk = (u[:, ::2] << 4 | u[:, 1::2]).to(torch.uint8)
            words, mm = aten._convert_weight_to_int4pack(bytes_nk, 8), aten._weight_int4pack_mm
        else:
            words = aten._convert_weight_to_int4pack_for_cpu(u, 1)
            mm = aten._weight_int4pack_mm_for_cpu
        products.append(partial(_int4pack, mm, words, case.group, scales))
    return products


def _int4pack(function: Any, words: Tensor, group: int, scales: Tensor, x: Tensor) -> Tensor:
    return function(x, words, group, scales)


def needs(package: str) -> None:
    """Raise Unavailable where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable("is not installed")


def gemlite(case: Case) -> Sequence[Product]:
    """gemlite's Triton kernels on the same codes."""
    if case.device.type != "cuda":
        raise Unavailable("runs on GPUs")
    needs("gemlite")
    from gemlite.helper import A16W4_HQQ_INT

    packer, products = A16W4_HQQ_INT(device=str(case.device), dtype=case.torch_dtype), []
    for w in case.weights(case.int4_bytes):
        zeros = torch.full_like(w.scales, 8.0) if w.zeros is None else w.zeros + 8
        u, scales = (w.codes + 8).to(torch.uint8), w.scales.to(case.torch_dtype)
        offsets = zeros.to(case.torch_dtype).reshape(-1, 1)
        products.append(packer.from_weights(u, scales.reshape(-1, 1), offsets))
    return products


def torchao(case: Case) -> Sequence[Product]:
    """torchao's int4 weights; it quantizes the dense weight itself, so its product differs a
    little."""
    needs("torchao")
    if case.dtype != "bfloat16":
        raise Unavailable(f"takes bfloat16 activations, not {case.dtype}")
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    if case.device.type == "cuda":
        config = Int4WeightOnlyConfig(
            group_size=case.group,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=case.group, set_inductor_config=False)
    products = []
    for w in case.weights(case.int4_bytes):
        linear = torch.nn.Linear(case.k, case.n, bias=False, device="meta", dtype=case.torch_dtype)
        linear.weight = torch.nn.Parameter(rounded_once(w, case.torch_dtype), requires_grad=False)
        quantize_(linear, config)
        products.append(linear)
    return products


OURS, BESIDE_DENSE = "qlab", "dense copy"
LIBRARY = "library"
CONTENDERS: dict[str, Callable[[Case], Sequence[Product]]] = {
    OURS: qlab,
    BESIDE_DENSE: qlab_dense_copy,
    "int8 activations": qlab_int8,
    LIBRARY: library,
    "compiled": compiled,
    "torch int4": torch_int4,
    "gemlite": gemlite,
    "torchao": torchao,
}
DENSE = {LIBRARY, BESIDE_DENSE}  # hold the weight in 16 bits
TOLERANCE = {"torchao": 0.25}  # relative error where a contender quantizes the weight itself
TIGHT = 0.02  # relative error of all others, which multiply the very same weight


def prepare(name: str, case: Case) -> Sequence[Product]:
    """The products of a contender, checked against fp32 on a few tokens. Unavailable says why it
    does not take part."""
    return checked(CONTENDERS[name], case, TOLERANCE.get(name, TIGHT))


def checked(
    make: Callable[[Case], Sequence[AnyProduct]], case: Case, tolerance: float
) -> Sequence[AnyProduct]:
    """What `make` returns, where its first product is within a relative error of fp32's."""
    with torch.no_grad():
        with _failures():
            products = make(case)
        x = torch.randn(4, case.k, device=case.device, dtype=case.torch_dtype)
        first = random_weight(case.n, case.k, case.group, case.zeros, case.device, 0)
        expected = x.float() @ rounded_once(first, torch.float32).mT
        with _failures():
            error_norm = float((products[0](x).float() - expected).norm() / expected.norm())
    if not error_norm < tolerance:
        raise Unavailable(f"computes something else: relative error {error_norm:.3f}")
    return products


@contextmanager
def _failures() -> Iterator[None]:
    """A context for calls of foreign libraries. A library that does not work here raises
    Unavailable with the first line of its error, so that all others are measured."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise Unavailable(f"failed: {type(error).__name__}: {reason}") from error
