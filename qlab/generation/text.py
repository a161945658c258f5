"""Text that grows by tokens: what is certain of it, up to the first stop string.

A token may end in the middle of a character, so that its text is told when the next ones complete
it. Text that may be the beginning of a stop string is held back until it is none.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Any

INCOMPLETE = "�"  # what a tokenizer writes for bytes that are no character yet


class GrowingText:
    """The text of new tokens.

    Args:
        tokenizer: of transformers.
        stop: the text ends in front of the first of these strings.
        skip_special: whether special tokens have no text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), skip_special: bool = True):
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self._skip_special = skip_special
        self.is_ended = False
        self._tokens: list[int] = []
        # Tokens from `_first` on are decoded together, of which those before `_told` have been.
        self._first, self._told = 0, 0
        self._held = ""
        # Characters: up to the end of each token, of all tokens, and told.
        self._ends: list[int] = []
        self._known = self._given = 0

    @property
    def told_tokens(self) -> int:
        """How many tokens the text that was told is made of, from the first one on; with the one in
        which a stop string begins, where that has text in front of it."""
        if not self.is_ended:
            return bisect_right(self._ends, self._given)
        return bisect_left([0, *self._ends[:-1]], self._given)

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self._tokens.append(token)
        text = self._certain(self._decoded(is_last=False), is_last=False)
        self._ends.append(self._known)
        return text

    def end(self) -> str:
        """The rest of the text, when no token follows."""
        return self._certain(self._decoded(is_last=True), is_last=True)

    def _decoded(self, is_last: bool) -> str:
        """The text of the tokens that none was told of; the tokens before them are decoded with
        them, since some tokenizers write a token by what stands in front of it."""
        before = self._text(self._tokens[self._first : self._told])
        both = self._text(self._tokens[self._first :])
        if both.endswith(INCOMPLETE) and not is_last:
            return ""
        new = both[len(before) :]
        if new:  # else special tokens, which tell nothing of how the next one is written
            self._first = self._told
        self._told = len(self._tokens)
        return new

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(
            tokens,
            skip_special_tokens=self._skip_special,
            clean_up_tokenization_spaces=False,
        )

    def _certain(self, text: str, is_last: bool) -> str:
        if self.is_ended:
            return ""
        self._known += len(text)
        self._held += text
        places = [self._held.find(s) for s in self.stop]
        stops = [place for place in places if place >= 0]
        if stops:
            self.is_ended = True
            certain, self._held = self._held[: min(stops)], ""
            self._given += len(certain)
            return certain
        kept = 0 if is_last else self._possible_stop()
        cut = len(self._held) - kept
        certain, self._held = self._held[:cut], self._held[cut:]
        self._given += cut
        return certain

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-count:]) for s in self.stop):
                return count
        return 0
