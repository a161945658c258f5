"""Products of int4 or int8 weights with activations rounded to int8, on a CPU: `int4_int8.cpp`, the
order of its words, and the same product in plain torch.

    a, s_x = rounded(x)              for every 32 channels of a token: a = round(x / s_x), s_x =
                                     absmax / 127
    y [m, n] = sum over blocks of s_w * s_x * sum_k (q - z) a
"""

import ctypes
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab_kernels.compiled import Uncompiled, library

SOURCE = Path(__file__).with_suffix(".cpp")
# ways to compute the same; "best" is the last one that the processor runs
PATHS = ("best", "portable", "avx2", "avx512_vnni", "amx")
BLOCK = 32  # channels of x that share a scale
ROWS = 16  # rows of W that stand side by side
TINY = 1e-30  # a block of x below it is zero
_lock = threading.Lock()
_best: list[int | Uncompiled] = []  # the number of the best path, or why there is none; filled once


def best_path() -> str:
    """Load the kernel and give torch its operators; the name of the fastest path that this
    processor runs. Uncompiled where there is no kernel."""
    with _lock:
        if not _best:
            try:
                _best.append(_loaded())
            except Uncompiled as error:
                _best.append(error)
    if isinstance(_best[0], Uncompiled):
        raise _best[0]
    return PATHS[_best[0]]


def _loaded() -> int:
    loaded = library(SOURCE)
    loaded.qlab_best_path.restype = ctypes.c_int64
    best = int(loaded.qlab_best_path())
    if PATHS[best] == "portable":
        raise Uncompiled("the processor has no AVX2")
    if loaded.qlab_register():
        raise Uncompiled(f"torch {torch.__version__} does not take operators of a library")
    return best


def supported() -> tuple[str, ...]:
    """The paths that this processor runs, from the slowest to the fastest."""
    return PATHS[1 : PATHS.index(best_path()) + 1]


# ---------------------------------------------------------------- the order of words and scales
def pack(codes_nk: Tensor, bits: int) -> Tensor:
    """int8 codes [n, k], of 4 or 8 bits -> uint8 words [n / 16, k / 32, 64 bits], both rounded up.
    What is appended has the code 0."""
    n, k = codes_nk.shape
    padded = F.pad(codes_nk, (0, -k % BLOCK, 0, -n % ROWS))
    u = (padded.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    lanes = u.view(u.shape[0] // ROWS, ROWS, -1, BLOCK // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return lanes.flatten(2).contiguous()
    low, high = lanes[:, :, ::2], lanes[:, :, 1::2]
    return (low | high << 4).flatten(2).contiguous()


def unpack(words: Tensor, n: int, k: int) -> Tensor:
    """The inverse of pack: int8 codes [n, k]."""
    bits = bits_of(words)
    u = words.unflatten(2, (-1, ROWS, 4))
    if bits == 4:
        u = torch.stack([u & 15, u >> 4], 3).flatten(2, 3)
    u = u.permute(0, 3, 1, 2, 4).flatten(2).flatten(0, 1)[:n, :k]
    return (u.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def bits_of(words: Tensor) -> int:
    """Bits of a code in these words."""
    return 8 * words.shape[-1] // (ROWS * BLOCK)


def beside(of_ng: Tensor) -> Tensor:
    """Scales or zeros [n, groups] as [n / 16, groups, 16]; appended rows have 0."""
    n = of_ng.shape[0]
    padded = F.pad(of_ng, (0, 0, 0, -n % ROWS))
    return padded.unflatten(0, (-1, ROWS)).mT.contiguous()


def apart(beside_rgn: Tensor, n: int) -> Tensor:
    """The inverse of beside: [n, groups]."""
    return beside_rgn.mT.flatten(0, 1)[:n]


# ---------------------------------------------------------------- the same in plain torch
def rounded(x_mk: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [m, b, 32] of integers in fp32, scales [m, b]) of x, its channels padded with zeros. A
    block with an inf or a NaN has codes 0 and the scale NaN."""
    x = F.pad(x_mk.float(), (0, -x_mk.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    absmax = x.abs().amax(-1)
    is_finite, is_zero = x.isfinite().all(-1), absmax < TINY
    # a number over a tensor would be its reciprocal times the number, which rounds twice
    inverse = torch.where(is_finite & ~is_zero, absmax.new_tensor(127) / absmax, 0)
    codes = (torch.where(is_finite[..., None], x, 0) * inverse[..., None]).round()
    scales = torch.where(is_zero, 0, absmax / 127)
    return codes, torch.where(is_finite, scales, torch.nan)


def product(
    x_mk: Tensor, codes_nk: Tensor, scales_ng: Tensor, zeros_ng: Tensor | None, group: int
) -> Tensor:
    """y [m, n] in fp64, of unpacked codes, with exact sums inside of every block."""
    a_mbi, s_mb = rounded(x_mk)
    q = F.pad(codes_nk.double(), (0, a_mbi.shape[1] * BLOCK - codes_nk.shape[1]))
    if zeros_ng is not None:
        q = q - zeros_ng.double().repeat_interleave(group, 1)[:, : q.shape[1]]
    dots = torch.einsum("mbi,nbi->mnb", a_mbi.double(), q.unflatten(1, (-1, BLOCK)))
    scales = scales_ng.double().repeat_interleave(group // BLOCK, 1)[:, : a_mbi.shape[1]]
    return torch.einsum("mnb,mb,nb->mn", dots, s_mb.double(), scales)
