"""Which token comes next: what a request asks of the logits, and the draw.

    x = logits less penalties, plus biases
    token = argmax x                              at temperature 0
    token = argmax (x / T + noise)                else, over the tokens that the filters keep
    noise = -log(-log(u)),  u uniform, of the request's seed and the token's number

The Gumbel noise makes it a draw from softmax(x / T) (Gumbel 1954). It is the same whatever runs
beside the request, and a rounding of the logits moves a token only where two are that close.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlab.algebra.random import generator
from qlab.errors import QlabError
from qlab.generation.grammar import Word

LIKELIEST = 1024  # tokens among which the nucleus is looked for before all are sorted


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request asks of the draw of its tokens.

    max_tokens, min_tokens: how many new ones; before min_tokens no token of stop_ids is drawn.
    temperature: 0 takes the likeliest token. top_k: how many of the likeliest are kept; 0 for all.
    top_p: the least number of likeliest tokens that have this probability together are kept.
    min_p: tokens with at least this share of the likeliest one's probability are kept.
    repetition_penalty: logits of all tokens so far are divided by it where positive, else
    multiplied. presence_penalty: taken from logits of new tokens so far. frequency_penalty: the
    same, for each time. logit_bias: token -> what is added to its logit. seed: of the noise; None
    takes another one for each request. stop_ids: tokens that end the text. logprobs: how many of
    the likeliest tokens are told with their log-probabilities; None tells none.
    prompt_logprobs: the same, of the prompt's tokens.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_tokens": (self.max_tokens, 1, 2**31),
            "min_tokens": (self.min_tokens, 0, self.max_tokens),
            "temperature": (self.temperature, 0, 100),
            "top_k": (self.top_k, 0, 2**31),
            "min_p": (self.min_p, 0, 1),
            "repetition_penalty": (self.repetition_penalty, 0.01, 100),
            "presence_penalty": (self.presence_penalty, -100, 100),
            "frequency_penalty": (self.frequency_penalty, -100, 100),
            "logprobs": (self.logprobs or 0, 0, 1024),
            "prompt_logprobs": (self.prompt_logprobs or 0, 0, 1024),
        }
        for name, (value, least, most) in ranges.items():
            if not least <= value <= most:  # a NaN is in no range
                raise QlabError(f"{name} is {value}; give a number from {least} to {most}")
        if not 0 < self.top_p <= 1:
            raise QlabError(f"top_p is {self.top_p}; give a number above 0, up to 1")
        wrong = [bias for bias in self.logit_bias.values() if not -100 <= bias <= 100]
        if wrong:
            raise QlabError(f"a logit_bias is {wrong[0]}; give numbers from -100 to 100")

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken as it is."""
        changes = (
            self.temperature,
            self.min_tokens,
            self.repetition_penalty - 1,
            self.presence_penalty,
            self.frequency_penalty,
            len(self.logit_bias),
        )
        return not any(changes)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A token, with what the model gave it: its log-probability, and the likeliest tokens with
    theirs, before penalties and filters. None where they were not asked for."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What one draw depends on beside the logits. prompt, new: the tokens so far. seed: of the
    noise. word: what the reply has to be, of a grammar, or None."""

    sampling: Sampling
    prompt: Sequence[int]
    new: Sequence[int]
    seed: int
    word: Word | None = None


def draw(logits_bv: Tensor, drawings: Sequence[Drawing]) -> list[Drawn]:
    """A token for each row of logits [b, v]."""
    if all(d.sampling.is_plain and d.word is None for d in drawings):
        tokens = logits_bv.argmax(-1).tolist()
    else:
        tokens = [_token(logits.float(), d) for logits, d in zip(logits_bv, drawings)]
    return [
        told(logits, token, d.sampling.logprobs)
        for logits, token, d in zip(logits_bv, tokens, drawings)
    ]


def told(logits_v: Tensor, token: int, count: int | None) -> Drawn:
    """A token with its log-probability, and those of the `count` likeliest."""
    if count is None:
        return Drawn(token=token)
    logprobs = logits_v.float().log_softmax(-1)
    best = logprobs.topk(min(count, len(logprobs)))
    likeliest = tuple(zip(best.indices.tolist(), best.values.tolist()))
    return Drawn(token=token, logprob=logprobs[token].item(), likeliest=likeliest)


def _token(logits_v: Tensor, drawing: Drawing) -> int:
    sampling = drawing.sampling
    x = logits_v if sampling.is_plain else biased(penalized(logits_v, drawing), drawing)
    if drawing.word is not None:
        x = drawing.word.allowed(x)
    if sampling.temperature == 0:
        return int(x.argmax())
    x = kept(x / sampling.temperature, sampling)
    return int((x + noise(len(x), drawing.seed, len(drawing.new)).to(x.device)).argmax())


def penalized(logits_v: Tensor, drawing: Drawing) -> Tensor:
    """The logits less the penalties of the tokens so far."""
    sampling, x = drawing.sampling, logits_v.clone()
    if sampling.repetition_penalty != 1:
        seen = (
            torch.tensor([*drawing.prompt, *drawing.new], dtype=torch.int64).unique().to(x.device)
        )
        penalty = sampling.repetition_penalty
        x[seen] = torch.where(x[seen] > 0, x[seen] / penalty, x[seen] * penalty)
    if drawing.new and (sampling.presence_penalty or sampling.frequency_penalty):
        new = torch.tensor(drawing.new, dtype=torch.int64)
        seen, times = (part.to(x.device) for part in new.unique(return_counts=True))
        x[seen] -= sampling.presence_penalty + sampling.frequency_penalty * times
    return x


def biased(x_v: Tensor, drawing: Drawing) -> Tensor:
    """The logits with their biases; stop tokens that come too early have none."""
    sampling, x = drawing.sampling, x_v.clone()
    for token, bias in sampling.logit_bias.items():
        x[token] += bias
    if len(drawing.new) < sampling.min_tokens and sampling.stop_ids:
        x[list(sampling.stop_ids)] = -math.inf
    return x


def kept(x_v: Tensor, sampling: Sampling) -> Tensor:
    """The logits, with -inf for the tokens that the filters leave out: top_k first, then top_p and
    min_p of what it keeps."""
    x = x_v
    if 0 < sampling.top_k < len(x):
        x = x.masked_fill(x < x.topk(sampling.top_k).values[-1], -math.inf)
    p = x.softmax(-1)
    if sampling.top_p < 1:
        x = x.masked_fill(p < _least_of_nucleus(p, sampling.top_p), -math.inf)
    if sampling.min_p:
        x = x.masked_fill(p < sampling.min_p * p.max(), -math.inf)
    return x


def _least_of_nucleus(p_v: Tensor, top_p: float) -> Tensor:
    """The least probability in the nucleus: the likeliest tokens up to the one that reaches
    top_p."""
    likeliest = p_v.topk(min(LIKELIEST, len(p_v))).values
    if likeliest.sum() < top_p:
        likeliest = p_v.sort(descending=True).values
    before = likeliest.cumsum(-1) - likeliest
    return likeliest[before < top_p][-1]


def noise(size: int, seed: int, step: int) -> Tensor:
    """Gumbel noise [size] for the token of a number, in fp32."""
    u = torch.rand(size, generator=generator(seed, f"token {step}"), dtype=torch.float32)
    # `rand` gives 0 and never 1: the least that it can give beside 0 stands for 0
    return -(-u.clamp_min(2.0**-25).log()).log()
