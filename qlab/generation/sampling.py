"""What a request asks of the draw of its tokens, and what it is told of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

from qlab.errors import QlabError
from qlab.generation.grammar import Word

WHOLE = ("max_tokens", "min_tokens", "top_k", "logprobs", "prompt_logprobs", "seed")


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
            "seed": (self.seed or 0, -(2**63), 2**63 - 1),
        }
        for name, (value, least, most) in ranges.items():
            if not _is_number(value, name in WHOLE) or not least <= value <= most:  # no NaN is
                kind = "whole number" if name in WHOLE else "number"
                raise QlabError(f"{name} is {value!r}; give a {kind} from {least} to {most}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise QlabError(f"top_p is {self.top_p!r}; give a number above 0, up to 1")
        if not isinstance(self.logit_bias, Mapping):
            raise QlabError(f"logit_bias is {self.logit_bias!r}; give numbers by token ids")
        for ids in (self.logit_bias, self.stop_ids):
            if isinstance(ids, str) or not all(_is_number(i, is_whole=True) for i in ids):
                raise QlabError(f"token ids are {ids!r:.100}; give whole numbers")
        biases = self.logit_bias.values()
        wrong = [bias for bias in biases if not _is_number(bias) or not -100 <= bias <= 100]
        if wrong:
            raise QlabError(f"a logit_bias is {wrong[0]!r}; give numbers from -100 to 100")

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

    @property
    def counts(self) -> bool:
        """Whether logits depend on the tokens so far."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties)


def _is_number(value: object, is_whole: bool = False) -> bool:
    return isinstance(value, Integral if is_whole else Real) and not isinstance(value, bool)


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

    def noise_name(self, turn: int) -> str:
        """The name of the noise of the draw, and of the turn-th draw after it."""
        return f"token {len(self.new)}" + (f" again {turn}" if turn else "")
