"""Attention of one new token in each of several rows, on a CPU: `one_token.cpp`, which reads keys
and values where they lie.

    p = softmax(q . k) over the positions that the mask reads,  y = sum p v
"""

import ctypes
import threading
from pathlib import Path

import torch
from torch import Tensor

from qlab_kernels.compiled import Uncompiled, library

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of keys and values, in the order of their numbers there
PATHS = ("best", "portable", "avx512")  # the best is the last one that the processor runs
_lock = threading.Lock()
_made: list[ctypes.CDLL | Uncompiled] = []  # the library, or why there is none; filled once


def loaded() -> ctypes.CDLL:
    """The kernel's library. Uncompiled where there is none."""
    with _lock:
        if not _made:
            try:
                _made.append(library(SOURCE))
            except Uncompiled as error:
                _made.append(error)
    if isinstance(_made[0], Uncompiled):
        raise _made[0]
    return _made[0]


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
    b, h, g, d = q_bhgd.shape
    q, e = q_bhgd.contiguous(), v_bhle.shape[-1]
    y = torch.empty(b, h, g, e, dtype=torch.float32)
    of_mask = (0, 0)
    if mask is not None:
        of_mask = (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(-1))
    strides = (*k_bhld.stride()[:3], *v_bhle.stride()[:3], *of_mask)
    loaded().qlab_one_token(
        _address(q),
        _address(k_bhld),
        _address(v_bhle),
        _address(mask),
        _address(y),
        ctypes.c_int64(DTYPES.index(k_bhld.dtype)),
        (ctypes.c_int64 * 6)(b, h, g, k_bhld.shape[2], d, e),
        (ctypes.c_int64 * 8)(*strides),
        ctypes.c_int64(PATHS.index(path)),
    )
    return y


def _address(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())
