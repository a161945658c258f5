"""AWQ's other layouts, read only: the numbers of version gemm in the orders of matrix-vector
kernels. 4 bits, W = s * (q - z).

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

Z is K / (8 * group) rounded up, to a multiple of 2 for groups of 64 and of 4 for groups of 32. What
lies behind the last group is padding. Source: AutoAWQ's gemv.py and gemv_fast.py, llm-awq's
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

ZEROS = {
    "gemv": "qzeros",
    "gemv_fast": "qzeros",
    "llm-awq": "scaled_zeros",
}  # version -> what it calls its zero points
MULTIPLES = {32: 4, 64: 2}  # group -> what Z is a multiple of; 1 for groups of 128 and more


def decode(version: str, path: str, tensors: Mapping[str, Tensor], spec: Int) -> QTensor:
    """The leaf [o, k] of a module; refuses missing, misshaped and unexpected tensors, scaled zero
    points that are none of 0 to 15, and zero points other than 8 where the config says
    symmetric."""
    checks.check_names(path, f"AWQ {version}", tensors, ("qweight", "scales", ZEROS[version]))
    codes = _codes(path, tensors) if version == "gemv" else _interleaved_codes(path, tensors)
    o, k = codes.shape
    group = spec.tile.cols or k
    if k % group or (group < 128 and group not in MULTIPLES):
        raise QlabError(
            f"{path} has groups of {group} for {k} input channels; AWQ {version} has groups of "
            "32, 64, 128 and more, which divide them"
        )
    groups, multiple = k // group, MULTIPLES.get(group, 1)
    width = -(-groups // (8 * multiple)) * multiple
    if version == "gemv":
        scales = checks.take(path, tensors, "scales", (o, 8 * width), *checks.scale_dtypes(spec))[
            :, :groups
        ].contiguous()
        words = checks.take(path, tensors, "qzeros", (o, width), torch.int32)
        zeros = signed(unpack(words, 4, 8 * width), 4)[:, :groups].contiguous()
    else:
        name, halves = ZEROS[version], checks.scale_dtypes(spec)
        scales, scaled = (
            checks.take(path, tensors, n, (8 * width, o), *halves)[:groups].mT.contiguous()
            for n in ("scales", name)
        )
        zeros = _unscaled(f"{path}.{name}", scaled, scales)
    if not bool(scales[:, -1].any()):  # padding, by the looks of it: writers keep scales above 0
        raise QlabError(
            f"{path} has no scales for the last of its {groups} groups; they are cut off, or its "
            "group_size is another"
        )
    if spec.symmetric and not bool((zeros == 0).all()):
        raise QlabError(
            f"{path} has zero points other than 8, as a symmetric file has them; its config must "
            "say zero_point true"
        )
    return QTensor(codes, scales, None if spec.symmetric else zeros, spec)


def _codes(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    words = checks.take(path, tensors, "qweight", (None, None), torch.int32)
    return signed(unpack(words, 4, 8 * words.shape[1]), 4)


def _interleaved_codes(path: str, tensors: Mapping[str, Tensor]) -> Tensor:
    words = checks.take(path, tensors, "qweight", (None, None), torch.int16)
    if words.shape[1] % 64:
        raise QlabError(
            f"{path}.qweight {tuple(words.shape)} is not made of 64 columns at a time; the file "
            "or its config is wrong"
        )
    nibbles = torch.stack([(words >> 4 * b & 15).to(torch.uint8) for b in range(4)], -1)
    return signed(
        rearrange(nibbles, "n (c r h a) b -> (n r) (c h b a)", r=4, h=2, a=8).contiguous(), 4
    )


def _unscaled(name: str, scaled: Tensor, scales: Tensor) -> Tensor:
    """z - 8 where scaled = -(s * z) as it was rounded; a scale of 0 has any zero point, and 8
    here."""
    s = scales.float()
    z = torch.where(s == 0, 8.0, (-scaled.float() / s).round())
    if not bool(((z >= 0) & (z <= 15) & (-(s * z)).to(scaled.dtype).eq(scaled)).all()):
        raise QlabError(
            f"{name} holds no rounded products of scales and zero points from 0 to 15; the file "
            "is damaged"
        )
    return (z - 8).to(torch.int8)
