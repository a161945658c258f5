"""A kernel of the tests' own: packed words to dense codes by a named sequence."""

import torch
import triton
import triton.language as tl

from qlab_kernels.tile import codes, in_order


@triton.jit
def decode_kernel(
    words_ptr, out_ptr, LAYOUT: tl.constexpr, SEQUENCE: tl.constexpr, COMPUTE: tl.constexpr
):
    atom = tl.program_id(0)
    words = tl.load(words_ptr + atom * 2048 + tl.arange(0, 2048)).reshape(1, 2048)
    w = in_order(codes(words, SEQUENCE, COMPUTE), 1, 1, LAYOUT)
    tl.store(out_ptr + atom * 4096 + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :], w)


def decode(words, layout, sequence, dtype):
    """Atoms uint8 [a, 1, 1, 2048] -> codes -8..7 in `dtype` [a, 64, 64]."""
    out = torch.empty(words.shape[0], 64, 64, dtype=dtype, device=words.device)
    compute = tl.float16 if dtype == torch.float16 else tl.bfloat16
    decode_kernel[(words.shape[0],)](words, out, LAYOUT=layout, SEQUENCE=sequence, COMPUTE=compute)
    return out
