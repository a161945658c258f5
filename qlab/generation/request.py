"""What somebody asked an engine for, and how far it is."""

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from qlab.generation.cache import States
from qlab.generation.drawing import told
from qlab.generation.grammar import Word
from qlab.generation.sampling import Drawing, Drawn, Sampling
from qlab.generation.schedule import Place

STOP, LENGTH, ABORT, ERROR = "stop", "length", "abort", "error"  # how a request ends


@dataclass(kw_only=True, eq=False)
class Request:
    """Tokens, the pages that hold their keys and values, and for how many of them they do.

    number: of its arrival. prompt: token ids. seed: of its noise. told: is called with every new
    token, and says whether the text ends with it. drawn: the new tokens. prompt_drawn: those of the
    prompt but for the first one, where their log-probabilities were asked for. cached: tokens of
    the prompt that were in the cache. finish: how it ended, or None. error: why it failed.
    word: what the new text has to be, of a grammar. inputs: what the model takes of the prompt
    beside its tokens (images). shift: by how much positions behind the prompt differ from counts of
    tokens.
    """

    number: int
    prompt: list[int]
    sampling: Sampling
    seed: int
    told: Callable[[Drawn], bool]
    drawn: list[Drawn] = field(default_factory=list)
    prompt_drawn: list[Drawn] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    done: int = 0
    cached: int = 0
    states: States = field(default_factory=list)
    finish: str | None = None
    error: Exception | None = None
    word: Word | None = None
    is_cancelled: bool = False
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    shift: int = 0

    def __post_init__(self) -> None:
        # arrays, which a kernel of draws reads in place
        self._prompt, self._new = array("q", self.prompt), array("q")

    @property
    def new(self) -> list[int]:
        """The new token ids."""
        return self._new.tolist()

    @property
    def tokens(self) -> list[int]:
        """All token ids."""
        return self.prompt + self.new

    @property
    def last(self) -> int:
        """The last token id."""
        return (self._new or self._prompt)[-1]

    @property
    def shared(self) -> list[int]:
        """The tokens by which others may find its pages: none where tokens do not say what an image
        shows."""
        return [] if self.inputs else self.tokens

    @property
    def drawing(self) -> Drawing:
        """What the draw of its next token depends on, until that is accepted."""
        return Drawing(
            sampling=self.sampling,
            prompt=self._prompt,
            new=self._new,
            seed=self.seed,
            word=self.word,
        )

    def place(self, alone: int) -> Place:
        """What the schedule has to know."""
        return Place(
            request=self.number,
            length=len(self._prompt) + len(self._new),
            done=self.done,
            pages=len(self.pages),
            alone=alone,
            is_uncut=bool(self.inputs),
        )

    def cancel(self) -> None:
        """End it before the next step. May be called from any thread."""
        self.is_cancelled = True

    def tell_prompt(self, logits_qv: Tensor, begin: int, count: int) -> None:
        """The log-probabilities of the tokens behind those of a part from `begin` on, as far as
        they are the prompt's and were not told before. count: how many likeliest ones beside."""
        first, end = len(self.prompt_drawn), min(begin + len(logits_qv), len(self.prompt) - 1)
        tokens = self.prompt[first + 1 : end + 1]
        rows = logits_qv[first - begin : end - begin]
        self.prompt_drawn += told(rows, tokens, [count] * len(tokens))

    def accept(self, drawn: Drawn) -> None:
        """Take the next token, and end where it says so."""
        self.drawn.append(drawn)
        self._new.append(drawn.token)
        is_whole = self.word is not None and self.word.accept(drawn.token)
        if self.told(drawn) or is_whole or drawn.token in self.sampling.stop_ids:
            self.finish = STOP
        elif len(self.drawn) == self.sampling.max_tokens:
            self.finish = LENGTH
