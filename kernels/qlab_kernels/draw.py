"""Tokens of rows of logits on a CPU, and what is told of them: `draw.cpp`, which reads each row
about twice for either.

It computes what the reference (`qlab/generation/drawing.py`) does, and leaves to it the rows whose
token hangs on the rounding of a sum. So its tokens are the reference's. Its log-probabilities are
rounded once, from sums in fp64.
"""

import ctypes
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlab_kernels.compiled import missing, on_path, paths_of

SOURCE = Path(__file__).with_suffix(".cpp")
DTYPES = (torch.float32, torch.bfloat16)  # of logits
UNSURE, OUTSIDE = -1, -2  # what stands in the place of a token


class Row(ctypes.Structure):
    """A row of logits, and what is asked of its draw.

    logits: where its numbers lie. kind: their place in DTYPES. prompt, fresh: the tokens so far,
    int64. biased, bias: tokens with what is added to their logits, int64 and fp32. left_out: tokens
    that must not come. per_t: log2(e) over the temperature; 0 takes the likeliest token. noise:
    fp32, of all blocks and of the tokens of one. above: only tokens of greater logits are drawn,
    -inf for all. mass: of the nucleus; below 0 until it is summed up, inf where all is in it.
    token: what was drawn; UNSURE where the reference has to say; OUTSIDE of the nucleus, where
    `above` and `mass` are filled in, so that the row can be drawn again with other noise.
    """

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("prompt", "fresh", "biased", "left_out")),
        ("prompt_count", ctypes.c_int64),
        ("fresh_count", ctypes.c_int64),
        ("biased_count", ctypes.c_int64),
        ("left_out_count", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("presence", ctypes.c_double),
        ("frequency", ctypes.c_double),
        ("repetition", ctypes.c_float),
        ("per_t", ctypes.c_float),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("noise", ctypes.c_void_p),
        ("above", ctypes.c_float),
        ("mass", ctypes.c_float),
        ("token", ctypes.c_int64),
    )


class Told(ctypes.Structure):
    """What is told of tokens of some rows of logits: for each, its row, its token, and how many of
    the likeliest ones (`counts`, up to `most`), int64.

    logits: where the numbers of the first row lie, in the dtype of `kind`; those of the next one
    lie `stride` numbers behind. own: the log-probability of each token, fp32; NaN where the
    reference has to say. places, logprobs: of the likeliest tokens, int64 and fp32, `most` of each,
    the likeliest first, and of equal ones the first in the row.
    """

    _fields_ = (
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "stride", "v")),
        *((name, ctypes.c_void_p) for name in ("rows", "tokens", "counts")),
        ("most", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("own", "places", "logprobs")),
    )


def why_not() -> str | None:
    """Load the kernel. Why there is none, or None."""
    return missing(SOURCE)


def supported() -> tuple[str, ...]:
    """The paths that this processor runs, from the slowest to the fastest."""
    return paths_of(SOURCE)


def takes(logits_bv: Tensor) -> bool:
    """Whether the kernel reads these logits: on a CPU, in a dtype of DTYPES, side by side."""
    is_dense = logits_bv.device.type == "cpu" and logits_bv.layout == torch.strided
    return is_dense and logits_bv.dtype in DTYPES and logits_bv.stride(1) == 1


def draw(rows: Sequence[Row], v: int, path: str = "best") -> list[Row]:
    """The rows of v logits, filled in. path: one of `supported()`, or the best."""
    loaded, number = on_path(SOURCE, path)
    table = (Row * len(rows))(*rows)
    loaded.qlab_draw(table, *map(ctypes.c_int64, (len(rows), v, number)))
    return list(table)


def tell(
    logits_bv: Tensor,
    rows: Sequence[int],
    tokens: Sequence[int],
    counts: Sequence[int],
    path: str = "best",
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities [r] of tokens of some rows of logits that the kernel takes, NaN where
    the reference has to say; the likeliest tokens [r, n], of which the first `count` of each are
    filled in, and theirs. Counts: from 0 to v. path: one of `supported()`, or the best."""
    loaded, number = on_path(SOURCE, path)
    r, most = len(rows), max(counts, default=0)
    asked = [array("q", numbers) for numbers in (rows, tokens, counts)]
    own = torch.empty(r, dtype=torch.float32)
    places = torch.empty((r, most), dtype=torch.int64)
    logprobs = torch.empty((r, most), dtype=torch.float32)
    told = Told(
        logits_bv.data_ptr(),
        DTYPES.index(logits_bv.dtype),
        logits_bv.stride(0),
        logits_bv.shape[1],
        *(numbers.buffer_info()[0] for numbers in asked),
        most,
        *(result.data_ptr() for result in (own, places, logprobs)),
    )
    loaded.qlab_tell(ctypes.byref(told), *map(ctypes.c_int64, (r, number)))
    return own, places, logprobs
