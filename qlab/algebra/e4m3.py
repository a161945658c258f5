"""8-bit floats of 4 bits of exponent and 3 of mantissa as numbers of wider dtypes.

Moved by 4 bits, and with another bias of the exponent, e4m3 is bfloat16: x = 2^(e-7) (1 + m/8).
Numbers of e = 0 are subnormal, 2^-9 m = 2 x - 2^-6, which is the smaller one of x and 2 x - 2^-6
where e = 0 and the larger one elsewhere.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LONGER = 4  # by how many bits bfloat16 has a longer mantissa
BIAS = (127 - 7) << 7  # the difference of both biases, where bfloat16 has its exponent
MAGNITUDE = 127  # the bits beside the sign, all of which are set in a NaN
# Codes at once, whose numbers stay in cache: fresh memory costs more than the steps.
CHUNK = 1 << 17


def numbers(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes in a wider dtype, exactly: `codes.to(dtype)`, which takes a CPU several times as
    long. A compiler joins that with its neighbours."""
    is_slow = codes.dtype == E4M3 and codes.device.type == "cpu"
    if not is_slow or torch.compiler.is_compiling():
        return codes.to(dtype)
    wide = torch.empty(codes.shape, dtype=dtype)
    octets = codes.contiguous().view(torch.int8).flatten()
    for part, into in zip(octets.split(CHUNK), wide.view(-1).split(CHUNK), strict=True):
        into.copy_(_in_bfloat16(part))
    return wide


def _in_bfloat16(octets: Tensor) -> Tensor:
    """Codes as signed bytes in bfloat16."""
    signs = octets.to(torch.int16)
    magnitude = signs & MAGNITUDE
    signs.bitwise_and_(torch.iinfo(torch.int16).min)
    # A second bias makes the exponent of a NaN that of bfloat16's.
    biases = (magnitude + 1).bitwise_right_shift_(7).add_(1).mul_(BIAS)
    x = magnitude.bitwise_left_shift_(LONGER).add_(biases).view(torch.bfloat16)
    mended = torch.mul(x, 2, out=biases.view(torch.bfloat16)).sub_(2.0**-6)
    torch.minimum(x, mended, out=x)
    x.view(torch.int16).bitwise_or_(signs)
    return x
