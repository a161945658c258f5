"""int4 matmuls on a GPU: qlab_kernels does the work, in the configuration that its cache holds for
the shape."""

from typing import Any

import torch
from torch import Tensor

from qlab.algebra.experts import each_expert
from qlab.errors import QlabError
from qlab.lowering.weights.nibbles import Planes, plane_width, spread


def layout(device: torch.device, dtype: torch.dtype) -> str:
    """The order in which the device's kernels read codes; refuses a device or dtype that has none,
    saying what would work."""
    from qlab_kernels.capability import KernelError, admit

    try:
        return admit(torch.cuda.get_device_capability(device), dtype).layout
    except KernelError as error:
        raise QlabError(str(error)) from error


def pack(
    planes: Planes, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """words uint8 [n / 64, k / 64, 2048], scales and zeros [k / group, n], padded as qlab_kernels
    pads."""
    import qlab_kernels

    zeros = None if planes.zeros is None else planes.zeros.to(device)
    weight = qlab_kernels.pack(
        planes.q.to(device),
        planes.scales.to(device),
        zeros,
        planes.group,
        layout(device, dtype),
        dtype,
    )
    return weight.words, weight.scales, weight.zeros


def packed(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    group: int,
    count: int,
    name: str,
) -> Any:
    """The buffers of a lowered weight as qlab_kernels takes them: two planes are one weight of
    twice the width."""
    from qlab_kernels.layout import Packed, padded_group

    if name != layout(words.device, scales.dtype):
        raise QlabError(
            f"a weight packed as {name} cannot be read on "
            f"{torch.cuda.get_device_name(words.device)}, whose layout is "
            f"{layout(words.device, scales.dtype)}; lower the model directory for this device"
        )
    width = k if count == 1 else count * plane_width(k)
    return Packed(words, scales, zeros, n, width, padded_group(width, group)[1], name)


def dequantize(
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    n: int,
    k: int,
    group: int,
    count: int,
    name: str,
) -> Tensor:
    """W = (q - z) * s [n, k] in the scales' dtype, contiguous."""
    from qlab_kernels.dequantize import dequantize as unpacked

    weight = packed(words, scales, zeros, n, k, group, count, name)
    if count == 1:
        return unpacked(weight, scales.dtype).contiguous()
    W_nk, width = (
        unpacked(weight, torch.float32),
        plane_width(k),
    )  # in which planes and their sum are exact: rounded once
    return (W_nk[:, :k] + W_nk[:, width : width + k]).to(scales.dtype)


def reads_dense(device: torch.device, experts: bool) -> bool:
    """Whether products ever take a dense copy of the weight: the grouped kernel of experts has no
    use for one."""
    from qlab_kernels.capability import target

    return not experts or target(torch.cuda.get_device_capability(device)).path != "fused"


def int4_mm(
    x_mk: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    n: int,
    group: int,
    count: int,
    name: str,
) -> Tensor:
    """y [m, n] = x @ W.T in the configuration of the cache; "dequant" is a dense product. No
    synchronization, no global state."""
    from qlab_kernels import Problem, cache
    from qlab_kernels.int4_mm import int4_mm as launch

    m, k = x_mk.shape
    if m == 0:
        return x_mk.new_empty(0, n)
    weight = packed(words, scales, zeros, n, k, group, count, name)
    device, dtype = torch.cuda.get_device_name(x_mk.device), str(x_mk.dtype).removeprefix("torch.")
    problem = Problem(
        "int4_mm",
        torch.cuda.get_device_capability(x_mk.device),
        device,
        dtype,
        weight.group,
        zeros is not None,
        n,
        weight.k,
        m,
    )
    config = cache.lookup(problem).config
    if config.kind == "dequant":
        return (
            x_mk
            @ (
                dequantize(words, scales, zeros, n, k, group, count, name)
                if dense is None
                else dense
            ).mT
        )
    return launch(spread(x_mk, 2) if count == 2 else x_mk, weight, config)


def int4_grouped_mm(
    x_sk: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    dense: Tensor | None,
    ends: Tensor,
    n: int,
    group: int,
    count: int,
    name: str,
) -> Tensor:
    """y [s, n] by one grouped kernel, which reads `ends` on the device; expert by expert where the
    capability has no such kernel."""
    from qlab_kernels import Problem, cache
    from qlab_kernels.grouped import int4_grouped_mm as launch

    cc = torch.cuda.get_device_capability(x_sk.device)
    if reads_dense(x_sk.device, experts=True):

        def product(e: int, x_mk: Tensor) -> Tensor:
            z, W = (None if part is None else part[e] for part in (zeros, dense))
            return int4_mm(x_mk, words[e], scales[e], z, W, n, group, count, name)

        return each_expert(x_sk, ends, product)
    weight = packed(words, scales, zeros, n, x_sk.shape[1], group, count, name)
    device, dtype = torch.cuda.get_device_name(x_sk.device), str(x_sk.dtype).removeprefix("torch.")
    problem = Problem(
        "int4_grouped_mm",
        cc,
        device,
        dtype,
        weight.group,
        zeros is not None,
        n,
        weight.k,
        len(x_sk),
        len(words),
    )
    rows = spread(x_sk, 2) if count == 2 else x_sk
    return launch(rows, weight, ends.to(torch.int32), cache.lookup(problem).config)
