"""Attention of one new token in each of several rows, on a CPU: `one_token.cpp`, which reads keys
and values where they lie.

    p = softmax(q . k) over the positions that the mask reads,  y = sum p v

    qlab::one_token(q, k, v, at, mask, path) -> y      at [b, l]: the slots that a row reads of keys
        and values [slots, h, d], or empty where these are [b, h, l, d]; mask empty where all is
        read; path a number of `PATHS`

The library registers the operator when it is loaded, so that a compiled graph calls it without
Python. It has no gradient.
"""

from pathlib import Path

import torch
from torch import Tensor

from qlab_kernels.compiled import registered

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of keys and values
PATHS = ("best", "portable", "avx512")  # the best is the last one that the processor runs

torch.library.define(
    "qlab::one_token", "(Tensor q, Tensor k, Tensor v, Tensor at, Tensor mask, int path) -> Tensor"
)
OPERATOR = torch.ops.qlab.one_token.default


@torch.library.register_fake("qlab::one_token")
def _(q, k, v, at, mask, path):
    return q.new_empty(*q.shape[:3], v.shape[-1])


def why_not() -> str | None:
    """Load the kernel and give torch its operator. Why there is none, or None."""
    return registered(SOURCE)


def takes(k_bhld: Tensor, v_bhld: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel multiplies these keys and values: float32 or bfloat16 on a CPU, channels
    side by side, and a mask of bool that is the same for all heads."""
    are_plain = all(t.device.type == "cpu" and t.stride(-1) == 1 for t in (k_bhld, v_bhld))
    is_plain = mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))
    return are_plain and is_plain and k_bhld.dtype == v_bhld.dtype and k_bhld.dtype in DTYPES


def attend(
    q_bhgd: Tensor, k_bhld: Tensor, v_bhle: Tensor, mask: Tensor | None, path: str = "best"
) -> Tensor:
    """y [b, h, g, e] in fp32, of q in fp32 that is scaled already, and keys and values that the
    kernel takes. mask: bool [b or 1, 1, 1, l], whether a position is read; a row that reads none is
    zero. path: one of PATHS."""
    at = q_bhgd.new_empty(0, dtype=torch.int64)
    read = q_bhgd.new_empty(0, dtype=torch.bool) if mask is None else mask
    return OPERATOR(q_bhgd.contiguous(), k_bhld, v_bhle, at, read, PATHS.index(path))
