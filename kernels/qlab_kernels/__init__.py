"""int4 matmul kernels: needs torch, and triton only when a kernel is launched."""

from qlab_kernels.capability import TARGETS, Capability, KernelError, Target, admit, target
from qlab_kernels.config import (
    BUCKETS,
    Config,
    Problem,
    candidates,
    heuristic,
    kernel_revision,
    legal,
)
from qlab_kernels.layout import Packed, pack, unpack

__all__ = [
    "BUCKETS",
    "TARGETS",
    "Capability",
    "Config",
    "KernelError",
    "Packed",
    "Problem",
    "Target",
    "admit",
    "candidates",
    "heuristic",
    "kernel_revision",
    "legal",
    "pack",
    "target",
    "unpack",
]
