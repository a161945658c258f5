"""What a launch of int4 weights and activations of 8 bits derives from its operands."""

from typing import NamedTuple

import torch
from torch import Tensor

from qlab_kernels.capability import KernelError
from qlab_kernels.device import interpreted
from qlab_kernels.layout import Packed
from qlab_kernels.layout8 import UNIT, layout_of, numbers_of
from qlab_kernels.problem import Config

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class Limits(NamedTuple):
    """The grid of codes: its ends, and the number that the largest channel is divided by to get the
    scale."""

    lowest: float
    highest: float
    reach: float


class Activations(NamedTuple):
    """x as the kernels read it: x_mk = p_mk t_m.

    p: int8 or e4m3 [m, k], k padded with zeros. t: fp32 [m, 1], or [1, 1] for all tokens. sums:
    UNIT times the sums of p over each group of W, fp32 [k / group, m]; unread where W has no zero
    points.
    """

    p: Tensor
    t: Tensor
    sums: Tensor


def prepared(p: Tensor, t: Tensor, packed: Packed) -> Activations:
    """Codes p [m, k] and scales t of x for products with these weights."""
    check(p, t, packed)
    missing = packed.padded_k - packed.k
    octets = p.view(torch.uint8)
    octets = torch.nn.functional.pad(octets, (0, missing)) if missing else octets.contiguous()
    x = octets.view(p.dtype)
    if packed.zeros is None:
        return Activations(x, t, t)
    # int8 codes of a whole row have sums that fp32 holds up to 2^17 channels
    sums = x.float().unflatten(1, (-1, packed.group)).sum(-1)
    return Activations(x, t, sums.mul_(UNIT[numbers_of(packed.layout)]).mT.contiguous())


def check(p: Tensor, t: Tensor, packed: Packed) -> None:
    """Refuse codes that the kernels would misread."""
    numbers = numbers_of(packed.layout)
    if p.dim() != 2 or p.shape[1] != packed.k or p.dtype != CODES[numbers]:
        raise KernelError(
            f"codes of x are {CODES[numbers]} [tokens, {packed.k}] for these weights, not "
            f"{p.dtype} {tuple(p.shape)}"
        )
    if t.dtype != torch.float32 or tuple(t.shape) not in ((len(p), 1), (1, 1)):
        raise KernelError(
            f"scales of {len(p)} tokens are float32 [{len(p)}, 1] or [1, 1], not {t.dtype} "
            f"{tuple(t.shape)}"
        )


def admit(x: Activations, packed: Packed, config: Config) -> None:
    """Refuse a configuration of another family, and weights of another device."""
    if config.kind not in ("gemm", "split_k"):
        raise KernelError(f"these weights are multiplied by gemm and split_k, not {config.kind}")
    if interpreted():
        return
    device = x.p.device
    if device.type != "cuda":
        raise KernelError(
            f"these kernels run on CUDA devices, not on {device}: there, "
            "qlab_kernels.reference_a8 computes the same"
        )
    layout = layout_of(torch.cuda.get_device_capability(device), numbers_of(packed.layout))
    if packed.layout != layout:
        raise KernelError(
            f"weights packed as {packed.layout} do not run here, which reads {layout}: lower them "
            "on this device"
        )


def x_and_weight(x: Activations, packed: Packed) -> tuple[Tensor, ...]:
    """The first arguments of the kernels; the scales again where there are no zero points."""
    zeros = packed.scales if packed.zeros is None else packed.zeros
    return x.p, x.t, x.sums, packed.words, packed.scales, zeros


def constants(t: Tensor, packed: Packed, config: Config) -> dict:
    """The constants that device, weights and configuration decide, and the options."""
    numbers, rows = numbers_of(packed.layout), packed.scales.shape[-2]
    return {
        "UNIT": UNIT[numbers],
        "FIXED": t.numel() == 1,
        "GROUP": 0 if rows == 1 else packed.group,
        "ZEROS": packed.zeros is not None,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "NUMBERS": numbers,
        "LAYOUT": packed.layout.partition("-")[0],
        "SEQUENCE": "plain" if interpreted() else "asm",
        "STAGES": config.stages,
        "num_warps": config.warps,
    }
