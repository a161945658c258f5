"""AWQ's other layouts, read only: the numbers of version gemm (4 bits, W = s * (q - z)) in the
orders that matrix-vector kernels want.

    gemv       qweight int32 [N, K/8]    word c of a row holds columns 8c to 8c + 7, from the low
                                         nibble up
               qzeros  int32 [N, Z]      zero points of a row's groups, the same way
               scales  float16 [N, 8Z]
    gemv_fast  qweight int16 [N/4, K]    of four rows and 64 columns at a time: word 16r + 8h + a of
                                         row r holds columns 32h + a + (0, 8, 16, 24), from the low
                                         nibble up
               qzeros  float16 [8Z, N]   -(s * z), rounded
               scales  float16 [8Z, N]
    llm-awq    as gemv_fast, with qzeros called scaled_zeros

Z is K / (8 * group), rounded up to a multiple of 1, of 2 for groups of 64, of 4 for groups of 32.
Numbers behind the last group are padding. Source: AutoAWQ's gemv.py and gemv_fast.py, llm-awq's
qmodule.py.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor

from qlab.algebra.bits import signed, unpack
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int
from qlab.codecs import checks
from qlab.errors import QlabError

# version -> the name of its zero points
ZEROS = {"gemv": "qzeros", "gemv_fast": "qzeros", "llm-awq": "scaled_zeros"}
MULTIPLES = {32: 4, 64: 2}  # group -> what Z is a multiple of; 1 for groups of 128 and more


def decode(version: str, path: str, tensors: Mapping[str, Tensor], spec: Int) -> QTensor:
    """The leaf [o, k] of a module.

    Refuses missing, misshaped and unexpected tensors, scaled zero points that do not come from 0 to
    15, and zero points other than 8 where the config says symmetric.
    """
    checks.check_names(path, f"AWQ {version}", tensors, ("qweight", "scales", ZEROS[version]))
    codes = _codes(path, tensors) if version == "gemv" else _interleaved_codes(path, tensors)
    o, k = codes.shape
    group = spec.tile.cols or k
    if k % group or (group < 128 and group not in MULTIPLES):
        raise QlabError(
            f"{path} has groups of {group} for {k} input channels; "
            f"AWQ {version} has groups of 32, 64, 128 and more, which divide them"
        )
    groups, multiple = k // group, MULTIPLES.get(group, 1)
    width = -(-groups // (8 * multiple)) * multiple
    dtypes = checks.scale_dtypes(spec)
    if version == "gemv":
        padded = checks.take(path, tensors, "scales", (o, 8 * width), *dtypes)
        scales = padded[:, :groups].contiguous()
        words = checks.take(path, tensors, "qzeros", (o, width), torch.int32)
        zeros = signed(unpack(words, 4, 8 * width), 4)[:, :groups].contiguous()
    else:
        padded = checks.take(path, tensors, "scales", (8 * width, o), *dtypes)
        padded_zeros = checks.take(path, tensors, ZEROS[version], (8 * width, o), *dtypes)
        scales, scaled_zeros = (t[:groups].mT.contiguous() for t in (padded, padded_zeros))
        zeros = _unscaled(f"{path}.{ZEROS[version]}", scaled_zeros, scales)
    # Writers keep scales above 0, so a last group of zeros alone is padding.
    if not bool(scales[:, -1].any()):
        raise QlabError(
            f"{path} has no scales for the last of its {groups} groups; "
            "they are cut off, or its group_size is another"
        )
    if spec.symmetric and not bool((zeros == 0).all()):
        raise QlabError(
            f"{path} has zero points other than 8, as a symmetric file has them; "
            "its config must say zero_point true"
        )
    return QTensor(codes, scales, None if spec.symmetric else zeros, spec)


def _codes(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """gemv's codes, int8 [o, k]."""
    words = checks.take(path, tensors, "qweight", (None, None), torch.int32)
    return signed(unpack(words, 4, 8 * words.shape[1]), 4)


def _interleaved_codes(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """The codes of gemv_fast and llm-awq, int8 [o, k]."""
    words = checks.take(path, tensors, "qweight", (None, None), torch.int16)
    if words.shape[1] % 64:
        raise QlabError(
            f"{path}.qweight {tuple(words.shape)} is not made of 64 columns at a time; "
            "the file or its config is wrong"
        )
    nibbles = torch.stack([(words >> 4 * b & 15).to(torch.uint8) for b in range(4)], -1)
    codes = rearrange(nibbles, "n (c r h a) b -> (n r) (c h b a)", r=4, h=2, a=8)
    return signed(codes.contiguous(), 4)


def _unscaled(name: str, scaled: Tensor, scales: Tensor) -> Tensor:
    """z - 8, int8, where `scaled` holds -(s * z) rounded to its dtype. A scale of 0 leaves z open:
    it becomes 8."""
    s = scales.float()
    z = torch.where(s == 0, 8.0, (-scaled.float() / s).round())
    if not bool(((z >= 0) & (z <= 15) & (-(s * z)).to(scaled.dtype).eq(scaled)).all()):
        raise QlabError(
            f"{name} holds no rounded products of scales and zero points from 0 to 15; "
            "the file is damaged"
        )
    return (z - 8).to(torch.int8)
