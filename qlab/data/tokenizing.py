"""Documents to token ids, a piece at a time, so that memory does not grow with the text.

A document longer than a piece is cut where the cut changes no token: the text before it is
tokenized with a margin of the text behind it and the other way round, and both readings must have
the same tokens at the same places around the cut.
"""

from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from qlab.errors import QlabError, first_line, reraise_own

PIECE = 1 << 16  # characters that are tokenized at a time
MARGIN = 1 << 10  # characters on either side of a cut
SEPARATOR = "\n\n"  # between documents


def token_ids(tokenizer: Any, documents: Iterable[Iterable[str]]) -> Iterator[array]:
    """The ids of all documents in order, without special tokens, each document ended by the
    separator."""
    short: list[str] = []  # documents that are tokenized in one call
    characters = 0
    for document in documents:
        pieces = chain(document, [SEPARATOR])
        text, ended = _gathered("", pieces, PIECE)
        # Only a fast tokenizer returns the places of its tokens, which a cut needs.
        in_one_call = ended or not getattr(tokenizer, "is_fast", False)
        if in_one_call:
            short.append(text + "".join(pieces))
            characters += len(short[-1])
        if not in_one_call or characters >= PIECE:
            yield from _plain(tokenizer, short)
            short, characters = [], 0
        if not in_one_call:
            yield from _in_pieces(tokenizer, text, pieces)
    yield from _plain(tokenizer, short)


def _gathered(text: str, pieces: Iterator[str], length: int) -> tuple[str, bool]:
    """The text and as many further pieces as make it longer than `length`; and whether the pieces
    ended before that."""
    parts, characters = [text], len(text)
    for piece in pieces:
        parts.append(piece)
        characters += len(piece)
        if characters > length:
            return "".join(parts), False
    return "".join(parts), True


def encode(tokenizer: Any, texts: str | list[str], **options: Any) -> Any:
    """What a tokenizer makes of texts. options: of its call. Refuses a tokenizer that fails, as one
    of damaged files does at the first word that it does not know."""
    try:
        return tokenizer(texts, **options)
    except BaseException as error:  # whatever the tokenizer's files make it raise
        reraise_own(error)
        raise QlabError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', '')} cannot make tokens of a "
            f"text ({first_line(error)}); repair its files, and the text where it holds half of a "
            "character"
        ) from error


def _encoded(tokenizer: Any, texts: list[str], places: bool) -> Any:
    return encode(
        tokenizer,
        texts,
        add_special_tokens=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=places,
    )


def _plain(tokenizer: Any, texts: list[str]) -> Iterator[array]:
    """The ids of each text."""
    if texts:
        for ids in _encoded(tokenizer, texts, places=False).input_ids:
            yield array("i", ids)


class _Reading:
    """A stretch of text and its tokens: the id of each, and where it begins and ends."""

    def __init__(self, tokenizer: Any, text: str):
        encoded = _encoded(tokenizer, [text], places=True)
        self.text, self.ids = text, array("i", encoded.input_ids[0])
        self.begins = array("i", [begin for begin, _ in encoded.offset_mapping[0]])
        self.ends = array("i", [end for _, end in encoded.offset_mapping[0]])

    def around(self, cut: int) -> list[tuple[int, int, int]]:
        """The tokens near a cut: begin and end relative to the cut, and the id."""
        near = MARGIN // 2
        tokens = zip(self.begins, self.ends, self.ids)
        return [
            (begin - cut, end - cut, token)
            for begin, end, token in tokens
            if -near <= begin - cut < near
        ]

    def between(self, start: int, stop: int) -> array:
        """The ids of the tokens that begin from `start` on and before `stop`."""
        tokens = zip(self.ids, self.begins)
        return array("i", [token for token, begin in tokens if start <= begin < stop])


def _in_pieces(tokenizer: Any, text: str, more: Iterator[str]) -> Iterator[array]:
    """The ids of one long document, of which `text` is the beginning and `more` the rest.

    The stretch at hand is cut a margin before its end. Where the text behind the cut, read with a
    margin before it, has other tokens around the cut, the stretch is doubled instead: a document in
    which no cut is safe (one letter a million times) is read as a whole.
    """
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
