"""In which dtype this processor multiplies 16-bit matrices fastest. Sums are fp32 in either."""

import torch
from torch import Tensor

from qlab.process import processor


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which to multiply x [..., k] by a matrix, before the result is rounded to the
    dtype of x.

    A processor without units for bf16 takes up to twice as long for 16-bit matrices as for fp32
    copies of them, and one without AVX-512 ten to thirty times as long, if there are enough rows to
    make up for the copies. A processor with units takes half as long.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x.dtype
    cpu = processor.here()
    if x.dtype == torch.bfloat16 and cpu.bf16_units:
        return x.dtype
    rows = x.numel() // max(x.shape[-1], 1)
    return torch.float32 if rows >= cpu.rows_worth_copies else x.dtype
