"""Text that is read while it grows.

A reader is a generator of nothing: it yields where it has to wait for more text, and returns what
it read. Where the text is none of what it reads, it raises NoCall.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Reader = Generator[None, None, T]


class NoCall(ValueError):
    """The text is none of what was read."""


class Reading:
    """A text that grows, and how far it is read.

    text: so far. at: what comes next. is_ended: whether it grows no more.
    """

    def __init__(self) -> None:
        self.text, self.at, self.is_ended = "", 0, False

    @property
    def rest(self) -> str:
        """What is there and not read."""
        return self.text[self.at :]

    def peek(self) -> Reader[str]:
        """The next character; "" at the end."""
        while self.at == len(self.text) and not self.is_ended:
            yield
        return self.text[self.at : self.at + 1]

    def blanks(self) -> Reader[None]:
        """White space, if there is some."""
        while (yield from self.peek()).isspace():
            self.at += 1

    def word(self, *words: str) -> Reader[str]:
        """The longest of these words that comes next."""
        while not self.is_ended:
            rest = self.text[self.at : self.at + max(map(len, words), default=0)]
            if not any(word.startswith(rest) and word != rest for word in words):
                break
            yield
        found = [word for word in words if self.text.startswith(word, self.at)]
        if not found:
            raise NoCall(self.rest)
        self.at += len(max(found, key=len))
        return max(found, key=len)

    def has(self, *words: str) -> Reader[bool]:
        """Whether one of these words comes next, behind white space. If not, nothing is read."""
        begin = self.at
        try:
            yield from self.blanks()
            yield from self.word(*words)
        except NoCall:
            self.at = begin
            return False
        return True

    def until(self, words: Sequence[str], tell: Callable[[str], None]) -> Reader[str]:
        """Tell the text in front of the first of these words, as it grows, and return the word; ""
        where the text ends without one."""
        pattern = re.compile("|".join(map(re.escape, words)))
        while True:
            found = pattern.search(self.text, self.at)
            rest = self.rest
            kept = 0 if self.is_ended else _possible(rest, words)
            told = rest[: found.start() - self.at] if found else rest[: len(rest) - kept]
            self.at += len(told)
            if told:
                tell(told)
            if found or self.is_ended:
                word = found[0] if found else ""
                self.at += len(word)
                return word
            yield

    def value(self, tell: Callable[[str], None]) -> Reader[bool]:
        """Tell a text, a list or an object of JSON, as it grows. Returns whether it is closed; what
        stands inside is not checked."""
        if (yield from self.peek()) not in ('"', "[", "{"):
            raise NoCall(self.rest)
        nesting = _Nesting()
        while True:
            part = nesting.within(self.rest)
            self.at += len(part)
            if part:
                tell(part)
            if nesting.is_closed or self.is_ended:
                return nesting.is_closed
            yield


class _Nesting:
    """How deep a value of JSON is nested where its text ends."""

    def __init__(self) -> None:
        self._depth, self._is_text, self._is_escape = 0, False, False
        self.is_closed = False

    def within(self, text: str) -> str:
        """The part of a text, which goes on with the value, that belongs to it."""
        for i, c in enumerate(text):
            if self._is_escape:
                self._is_escape = False
            elif self._is_text:
                self._is_escape, self._is_text = c == "\\", c != '"'
            else:
                self._is_text = c == '"'
                self._depth += (c in "[{") - (c in "]}")
            if not self._depth and not self._is_text:
                self.is_closed = True
                return text[: i + 1]
        return text


def _possible(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of a text may begin one of these words."""
    for count in range(min(max(map(len, words)) - 1, len(text)), 0, -1):
        if any(word.startswith(text[-count:]) for word in words):
            return count
    return 0
