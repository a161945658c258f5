"""Which token comes next, of the logits of many requests at once.

    x = logits less penalties, plus biases; -inf where a grammar does not go on
    token = argmax x                                    at temperature 0
    e = exp((x - max x) / T), 0 where a filter          else: how likely a token is beside the
        leaves the token out                            likeliest one
    block = argmax_c (log sum_{i in c} e_i + noise_c)
    token = argmax_{i in block} (log e_i + noise_i)
    noise = -log(-log(u)),  u uniform, of the request's seed and the token's number

The Gumbel noise makes both a draw from e / sum e (Gumbel 1954). It is the same whatever runs beside
the request, and a rounding of the logits moves a token only where two blocks or two tokens are that
close. Blocks need noise for themselves and for the tokens of one, instead of for all.

A token outside the nucleus of top_p is drawn again, among those that are likelier than it: what
comes at last is a draw from the nucleus, whose least member nobody has to look for.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count

import torch
from torch import Tensor

from qlab.errors import warn
from qlab.generation import one_pass
from qlab.generation.noise import BLOCK, noise
from qlab.generation.sampling import Drawing, Drawn, Sampling

GROUP = 8  # tokens of which only the likeliest is looked at first
ROWS = 16  # of which log-probabilities are in memory at a time
LEAST = 2.0**-126  # of normal numbers in fp32


def prepare(device: torch.device) -> None:
    """Load what draws on a device, before somebody waits for it."""
    if device.type == "cpu" and one_pass.why_not() is not None:
        warn(f"draws of tokens are slow: {one_pass.why_not()}")


def draw(logits_bv: Tensor, drawings: Sequence[Drawing]) -> list[Drawn]:
    """A token for each row of logits [b, v]."""
    tokens = _tokens(logits_bv, drawings)
    return told(logits_bv, tokens, [drawing.sampling.logprobs for drawing in drawings])


def _tokens(logits_bv: Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """The token of each row: by the kernel, or where it is not there or cannot say, in torch."""
    if not one_pass.takes(logits_bv):
        return in_torch(logits_bv, drawings)
    found = one_pass.tokens(logits_bv, drawings)
    left = [row for row, token in enumerate(found) if token is None]
    said = iter(in_torch(logits_bv[left], [drawings[row] for row in left]) if left else ())
    return [next(said) if token is None else token for token in found]


def in_torch(logits_bv: Tensor, drawings: Sequence[Drawing]) -> list[int]:
    """The token of each row, which `one_pass` gives too."""
    b, v = logits_bv.shape
    x = logits_bv.new_empty((b, v + -v % BLOCK), dtype=torch.float32)
    x[:, :v], x[:, v:] = logits_bv, -math.inf
    change(x[:, :v], drawings)
    warm = [row for row, d in enumerate(drawings) if d.sampling.temperature > 0]
    cold = [row for row, d in enumerate(drawings) if d.sampling.temperature == 0]
    tokens = torch.empty(len(x), dtype=torch.int64)
    if cold:
        tokens[cold] = _first_greatest(_rows(x, cold)).cpu()
    if warm:
        tokens[warm] = _warm(_rows(x, warm), [drawings[row] for row in warm]).cpu()
    return tokens.tolist()


# ------------------------------------------------------------------ what is told of tokens
def told(logits_bv: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> list[Drawn]:
    """A token of each row with its log-probability, and those of the `count` likeliest: the
    likeliest first, of equal logits the first in the row. None asks for neither."""
    asking = [row for row, count in enumerate(counts) if count is not None]
    said: dict[int, Drawn] = {}
    if asking and one_pass.takes(logits_bv):
        said = one_pass.told(logits_bv, asking, tokens, counts)
    left = [row for row in asking if row not in said]
    for rows in (left[i : i + ROWS] for i in range(0, len(left), ROWS)):
        said |= told_in_torch(logits_bv, rows, tokens, counts)
    return [said.get(row) or Drawn(token=token) for row, token in enumerate(tokens)]


def told_in_torch(
    logits_bv: Tensor, rows: Sequence[int], tokens: Sequence[int], counts: Sequence[int | None]
) -> dict[int, Drawn]:
    """Row -> what is told of its token: the tokens that `one_pass` tells, and log-probabilities of
    a sum in fp32. Those of a row with NaN or an infinite greatest number are NaN."""
    x_rv = logits_bv[rows].float()
    logprobs_rv = x_rv.log_softmax(-1)
    at = torch.tensor([[tokens[row]] for row in rows], dtype=torch.int64)
    own = logprobs_rv.gather(1, at.to(x_rv.device))[:, 0].tolist()
    least_r = likeliest(x_rv, max(counts[row] or 1 for row in rows))[:, -1:]
    row_n, place_n = (~(x_rv < least_r)).nonzero(
        as_tuple=True
    )  # places ascend; NaN is the greatest
    by_x = x_rv[row_n, place_n].argsort(descending=True, stable=True)
    order = by_x[row_n[by_x].argsort(stable=True)]
    lengths = row_n.bincount(minlength=len(rows)).tolist()
    places, logprobs = place_n[order], logprobs_rv[row_n[order], place_n[order]]
    pairs = zip(places.split(lengths), logprobs.split(lengths))
    return {
        row: Drawn(
            token=tokens[row],
            logprob=logprob,
            likeliest=tuple(zip(*(part[: counts[row]].tolist() for part in of_row))),
        )
        for row, logprob, of_row in zip(rows, own, pairs)
    }


# ------------------------------------------------------------------ what changes logits
def change(x_bv: Tensor, drawings: Sequence[Drawing]) -> None:
    """Take the penalties of the tokens so far from rows of logits, add their biases, and leave out,
    by -inf, stop tokens that come too early and what no word of a grammar goes on with."""
    _divide_repeated(x_bv, drawings)
    _add(x_bv, [_penalties(drawing) for drawing in drawings])
    _add(x_bv, [drawing.sampling.logit_bias for drawing in drawings])
    for x_v, drawing in zip(x_bv, drawings):
        sampling = drawing.sampling
        if len(drawing.new) < sampling.min_tokens and sampling.stop_ids:
            x_v[list(sampling.stop_ids)] = -math.inf
        if drawing.word is not None:
            drawing.word.leave_out(x_v)


def _divide_repeated(x_bv: Tensor, drawings: Sequence[Drawing]) -> None:
    """Make logits of tokens so far smaller by the repetition penalty of their row."""
    penalties = [drawing.sampling.repetition_penalty for drawing in drawings]
    rows = [row for row, penalty in enumerate(penalties) if penalty != 1]
    if rows:
        at = _places(rows, [{*drawings[row].prompt, *drawings[row].new} for row in rows], x_bv)
        penalty_n, x_n = _column(penalties, x_bv)[at[0], 0], x_bv[at]
        x_bv[at] = torch.where(x_n > 0, x_n / penalty_n, x_n * penalty_n)


def _penalties(drawing: Drawing) -> Mapping[int, float]:
    """New token -> what is added to its logit: presence and frequency penalties, which are
    negative."""
    presence, frequency = drawing.sampling.presence_penalty, drawing.sampling.frequency_penalty
    if not presence and not frequency:
        return {}
    return {token: -presence - frequency * n for token, n in Counter(drawing.new).items()}


def _add(x_bv: Tensor, of_rows: Sequence[Mapping[int, float]]) -> None:
    """Add to the logits of some tokens of each row."""
    rows = [row for row, added in enumerate(of_rows) if added]
    if rows:
        added = [number for row in rows for number in of_rows[row].values()]
        at = _places(rows, [of_rows[row] for row in rows], x_bv)
        x_bv[at] += torch.tensor(added, dtype=x_bv.dtype).to(x_bv.device)


def _places(
    rows: Sequence[int], tokens: Sequence[Collection[int]], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Some tokens of each row, as an index."""
    lengths = torch.tensor([len(of_row) for of_row in tokens], dtype=torch.int64)
    row_n = torch.tensor(rows, dtype=torch.int64).repeat_interleave(lengths)
    token_n = torch.tensor([*chain.from_iterable(tokens)], dtype=torch.int64)
    return row_n.to(like.device), token_n.to(like.device)


# ------------------------------------------------------------------ draws above temperature 0
def _warm(x_bv: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """The tokens [b] that are drawn of rows of logits, which are overwritten."""
    samplings = [drawing.sampling for drawing in drawings]
    per_e = _column([one_pass.LOG2_E / sampling.temperature for sampling in samplings], x_bv)
    e_bv = x_bv.sub_(x_bv.amax(-1, True)).mul_(per_e).exp2_()  # takes half of the time of exp_
    mass_b = keep(e_bv, samplings)
    token_b = _drawn(e_bv, drawings, 0)
    rows = [row for row, sampling in enumerate(samplings) if sampling.top_p < 1]
    for turn in count(1):
        rows = [row for row in rows if is_outside(e_bv[row], token_b[row], mass_b[row])]
        if not rows:
            break
        again = [drawings[row] for row in rows]
        token_b[rows] = _drawn(e_bv[rows], again, turn)
    return token_b


def _drawn(e_bv: Tensor, drawings: Sequence[Drawing], turn: int) -> Tensor:
    """A token [b] of each row, as often as it is likely."""
    e_bcn = e_bv.unflatten(1, (-1, BLOCK))
    blocks = e_bcn.shape[1]
    names = [drawing.noise_name(turn) for drawing in drawings]
    noise_bn = noise(blocks + BLOCK, [d.seed for d in drawings], names).to(e_bv.device)
    of_blocks, of_tokens = noise_bn.split([blocks, BLOCK], 1)
    block_b = (e_bcn.sum(-1).log() + of_blocks).argmax(-1)
    e_bn = _of_blocks(e_bcn, block_b)
    return block_b * BLOCK + (e_bn.log() + of_tokens).argmax(-1)


# ------------------------------------------------------------------ filters
def keep(e_bv: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Make 0 of what top_k and min_p leave out of each row. Tokens as likely as the least one that
    is kept are kept.

    e: how likely tokens are beside the likeliest one, which has 1. Returns the mass [b] that
    tokens likelier than one of the nucleus have less than: the share top_p of what top_k keeps.
    """
    by_rank = [row for row, s in enumerate(samplings) if 0 < s.top_k < e_bv.shape[1]]
    if by_rank:
        best_bn = likeliest(_rows(e_bv, by_rank), max(samplings[row].top_k for row in by_rank))
        ranks = [samplings[row].top_k - 1 for row in by_rank]
        least_b = e_bv.new_zeros(len(e_bv))
        least_b[by_rank] = best_bn[[*range(len(by_rank))], ranks]
        _leave_out(e_bv, least_b)
    top_p = _column([max(sampling.top_p, LEAST) for sampling in samplings], e_bv)[:, 0]
    mass_b = e_bv.sum(1) * top_p
    if any(sampling.min_p for sampling in samplings):
        _leave_out(e_bv, _column([sampling.min_p for sampling in samplings], e_bv)[:, 0])
    return mass_b


def _leave_out(e_bv: Tensor, least_b: Tensor) -> None:
    """Make 0 of what is less than the least of its row."""
    below_b = least_b.nextafter(torch.zeros_like(least_b))
    for e_v, below in zip(e_bv, below_b.tolist()):
        if below:
            torch.threshold_(e_v, below, 0.0)


def is_outside(e_v: Tensor, token: Tensor, mass: Tensor) -> bool:
    """Whether a token is outside of its row's nucleus, the likeliest tokens up to the one that
    makes their sum `mass`. Makes 0 of what is not likelier than the token."""
    return bool(torch.threshold_(e_v, e_v[token].item(), 0.0).sum() >= mass)


# ------------------------------------------------------------------ the greatest of each row
def _first_greatest(x_bv: Tensor) -> Tensor:
    """The first place [b] of the greatest number of each row, as `argmax` gives it in five times
    the time."""
    x_bcn = x_bv.unflatten(1, (-1, BLOCK))
    block_b = x_bcn.amax(-1).argmax(-1)
    return block_b * BLOCK + _of_blocks(x_bcn, block_b).argmax(-1)


def _of_blocks(x_bcn: Tensor, block_b: Tensor) -> Tensor:
    """The numbers [b, n] of one block of each row."""
    return x_bcn[torch.arange(len(x_bcn), device=x_bcn.device), block_b]


def likeliest(x_bv: Tensor, count: int) -> Tensor:
    """The `count` greatest numbers of each row, the greatest first. They are among those of the
    `count` groups with the greatest maxima; a group is every so many-th number."""
    groups = x_bv.shape[1] // GROUP
    if count >= groups:
        return x_bv.topk(min(count, x_bv.shape[1])).values
    even_bv, rest_bv = x_bv[:, : groups * GROUP], x_bv[:, groups * GROUP :]
    x_bng = even_bv.unflatten(1, (GROUP, groups))
    group_bm = x_bng.amax(1).topk(count).indices
    inside = x_bng.gather(2, group_bm[:, None].expand(-1, GROUP, -1)).flatten(1)
    return torch.cat([inside, rest_bv], 1).topk(count).values


def _rows(x_bv: Tensor, rows: Sequence[int]) -> Tensor:
    return x_bv if len(rows) == len(x_bv) else x_bv[rows]


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
