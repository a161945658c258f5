"""Weights of integer codes for the int4 kernels of a device: packing, products, and what is slow.

The operators of `ops.py` multiply; `cpu.py` and `cuda.py` hold the two implementations, with the
same functions.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int
from qlab.errors import QlabError
from qlab.lowering.weights import cpu, cuda, ops
from qlab.lowering.weights.nibbles import planes_of, refusal
from qlab.lowering.weights.packed import Packed, stacked
from qlab.lowering.weights.setting import Setting


def implementation(device: torch.device) -> ModuleType:
    """The kernels of a device: `cpu` or `cuda`."""
    return cpu if device.type == "cpu" else cuda


def meant(leaf: QTensor, setting: Setting) -> bool:
    """Whether a weight has integer codes."""
    return isinstance(leaf.spec, Int)


def takes(leaf: QTensor, setting: Setting) -> str | None:
    """Why no int4 kernel multiplies this weight, or None."""
    return refusal(leaf.spec, leaf.shape)


def pack(path: str, leaf: QTensor, setting: Setting) -> Packed:
    """A weight [n, k] or [e, n, k] as the device's kernels read it. Refuses scales that the dtype
    does not hold, and a device without kernels."""
    dtype, device = setting.dtype, setting.device
    kernels = implementation(device)
    is_fused = leaf.codes.ndim == 3
    leaves = [expert(leaf, e) for e in range(len(leaf.codes))] if is_fused else [leaf]
    planes = [planes_of(path, part, whole_rows=kernels.WHOLE_ROWS) for part in leaves]
    refuse_lost(path, [part.scales for part in planes], dtype)
    weights = [kernels.pack(part.to(device), dtype) for part in planes]
    packed = stacked(weights) if is_fused else weights[0]
    return packed._replace(perm=None if leaf.perm is None else leaf.perm.to(device))


def expert(leaf: QTensor, e: int) -> QTensor:
    """The weight [n, k] of one expert of a leaf [e, n, k]."""
    zeros, outer = (None if part is None else part[e] for part in (leaf.zeros, leaf.outer))
    return QTensor(leaf.codes[e], leaf.scales[e], zeros, leaf.spec, outer, leaf.perm)


def refuse_lost(path: str, scales: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Refuse scales that a dtype of activations does not hold: too large, or so small that rounding
    them changes the weight.

    Groups whose scales are far below the weight's largest add nothing to it, and may be lost.
    """
    wide = torch.cat([part.float().abs().flatten() for part in scales])
    largest = wide.max()
    lost = (wide - wide.to(dtype).float()).abs().max()
    if not lost <= largest / 128:  # 16 bits round a number that they hold by 1/256 at most
        raise QlabError(
            f"{path} has scales up to {float(largest):.3g}, which {dtype} does not hold; lower to "
            "torch.bfloat16"
        )


def mm(x_mk: Tensor, packed: Packed, dense: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [m, n] = x @ W.T + b."""
    y = ops.int4_mm(*packed.for_mm(in_order(x_mk, packed.perm), dense))
    return y if bias is None else y + bias


def grouped_mm(x_sk: Tensor, packed: Packed, dense: Tensor | None, ends: Tensor) -> Tensor:
    """y [s, n]: rows ends[e-1]:ends[e] of x @ W_e.T."""
    return ops.int4_grouped_mm(*packed.for_grouped_mm(in_order(x_sk, packed.perm), dense, ends))


def in_order(x_mk: Tensor, perm: Tensor | None) -> Tensor:
    """x with its channels in the order of the codes."""
    return x_mk if perm is None else x_mk[:, perm]


def columns(packed: Packed) -> Tensor:
    """W [..., n, k] with its columns in the order of the codes, which is that of a dense copy."""
    if packed.words.ndim == implementation(packed.words.device).WORD_AXES:
        return ops.dequantize(*packed.for_dequantize())
    experts = [packed.expert(e) for e in range(len(packed.words))]
    return torch.stack([ops.dequantize(*one.for_dequantize()) for one in experts])


def keeps_copy(device: torch.device, experts: bool) -> bool:
    """Whether a dense copy of the weight would ever be multiplied."""
    return implementation(device).reads_dense(device, experts)


def slowness(specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> str | None:
    """What is slow about weights of these specs for activations in this dtype, or None."""
    if device.type != "cpu" or dtype == torch.bfloat16:
        return None
    return (
        f"no int4 kernel on a CPU takes {dtype} activations: every product dequantizes its "
        "weight and is dense. Use torch.bfloat16"
    )
