"""What every launch derives from its operands: the dequantization sequence of the device, and
tensors shaped as kernels read them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlab_kernels.capability import Capability, KernelError, Target, admit, target
from qlab_kernels.config import Config
from qlab_kernels.layout import Packed

_TL = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels (TRITON_INTERPRET=1 before it was imported)."""
    return bool(triton.knobs.runtime.interpret)


def stored(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel stores for results in `dtype`: the interpreter truncates fp32 to
    bf16, so there torch rounds them."""
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


def reads_packed(packed: Packed) -> bool:
    """Whether the device of these weights has a Triton kernel for them; 7.0 and 7.2 have none."""
    return interpreted() or _capability(packed.words)[1].path != "dequantize"


def setting(x: Tensor, packed: Packed) -> dict:
    """The constants that the device and the weights decide: GROUP (0: one scale per row), LAYOUT,
    SEQUENCE, COMPUTE."""
    rows = packed.scales.shape[-2]
    if rows > 1 and rows * packed.group != packed.padded_k:
        raise KernelError(
            f"{rows} scales per row do not cover {packed.padded_k} codes in groups of "
            f"{packed.group}: pack them anew"
        )
    group = 0 if rows == 1 else packed.group
    if interpreted():
        compute = tl.float32 if x.dtype == torch.bfloat16 else _TL[x.dtype]
        return {"GROUP": group, "LAYOUT": packed.layout, "SEQUENCE": "plain", "COMPUTE": compute}
    cc, row = _capability(x)
    admit(cc, x.dtype)
    if packed.layout != row.layout:
        raise KernelError(
            f"weights packed as {packed.layout} do not run here, which reads {row.layout}: lower "
            "them on this device"
        )
    return {
        "GROUP": group,
        "LAYOUT": packed.layout,
        "SEQUENCE": row.sequence,
        "COMPUTE": _TL[x.dtype],
    }


def _capability(t: Tensor) -> tuple[Capability, Target]:
    if t.device.type != "cuda":
        raise KernelError(
            f"these kernels run on CUDA devices, not on {t.device}: there, qlab_kernels.reference "
            "computes the same"
        )
    cc = torch.cuda.get_device_capability(t.device)
    return cc, target(cc)


def options(config: Config, layout: str) -> dict[str, int]:
    """What the tensor-core kernels are compiled with. Left alone, the assembler spills a few
    registers of the mma.sync kernels before the loop to fit one block more; 168 is what three
    blocks of 4 warps leave."""
    limit = {"maxnreg": 168} if layout == "mma2" and config.warps == 4 and config.bm <= 32 else {}
    return {"num_warps": config.warps, **limit}


def operands(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """x contiguous and padded along k; scales and zeros as int32 pairs (the scales again where
    there are no zeros)."""
    if x.dim() != 2 or x.shape[1] != packed.k:
        raise KernelError(f"x is [tokens, {packed.k}] for these weights, not {tuple(x.shape)}")
    if x.dtype != packed.scales.dtype:
        raise KernelError(
            f"weights packed for {packed.scales.dtype} do not multiply {x.dtype} activations: "
            "pack them for these"
        )
    missing = packed.padded_k - packed.k
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x.contiguous()
    scales = packed.scales.view(torch.int32)
    return x, scales, scales if packed.zeros is None else packed.zeros.view(torch.int32)
