"""Documents to token ids, a piece at a time, so that memory follows the pieces and not the text.

A document longer than a piece is cut where that changes nothing: both sides of a cut are tokenized
with a margin of the other, and the ids and places of all tokens around it must be the same in both
readings.
"""

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

PIECE = 1 << 16  # characters that are tokenized at a time
MARGIN = 1 << 10  # characters on either side of a cut
SEPARATOR = "\n\n"  # between documents


def token_ids(tokenizer: Any, documents: Iterable[Iterable[str]]) -> Iterator[array]:
    """The ids of all documents in order, without special tokens, each document ended by the
    separator."""
    waiting: list[str] = []
    held = 0
    for document in documents:
        pieces = chain(document, [SEPARATOR])
        text, ended = _gathered("", pieces, PIECE)
        if ended or not getattr(
            tokenizer, "is_fast", False
        ):  # only a fast tokenizer says where its tokens stand
            waiting.append(text + "".join(pieces))
            held += len(waiting[-1])
        else:
            yield from _plain(tokenizer, waiting)
            yield from _in_pieces(tokenizer, text, pieces)
            waiting, held = [], 0
        if held >= PIECE:
            yield from _plain(tokenizer, waiting)
            waiting, held = [], 0
    yield from _plain(tokenizer, waiting)


def _gathered(text: str, pieces: Iterator[str], length: int) -> tuple[str, bool]:
    """The text with as many more pieces as make it longer than `length`, and whether they ended
    before."""
    parts, held = [text], len(text)
    for piece in pieces:
        parts.append(piece)
        held += len(piece)
        if held > length:
            return "".join(parts), False
    return "".join(parts), True


def _encoded(tokenizer: Any, texts: list[str], places: bool) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=places,
    )


def _plain(tokenizer: Any, texts: list[str]) -> Iterator[array]:
    if texts:
        for ids in _encoded(tokenizer, texts, places=False).input_ids:
            yield array("i", ids)


class _Reading:
    """A stretch of text and its tokens: ids, and where each begins and ends."""

    def __init__(self, tokenizer: Any, text: str):
        encoded = _encoded(tokenizer, [text], places=True)
        self.text, self.ids = text, array("i", encoded.input_ids[0])
        self.begins = array("i", [begin for begin, _ in encoded.offset_mapping[0]])
        self.ends = array("i", [end for _, end in encoded.offset_mapping[0]])

    def around(self, cut: int) -> list[tuple[int, int, int]]:
        """The tokens near a cut, by where they stand relative to it."""
        near = MARGIN // 2
        tokens = zip(self.begins, self.ends, self.ids)
        return [
            (begin - cut, end - cut, i) for begin, end, i in tokens if -near <= begin - cut < near
        ]

    def between(self, start: int, stop: int) -> array:
        """The ids of the tokens that begin there."""
        return array("i", [i for i, begin in zip(self.ids, self.begins) if start <= begin < stop])


def _in_pieces(tokenizer: Any, text: str, more: Iterator[str]) -> Iterator[array]:
    """The ids of one long document. A stretch in which no cut is safe (one letter a million times)
    is read as a whole."""
    reading, start = _Reading(tokenizer, text), 0
    while True:
        cut = len(reading.text) - MARGIN
        following, ended = _gathered(reading.text[cut - MARGIN :], more, PIECE + 2 * MARGIN)
        after = _Reading(tokenizer, following)
        if reading.around(cut) == after.around(MARGIN):
            yield reading.between(start, cut)
            reading, start = after, MARGIN
        else:
            longer, ended = _gathered(
                reading.text + following[2 * MARGIN :], more, 2 * len(reading.text)
            )
            reading = _Reading(tokenizer, longer)
        if ended:
            yield reading.between(start, len(reading.text))
            return
