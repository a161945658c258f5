"""Weights rounded to the nearest integer codes on a CPU: `nearest.cpp`, which fits the scales of
their range, rounds, and measures the errors while a group of channels is in the cache.

    s = absmax / reach, or (hi - lo) / (qmax - qmin);  z = round(qmin - lo / s)
    c = clamp(round(W / s + z)), with s as it is stored;  D = (c - z) s - W

And codes of 4 or 8 bits as bytes: code + 2^(bits-1), two of 4 bits in a byte, the first one low.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlab_kernels.buffers import empty
from qlab_kernels.compiled import missing, on_path, paths_of

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of weights and scales


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A weight [o, k] in groups of n channels of a row.

    codes: int8 [o, k]. scales: [o, k / n]. zeros: int8 [o, k / n], or None. sums: fp64 [parts, 3],
    of every part of the rows: the sum of D^2, that of W^2, and max |D| / s.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    sums: Tensor


class _Problem(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "stride", "o", "k", "group", "qmin", "qmax")),
        ("reach", ctypes.c_float),
        ("symmetric", ctypes.c_int32),
        ("measures", ctypes.c_int32),
        ("scale_kind", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("scales", "zeros", "codes")),
        ("rows", ctypes.c_int64),
        ("sums", ctypes.c_void_p),
    )


class _Stream(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "bytes")),
        *((name, ctypes.c_int64) for name in ("count", "bits")),
    )


def why_not() -> str | None:
    """Load the kernel. Why there is none, or None."""
    return missing(SOURCE)


def supported() -> tuple[str, ...]:
    """The paths that this processor runs, from the slowest to the fastest."""
    return paths_of(SOURCE)


def takes(W_ok: Tensor) -> bool:
    """Whether the kernel reads this weight: on a CPU, in a dtype of DTYPES, channels side by
    side."""
    is_dense = W_ok.device.type == "cpu" and W_ok.layout == torch.strided
    return is_dense and W_ok.dtype in DTYPES and W_ok.ndim == 2 and W_ok.stride(1) == 1


def round_weight(
    W_ok: Tensor,
    *,
    bits: int,
    group: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    rows: int,
    path: str = "best",
) -> Rounded | None:
    """A weight that the kernel takes, rounded. None where it holds NaN or Inf, or a scale or an
    error overflows.

    group: channels under a scale, which divide k. rows: rows of a part, whose errors are summed;
    torch's number of threads rounds as many parts at once. path: one of `supported()`, or the best.
    """
    o, k = W_ok.shape
    codes = empty((o, k), torch.int8)
    scales = torch.empty((o, k // group), dtype=scale_dtype, device="cpu")
    zeros = None if symmetric else torch.empty(scales.shape, dtype=torch.int8, device="cpu")
    sums = torch.empty((-(-o // rows), 3), dtype=torch.float64, device="cpu")
    rounded = Rounded(codes=codes, scales=scales, zeros=zeros, sums=sums)
    problem = _problem(W_ok, rounded, rows)
    problem.qmin, problem.qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    problem.reach = (problem.qmax - problem.qmin) / 2
    problem.epsilon = torch.finfo(scale_dtype).eps
    return None if _call("qlab_round", problem, path, torch.get_num_threads()) else rounded


def measure(
    W_ok: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    rows: int,
    path: str = "best",
) -> Tensor | None:
    """`Rounded.sums` of a weight that the kernel takes and codes, scales and zeros that are there.
    None where a scale is 0, or an error is not finite."""
    sums = torch.empty((-(-len(codes) // rows), 3), dtype=torch.float64, device="cpu")
    made = Rounded(codes=codes, scales=scales, zeros=zeros, sums=sums)
    problem = _problem(W_ok, made, rows)
    problem.measures = True
    return None if _call("qlab_round", problem, path, torch.get_num_threads()) else sums


def measures(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> bool:
    """Whether `measure` takes such codes: int8, in groups of a row, contiguous and on a CPU."""
    are_whole = all(_is_plain(part, torch.int8) for part in (codes, zeros) if part is not None)
    return are_whole and _is_plain(scales, *DTYPES)


def _problem(W_ok: Tensor, made: Rounded, rows: int) -> _Problem:
    o, k = W_ok.shape
    return _Problem(
        weight=W_ok.data_ptr(),
        kind=DTYPES.index(W_ok.dtype),
        stride=W_ok.stride(0),
        o=o,
        k=k,
        group=k // made.scales.shape[1],
        symmetric=made.zeros is None,
        scale_kind=DTYPES.index(made.scales.dtype),
        scales=made.scales.data_ptr(),
        zeros=None if made.zeros is None else made.zeros.data_ptr(),
        codes=made.codes.data_ptr(),
        rows=rows,
        sums=made.sums.data_ptr(),
    )


def _call(name: str, problem: ctypes.Structure, path: str, *more: int) -> int:
    """What a function of the library says of a problem. Uncompiled where there is none. more: its
    other arguments."""
    loaded, number = on_path(SOURCE, path)
    return getattr(loaded, name)(ctypes.byref(problem), *map(ctypes.c_int64, (number, *more)))


def pack(codes: Tensor, bits: int, path: str = "best") -> Tensor:
    """int8 codes [..., k] -> int32 words [..., k bits / 32], both contiguous and on a CPU."""
    *rows, k = codes.shape
    words = empty((*rows, k * bits // 32), torch.int32)
    _call("qlab_pack", _stream(codes, words, bits), path)
    return words


def unpack(words: Tensor, bits: int, path: str = "best") -> Tensor:
    """The inverse of pack."""
    *rows, k = words.shape
    codes = empty((*rows, k * 32 // bits), torch.int8)
    _call("qlab_unpack", _stream(codes, words, bits), path)
    return codes


def packs(codes: Tensor, bits: int) -> bool:
    """Whether `pack` takes these codes: int8 of 4 or 8 bits, in rows of whole words, contiguous and
    on a CPU."""
    is_whole = bits in (4, 8) and codes.shape[-1] * bits % 32 == 0
    return is_whole and _is_plain(codes, torch.int8)


def unpacks(words: Tensor, bits: int) -> bool:
    """Whether `unpack` takes these words: int32, of codes of 4 or 8 bits, contiguous and on a
    CPU."""
    return bits in (4, 8) and _is_plain(words, torch.int32)


def _is_plain(tensor: Tensor, *dtypes: torch.dtype) -> bool:
    is_dense = tensor.device.type == "cpu" and tensor.is_contiguous()
    return is_dense and tensor.dtype in dtypes


def _stream(codes: Tensor, words: Tensor, bits: int) -> _Stream:
    count = codes.numel()
    return _Stream(codes=codes.data_ptr(), bytes=words.data_ptr(), count=count, bits=bits)
