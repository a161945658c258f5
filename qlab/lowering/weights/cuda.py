"""int4 matmuls on a GPU: qlab_kernels does the work, in the configuration that its cache holds for
the shape."""

from typing import Any

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.errors import QlabError
from qlab.lowering.weights.nibbles import Planes, plane_width, spread
from qlab.lowering.weights.packed import Packed

WORD_AXES = 3  # of the words of one weight; those of experts have one more
WHOLE_ROWS = True  # the kernels read one scale for a whole row


def layout(device: torch.device, dtype: torch.dtype) -> str:
    """The order in which the device's kernels read codes; refuses a device or dtype that has none,
    saying what would work."""
    from qlab_kernels.capability import KernelError, admit

    try:
        return admit(torch.cuda.get_device_capability(device), dtype).layout
    except KernelError as error:
        raise QlabError(str(error)) from error


def pack(planes: Planes, dtype: torch.dtype) -> Packed:
    """Pack one weight: words uint8 [n / 64, k / 64, 2048], scales and zeros [k / group, n], padded
    as qlab_kernels pads."""
    import qlab_kernels

    order = layout(planes.q.device, dtype)
    weight = qlab_kernels.pack(planes.q, planes.scales, planes.zeros, planes.group, order, dtype)
    return Packed(
        words=weight.words,
        scales=weight.scales,
        zeros=weight.zeros,
        perm=None,
        n=weight.n,
        k=planes.k,
        group=planes.group,
        planes=planes.count,
        layout=order,
    )


def launched(packed: Packed) -> Any:
    """The weight as qlab_kernels launches it: two planes are one weight of twice the width."""
    from qlab_kernels.layout import Packed as Launched
    from qlab_kernels.layout import padded_group

    device = packed.words.device
    order = layout(device, packed.scales.dtype)
    if packed.layout != order:
        raise QlabError(
            f"a weight packed as {packed.layout} cannot be read on "
            f"{torch.cuda.get_device_name(device)}, whose layout is {order}; lower the model "
            "directory for this device"
        )
    width = packed.k if packed.planes == 1 else packed.planes * plane_width(packed.k)
    return Launched(
        words=packed.words,
        scales=packed.scales,
        zeros=packed.zeros,
        n=packed.n,
        k=width,
        group=padded_group(width, packed.group)[1],
        layout=order,
    )


def dequantize(packed: Packed) -> Tensor:
    """W = (q - z) * s [n, k] in the scales' dtype, contiguous."""
    from qlab_kernels.dequantize import dequantize as unpacked

    weight, dtype = launched(packed), packed.scales.dtype
    if packed.planes == 1:
        return unpacked(weight, dtype).contiguous()
    # in fp32 planes and their sum are exact, and the sum is rounded once
    W_nk, k, width = unpacked(weight, torch.float32), packed.k, plane_width(packed.k)
    return (W_nk[:, :k] + W_nk[:, width : width + k]).to(dtype)


def reads_dense(device: torch.device, experts: bool) -> bool:
    """Whether products ever take a dense copy of the weight: the grouped kernel of experts has no
    use for one."""
    from qlab_kernels.capability import target

    return not experts or target(torch.cuda.get_device_capability(device)).path != "fused"


def int4_mm(x_mk: Tensor, packed: Packed, dense: Tensor | None) -> Tensor:
    """y [m, n] = x @ W.T in the configuration of the cache; "dequant" is a dense product. No
    synchronization, no global state."""
    from qlab_kernels import cache
    from qlab_kernels.int4_mm import int4_mm as launch

    if len(x_mk) == 0:
        return x_mk.new_empty(0, packed.n)
    weight = launched(packed)
    config = cache.lookup(_problem("int4_mm", x_mk, weight, 1)).config
    if config.kind == "dequant":
        W_nk = dequantize(packed) if dense is None else dense
        return x_mk @ W_nk.mT
    return launch(_beside(x_mk, packed), weight, config)


def int4_grouped_mm(x_sk: Tensor, packed: Packed, dense: Tensor | None, ends: Tensor) -> Tensor:
    """y [s, n] by one grouped kernel, which reads `ends` on the device; expert by expert where the
    capability has no such kernel."""
    from qlab_kernels import cache
    from qlab_kernels.grouped import int4_grouped_mm as launch

    if reads_dense(x_sk.device, experts=True):

        def product(e: int, x_mk: Tensor) -> Tensor:
            return int4_mm(x_mk, packed.expert(e), None if dense is None else dense[e])

        return each_expert(x_sk, ends, product)
    weight = launched(packed)
    problem = _problem("int4_grouped_mm", x_sk, weight, len(packed.words))
    config = cache.lookup(problem).config
    return launch(_beside(x_sk, packed), weight, ends.to(torch.int32), config)


def _problem(op: str, x_mk: Tensor, weight: Any, experts: int) -> Any:
    """The product's key in the config cache."""
    from qlab_kernels import Problem

    return Problem(
        op=op,
        cc=torch.cuda.get_device_capability(x_mk.device),
        device=torch.cuda.get_device_name(x_mk.device),
        dtype=str(x_mk.dtype).removeprefix("torch."),
        group=weight.group,
        zeros=weight.zeros is not None,
        n=weight.n,
        k=weight.k,
        m=len(x_mk),
        experts=experts,
    )


def _beside(x_mk: Tensor, packed: Packed) -> Tensor:
    """x as the kernel multiplies it: for two planes, beside itself."""
    return spread(x_mk, 2) if packed.planes == 2 else x_mk
