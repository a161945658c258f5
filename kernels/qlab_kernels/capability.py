"""What each NVIDIA compute capability runs: kernel path, weight layout, dequantization sequence,
shared memory, dtypes.

Shared memory per thread block: CUDA C++ programming guide, table of technical specifications per
compute capability.
"""

from dataclasses import dataclass
from typing import Literal

import torch

Capability = tuple[int, int]
Path = Literal["fused", "fma", "dequantize"]
KIB = 1024


class KernelError(ValueError):
    """A refusal in one sentence: what was asked for, and what would work."""


@dataclass(frozen=True)
class Target:
    """One row of the table.

    path: "fused" = dequantization inside a tensor-core matmul; "fma" = fused on the CUDA cores for
    few tokens (Triton emits no tensor-core code for 7.5); "dequantize" = plain torch, then the
    library's matmul (Triton does not compile for it). layout: how `layout.pack` orders the codes.
    smem: bytes of shared memory that one thread block may take.
    dtypes: of the activations. sequence: how bf16 codes are made, "sub" where `sub.bf16x2` exists,
    else "fma", else "none".
    """

    path: Path
    layout: str
    smem: int
    dtypes: tuple[torch.dtype, ...]
    sequence: str


_HALF = (torch.float16,)
_BOTH = (torch.bfloat16, torch.float16)
TARGETS: dict[Capability, Target] = {
    (7, 0): Target("dequantize", "rows", 96 * KIB, _HALF, "none"),
    (7, 2): Target("dequantize", "rows", 96 * KIB, _HALF, "none"),
    (7, 5): Target("fma", "rows", 64 * KIB, _HALF, "none"),
    (8, 0): Target("fused", "mma2", 163 * KIB, _BOTH, "fma"),
    (8, 6): Target("fused", "mma2", 99 * KIB, _BOTH, "fma"),
    (8, 7): Target("fused", "mma2", 163 * KIB, _BOTH, "fma"),
    (8, 9): Target("fused", "mma2", 99 * KIB, _BOTH, "fma"),
    (9, 0): Target("fused", "wgmma", 227 * KIB, _BOTH, "sub"),
    (10, 0): Target("fused", "mma2", 227 * KIB, _BOTH, "sub"),
    (12, 0): Target("fused", "mma2", 99 * KIB, _BOTH, "sub"),
}


def target(cc: Capability) -> Target:
    """The row of a compute capability, e.g. (9, 0). KernelError when there is none."""
    try:
        return TARGETS[cc]
    except KeyError:
        known = ", ".join(f"{major}.{minor}" for major, minor in TARGETS)
        name = f"{cc[0]}.{cc[1]}" if isinstance(cc, tuple) and len(cc) == 2 else repr(cc)
        raise KernelError(
            f"no kernels for compute capability {name}: there are some for {known}; elsewhere "
            "dequantize the weights once and run the dense model"
        ) from None


def admit(cc: Capability, dtype: torch.dtype) -> Target:
    """The row of `cc`, or KernelError when its kernels do not take activations of `dtype`."""
    row = target(cc)
    if dtype not in row.dtypes:
        able = " or ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        raise KernelError(
            f"compute capability {cc[0]}.{cc[1]} multiplies {able} activations with int4 weights, "
            f"not {str(dtype).removeprefix('torch.')}: cast the model to {able.split(' or ')[0]}"
        )
    return row
