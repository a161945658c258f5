"""What the int4 product is timed beside: cuBLAS, the 8-bit products of torch, and the int4 kernels
that users pick instead. An absent package is said, and none is required.

Of a product that rounds its activations the multiplication alone is timed: rounding belongs to the
layer before, where it is fused.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.bench.contenders import (
    CONTENDERS,
    LIBRARY,
    OURS,
    TIGHT,
    Case,
    Product,
    Unavailable,
    checked,
    needs,
    prepare,
)
from qlab.lowering.tuning.random_weight import rounded_once

INT_MM, SCALED_MM = "torch._int_mm", "torch._scaled_mm"
TINYGEMM, MARLIN, HUMMING = "torch int4", "marlin", "humming"
LEAST_INT_MM = 17  # rows that torch._int_mm takes on a GPU; fewer are padded
FP8 = torch.float8_e4m3fn
MOST_FP8 = 448.0


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A product of rounded activations: y = finish(multiply(rounding(x)), rounding(x))."""

    rounding: Callable[[Tensor], tuple[Tensor, Tensor]]
    multiply: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor, Tensor, int], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        values, scales = self.rounding(x)
        return self.finish(self.multiply(values, scales), scales, len(x))

    def timed(self, x: Tensor) -> Callable[[], Tensor]:
        """The multiplication alone."""
        return partial(self.multiply, *self.rounding(x))


def timed(product: Product | Rounded, x: Tensor) -> Callable[[], Tensor]:
    """What is timed of a product."""
    return product.timed(x) if isinstance(product, Rounded) else partial(product, x)


# ---------------------------------------------------------------- 8 bits by torch
def int_mm(case: Case) -> Sequence[Rounded]:
    """torch._int_mm of int8 weights, a scale per row, and int8 activations, a scale per token."""
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) < (7, 5):
        raise Unavailable("needs compute capability 7.5")
    products = []
    for w in case.weights(case.n * case.k):
        q, scales = _int8(rounded_once(w, torch.float32))
        products.append(
            Rounded(
                rounding=_int8_padded,
                multiply=partial(_int_mm, q.T),
                finish=partial(_int_scaled, scales, case.torch_dtype),
            )
        )
    return products


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    return (x.float() / scales).round().to(torch.int8), scales


def _int8_padded(x: Tensor) -> tuple[Tensor, Tensor]:
    q, scales = _int8(x)
    missing = max(LEAST_INT_MM - len(q), 0) + -max(LEAST_INT_MM, len(q)) % 8
    return torch.nn.functional.pad(q, (0, 0, 0, missing)), scales


def _int_mm(transposed: Tensor, q: Tensor, _: Tensor) -> Tensor:
    return torch._int_mm(q, transposed)


def _int_scaled(
    row_scales: Tensor, dtype: torch.dtype, sums: Tensor, scales: Tensor, m: int
) -> Tensor:
    return (sums[:m].float() * scales * row_scales.T).to(dtype)


def scaled_mm(case: Case) -> Sequence[Rounded]:
    """torch._scaled_mm of fp8 weights, a scale per row, and fp8 activations, a scale per token."""
    if case.device.type == "cuda" and torch.cuda.get_device_capability(case.device) < (8, 9):
        raise Unavailable("needs compute capability 8.9")
    products = []
    for w in case.weights(case.n * case.k):
        q, scales = _fp8(rounded_once(w, torch.float32))
        products.append(
            Rounded(
                rounding=_fp8,
                multiply=partial(_scaled_mm, q.T, scales.T, case.torch_dtype),
                finish=_as_it_is,
            )
        )
    return products


def _fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / MOST_FP8
    return (x.float() / scales).to(FP8), scales


def _scaled_mm(
    transposed: Tensor, row_scales: Tensor, dtype: torch.dtype, q: Tensor, scales: Tensor
) -> Tensor:
    return torch._scaled_mm(q, transposed, scale_a=scales, scale_b=row_scales, out_dtype=dtype)


def _as_it_is(y: Tensor, _: Tensor, __: int) -> Tensor:
    return y


# ---------------------------------------------------------------- packages
def marlin(case: Case) -> Sequence[Product]:
    """vLLM's Marlin on the same codes: the words of GPTQ, repacked by its own operator.

    Source: vllm/model_executor/layers/quantization/utils/marlin_utils.py.
    """
    _needs_symmetric_on_gpu(case)
    needs("vllm")
    from vllm import _custom_ops
    from vllm.model_executor.layers.quantization.utils import marlin_utils
    from vllm.scalar_type import scalar_types

    empty = marlin_utils.marlin_make_empty_g_idx(case.device)
    products = []
    for w in case.weights(case.int4_bytes):
        words = gptq_words(w.codes)
        packed = _custom_ops.gptq_marlin_repack(words, empty, case.k, case.n, 4)
        scales = w.scales.T.contiguous().to(case.torch_dtype)
        arguments = {
            "weight": packed,
            "weight_scale": marlin_utils.marlin_permute_scales(scales, case.k, case.n, case.group),
            "weight_zp": empty,
            "g_idx": empty,
            "g_idx_sort_indices": empty,
            "workspace": marlin_utils.marlin_make_workspace_new(case.device),
            "wtype": scalar_types.uint4b8,
            "output_size_per_partition": case.n,
            "input_size_per_partition": case.k,
            "is_k_full": True,
        }
        products.append(partial(_by_name, marlin_utils.apply_gptq_marlin_linear, arguments))
    return products


def gptq_words(codes: Tensor) -> Tensor:
    """int8 codes -8..7 [n, k] -> int32 [k / 8, n]: word r holds code + 8 of k = 8 r + i from bit
    4 i on."""
    u = (codes.T.int() + 8).reshape(codes.shape[1] // 8, 8, codes.shape[0])
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=codes.device)[:, None]
    return (u << shifts).sum(1, dtype=torch.int32).contiguous()


def _by_name(function: Callable[..., Tensor], arguments: dict[str, Any], x: Tensor) -> Tensor:
    return function(x, **arguments)


def humming(case: Case) -> Sequence[Product]:
    """humming-kernels; it quantizes the dense weight itself, so its product differs a little.

    Source: the README of humming-kernels 0.1.20, and its humming/layer.py.
    """
    _needs_symmetric_on_gpu(case)
    needs("humming")
    from humming.layer import HummingLayer

    products = []
    for w in case.weights(case.int4_bytes):
        layer = HummingLayer(
            shape_n=case.n,
            shape_k=case.k,
            weight_config={"dtype": "int4", "group_size": case.group},
            torch_dtype=case.torch_dtype,
        ).to(case.device)
        layer.load_from_unquantized(rounded_once(w, case.torch_dtype))
        layer.transform()
        products.append(layer)
    return products


def _needs_symmetric_on_gpu(case: Case) -> None:
    if case.device.type != "cuda":
        raise Unavailable("runs on GPUs")
    if case.zeros:
        raise Unavailable("is called here for weights without zero points")


Maker = Callable[[Case], Sequence[Product | Rounded]]
# makers beside those of `contenders`, and the relative error of what rounds more than the codes
FOREIGN: dict[str, tuple[Maker, float]] = {
    INT_MM: (int_mm, 0.05),
    SCALED_MM: (scaled_mm, 0.1),
    MARLIN: (marlin, TIGHT),
    HUMMING: (humming, 0.25),
}
RIVALS = (OURS, LIBRARY, INT_MM, SCALED_MM, TINYGEMM, MARLIN, HUMMING)


def products_of(name: str, case: Case) -> Sequence[Product | Rounded]:
    """The products of one of RIVALS, checked against fp32. Unavailable says why there are none."""
    if name in CONTENDERS:
        return prepare(name, case)
    make, tolerance = FOREIGN[name]
    return checked(make, case, tolerance)
