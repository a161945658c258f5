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
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qlab.algebra.random import generator
from qlab.generation.sampling import Drawing, Drawn, Sampling

BLOCK = 512  # tokens; noise is drawn for vocabulary / BLOCK + BLOCK numbers
GROUP = 32  # tokens of which only the likeliest is looked at first
FEW = 64  # tokens among which the nucleus is looked for first
NEVER = 1e-35  # a likelihood beside the likeliest token that noise of 24 bits never makes up for
BIN_SHIFT = 19  # bits of a float that bins leave out: there are 16 bins to an octave
LOG2_E = math.log2(math.e)
BELOW_1 = 1 - 2.0**-24  # the greatest number in fp32 below 1


def draw(logits_bv: Tensor, drawings: Sequence[Drawing]) -> list[Drawn]:
    """A token for each row of logits [b, v]."""
    b, v = logits_bv.shape
    x = logits_bv.new_full((b, v + -v % BLOCK), -math.inf, dtype=torch.float32)
    x[:, :v] = logits_bv
    for x_v, drawing in zip(x, drawings):
        change(x_v[:v], drawing)
    warm = [row for row, d in enumerate(drawings) if d.sampling.temperature > 0]
    cold = [row for row, d in enumerate(drawings) if d.sampling.temperature == 0]
    tokens = torch.empty(len(x), dtype=torch.int64)
    if cold:
        tokens[cold] = _rows(x, cold).argmax(-1).cpu()
    if warm:
        tokens[warm] = _warm(_rows(x, warm), [drawings[row] for row in warm]).cpu()
    return [
        told(logits, token, drawing.sampling.logprobs)
        for logits, token, drawing in zip(logits_bv, tokens.tolist(), drawings)
    ]


def told(logits_v: Tensor, token: int, count: int | None) -> Drawn:
    """A token with its log-probability, and those of the `count` likeliest. Of one row, which stays
    in the processor's cache meanwhile: all rows at once take twice as long."""
    if count is None:
        return Drawn(token=token)
    logprobs = logits_v.float().log_softmax(-1)
    values, tokens = likeliest(logprobs[None], count)
    pairs = tuple(zip(tokens[0].tolist(), values[0].tolist()))
    return Drawn(token=token, logprob=logprobs[token].item(), likeliest=pairs)


def change(x_v: Tensor, drawing: Drawing) -> None:
    """Take the penalties of the tokens so far from a row of logits, add its biases, and leave out,
    by -inf, stop tokens that come too early and what no word of a grammar goes on with."""
    sampling = drawing.sampling
    if sampling.repetition_penalty != 1:
        seen = torch.tensor([*{*drawing.prompt, *drawing.new}], dtype=torch.int64).to(x_v.device)
        of_seen, penalty = x_v[seen], sampling.repetition_penalty
        x_v[seen] = torch.where(of_seen > 0, of_seen / penalty, of_seen * penalty)
    if drawing.new and (sampling.presence_penalty or sampling.frequency_penalty):
        new = torch.tensor(drawing.new, dtype=torch.int64)
        seen, times = (part.to(x_v.device) for part in new.unique(return_counts=True))
        x_v[seen] -= sampling.presence_penalty + sampling.frequency_penalty * times
    for token, bias in sampling.logit_bias.items():
        x_v[token] += bias
    if len(drawing.new) < sampling.min_tokens and sampling.stop_ids:
        x_v[list(sampling.stop_ids)] = -math.inf
    if drawing.word is not None:
        drawing.word.leave_out(x_v)


# ------------------------------------------------------------------ draws above temperature 0
def _warm(x_bv: Tensor, drawings: Sequence[Drawing]) -> Tensor:
    """The tokens [b] that are drawn of rows of logits, which are overwritten."""
    samplings = [drawing.sampling for drawing in drawings]
    per_e = _column([LOG2_E / sampling.temperature for sampling in samplings], x_bv)
    e_bv = x_bv.sub_(x_bv.amax(-1, True)).mul_(per_e).exp2_()  # takes half of the time of exp_
    keep(e_bv, samplings)
    e_bcn = e_bv.unflatten(1, (-1, BLOCK))
    blocks = e_bcn.shape[1]
    rows = [noise(blocks + BLOCK, d.seed, len(d.new)) for d in drawings]
    of_blocks, of_tokens = torch.stack(rows).to(x_bv.device).split([blocks, BLOCK], 1)
    block_b = (e_bcn.sum(-1).log() + of_blocks).argmax(-1)
    e_bn = e_bcn[torch.arange(len(e_bcn), device=x_bv.device), block_b]
    return block_b * BLOCK + (e_bn.log() + of_tokens).argmax(-1)


def noise(size: int, seed: int, step: int) -> Tensor:
    """Gumbel noise [size] for the token of a number, in fp32."""
    u = torch.rand(size, generator=generator(seed, f"token {step}"), dtype=torch.float32)
    # `rand` gives 0 and never 1: the least that it can give beside 0 stands for 0
    return -(-u.clamp_min(2.0**-25).log()).log()


# ------------------------------------------------------------------ filters
def keep(e_bv: Tensor, samplings: Sequence[Sampling]) -> None:
    """Make 0 of what the filters leave out of each row: top_k first, then top_p and min_p of what
    it keeps. Tokens as likely as the least one that is kept are kept. The others are given as
    multiples of that one.

    e: how likely tokens are beside the likeliest one.
    """
    v = e_bv.shape[1]
    by_rank = [row for row, s in enumerate(samplings) if 0 < s.top_k < v]
    if by_rank:
        best_bn = greatest(_rows(e_bv, by_rank), max(samplings[row].top_k for row in by_rank))
        ranks = [[samplings[row].top_k - 1] for row in by_rank]
        at = torch.tensor(ranks, dtype=torch.int64, device=e_bv.device)
        least = e_bv.new_full((len(e_bv), 1), NEVER)
        least[by_rank] = best_bn.gather(1, at).clamp_min(NEVER)
        _leave_out(e_bv, least)
    by_mass = [row for row, s in enumerate(samplings) if s.top_p < 1]
    if not by_mass and not any(s.min_p for s in samplings):
        return
    least = _column([max(s.min_p, NEVER) for s in samplings], e_bv) * e_bv.amax(-1, True)
    if by_mass:
        top_p = _column([max(samplings[row].top_p, NEVER) for row in by_mass], e_bv)
        of_nucleus = least_of_nucleus(_rows(e_bv, by_mass), top_p)
        least[by_mass] = torch.maximum(least[by_mass], of_nucleus)
    _leave_out(e_bv, least)


def _leave_out(e_bv: Tensor, least_b1: Tensor) -> None:
    """Make 0 of what is less than the least of its row, and multiples of it of all else: so one
    number tells in every row what is kept."""
    torch.threshold_(e_bv.div_(least_b1), BELOW_1, 0.0)


def least_of_nucleus(e_bv: Tensor, top_p_b1: Tensor) -> Tensor:
    """The least likelihood [b, 1] in the nuclei: the likeliest tokens up to the one that makes
    their sum top_p of all. Most nuclei lie among the FEW likeliest."""
    wanted_b1 = e_bv.sum(1, True) * top_p_b1
    best_bn = greatest(e_bv, FEW)
    up_to = best_bn.cumsum(1)
    inside = up_to - best_bn < wanted_b1
    least_b1 = best_bn.masked_fill(~inside, math.inf).amin(1, True)
    for row in (up_to[:, -1] < wanted_b1[:, 0]).nonzero()[:, 0].tolist():
        least_b1[row] = _least_of_many(e_bv[row], wanted_b1[row])
    return least_b1


def _least_of_many(e_v: Tensor, wanted: Tensor) -> Tensor:
    """The same of one row, whatever the size of its nucleus: by a histogram over the upper bits of
    the numbers, which are in their order, and then in the bin where the sum is reached."""
    bin_v = e_v.view(torch.int32) >> BIN_SHIFT
    mass = torch.bincount(bin_v, weights=e_v)
    up_to = mass.flip(0).cumsum(0).flip(0)
    reached = (up_to >= wanted).nonzero()
    if not len(reached):  # by roundings of the sum
        return e_v.new_full((), NEVER)
    last = reached[-1]
    best = e_v[bin_v == last].sort(descending=True).values
    before = up_to[last] - mass[last] + best.cumsum(0) - best
    return best[before < wanted][-1]


def greatest(x_bv: Tensor, count: int) -> Tensor:
    """The `count` greatest numbers of each row, the greatest first."""
    groups = x_bv.shape[1] // GROUP
    if count >= groups:
        return x_bv.topk(min(count, x_bv.shape[1])).values
    inside, _ = _of_greatest_groups(x_bv, count)
    return torch.cat([inside, x_bv[:, groups * GROUP :]], 1).topk(count).values


def likeliest(x_bv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The same with their places in the row."""
    groups = x_bv.shape[1] // GROUP
    if count >= groups:
        best = x_bv.topk(min(count, x_bv.shape[1]))
        return best.values, best.indices
    inside, group_bm = _of_greatest_groups(x_bv, count)
    first = torch.arange(GROUP, device=x_bv.device)[:, None] * groups
    places = (first + group_bm[:, None]).flatten(1)
    even = groups * GROUP
    rest = torch.arange(even, x_bv.shape[1], device=x_bv.device).expand(len(x_bv), -1)
    best = torch.cat([inside, x_bv[:, even:]], 1).topk(count)
    return best.values, torch.cat([places, rest], 1).gather(1, best.indices)


def _of_greatest_groups(x_bv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The numbers [b, GROUP * count] of the `count` groups with the greatest maxima, among which
    the `count` greatest numbers are, and those groups. A group is every so many-th number."""
    groups = x_bv.shape[1] // GROUP
    x_bng = x_bv[:, : groups * GROUP].unflatten(1, (GROUP, groups))
    group_bm = x_bng.amax(1).topk(count).indices
    return x_bng.gather(2, group_bm[:, None].expand(-1, GROUP, -1)).flatten(1), group_bm


def _rows(x_bv: Tensor, rows: Sequence[int]) -> Tensor:
    return x_bv if len(rows) == len(x_bv) else x_bv[rows]


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]
