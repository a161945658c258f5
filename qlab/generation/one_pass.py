"""Draws on a CPU by a kernel (`qlab_kernels.draw`): the tokens that `drawing.in_torch` draws, and
what `drawing.told_in_torch` tells of them, with log-probabilities that are rounded once."""

import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlab.generation.noise import BLOCK, noise
from qlab.generation.sampling import Drawing, Drawn

LOG2_E = math.log2(math.e)


def why_not() -> str | None:
    """Load the kernel. Why there is none, or None."""
    from qlab_kernels.draw import why_not

    return why_not()


def takes(logits_bv: Tensor) -> bool:
    """Whether there is a kernel that reads these logits."""
    from qlab_kernels.draw import takes

    return takes(logits_bv) and why_not() is None


def tokens(logits_bv: Tensor, drawings: Sequence[Drawing], path: str = "best") -> list[int | None]:
    """The token of each row of logits that the kernel takes. None where the reference has to say.
    path: of the kernel."""
    from qlab_kernels.draw import OUTSIDE, UNSURE, draw

    v, turn = logits_bv.shape[1], 0
    kept: list[Any] = []  # what rows point to
    rows = [_row(*each, kept) for each in zip(logits_bv, drawings)]
    left = [*range(len(rows))]
    while left:
        warm = [i for i in left if drawings[i].sampling.temperature]
        noise_bn = _noise([drawings[i] for i in warm], v, turn)
        for i, noise_n in zip(warm, noise_bn):
            rows[i].noise = noise_n.data_ptr()
        for i, row in zip(left, draw([rows[i] for i in left], v, path)):
            rows[i] = row
        left = [i for i in left if rows[i].token == OUTSIDE]
        turn += 1
    return [None if row.token == UNSURE else row.token for row in rows]


def told(
    logits_bv: Tensor,
    rows: Sequence[int],
    tokens: Sequence[int],
    counts: Sequence[int | None],
    path: str = "best",
) -> dict[int, Drawn]:
    """Row of logits that the kernel takes -> what is told of its token, but for the rows of which
    the reference has to say. path: of the kernel."""
    from qlab_kernels.draw import tell

    most = [min(counts[row] or 0, logits_bv.shape[1]) for row in rows]
    results = tell(logits_bv, rows, [tokens[row] for row in rows], most, path)
    return {
        row: Drawn(token=tokens[row], logprob=own, likeliest=tuple(zip(places[:count], logprobs)))
        for row, count, own, places, logprobs in zip(
            rows, most, *(result.tolist() for result in results)
        )
        if not math.isnan(own)
    }


def _noise(drawings: Sequence[Drawing], v: int, turn: int) -> Tensor:
    """Of the blocks and of the tokens of one, for each row."""
    names = [drawing.noise_name(turn) for drawing in drawings]
    return noise(-(-v // BLOCK) + BLOCK, [drawing.seed for drawing in drawings], names)


def _row(logits_v: Tensor, drawing: Drawing, kept: list[Any]) -> Any:
    """A row as the kernel takes it, without noise."""
    from qlab_kernels.draw import DTYPES, Row

    sampling = drawing.sampling
    if drawing.word is not None:
        logits_v = logits_v.to(torch.float32, copy=True)
        drawing.word.leave_out(logits_v)
        kept.append(logits_v)
    row = Row(
        logits=logits_v.data_ptr(),
        kind=DTYPES.index(logits_v.dtype),
        presence=sampling.presence_penalty,
        frequency=sampling.frequency_penalty,
        repetition=sampling.repetition_penalty,
        per_t=LOG2_E / sampling.temperature if sampling.temperature else 0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        top_p=sampling.top_p,
        above=-math.inf,
        mass=-1 if sampling.top_p < 1 else math.inf,
    )
    if sampling.counts:
        row.prompt, row.prompt_count = _pointer("q", drawing.prompt, kept)
        row.fresh, row.fresh_count = _pointer("q", drawing.new, kept)
    if sampling.logit_bias:
        row.biased, row.biased_count = _pointer("q", sampling.logit_bias, kept)
        row.bias, _ = _pointer("f", sampling.logit_bias.values(), kept)
    if len(drawing.new) < sampling.min_tokens and sampling.stop_ids:
        row.left_out, row.left_out_count = _pointer("q", sampling.stop_ids, kept)
    return row


def _pointer(kind: str, numbers: Any, kept: list[Any]) -> tuple[int, int]:
    """Where numbers lie side by side, and how many there are."""
    packed = numbers if isinstance(numbers, array) else array(kind, numbers)
    kept.append(packed)
    return packed.buffer_info()
