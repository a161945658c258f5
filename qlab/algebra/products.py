"""Which arithmetic multiplies 16-bit matrices on this processor: the same sums in fp32, at the rate
that it has for them."""

import torch
from torch import Tensor

from qlab.process import processor


def product_dtype(x: Tensor) -> torch.dtype:
    """What to multiply x [..., k] by a matrix in, before one rounding to x's own dtype; sums are
    fp32 either way.

    Without units for bf16 a processor takes up to twice as long for 16-bit matrices as for fp32
    copies of them, without AVX-512 ten to thirty times, once there are rows enough to make up for
    the copies; with units it takes half as long.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    here = processor.here()
    if x.dtype == torch.bfloat16 and here.bf16_units:
        return x.dtype
    rows = x.numel() // max(x.shape[-1], 1)
    return torch.float32 if rows >= here.rows_worth_copies else x.dtype
