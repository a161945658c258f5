"""What a value of Python says as documents: a string, a row of a table, or columns. No error shows
a word of them."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from qlab.errors import QlabError

CONTROL = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # what no text has many of
IDS = ("input_ids", "ids", "tokens")
WAYS = (
    'give paths of files, documents, rows such as {"text": ...} or {"messages": [...]}, or token '
    "ids to qlab.from_ids"
)

Render = Callable[[Any], str]  # the messages of a chat -> its document


def documents_of(value: Any, where: str, render: Render) -> Iterator[str]:
    """The documents of a value: itself, or of a row or of columns, whose values are lists."""
    texts: Any = value.get("text") if isinstance(value, Mapping) else value
    chats: Any = value.get("messages") if isinstance(value, Mapping) else None
    if isinstance(texts, str):
        yield sound(texts, where)
    elif isinstance(value, Mapping) and _listed(texts):
        for text in texts:
            yield from documents_of(text, where, render)
    elif _listed(chats):
        alone = all(isinstance(message, Mapping) for message in chats)
        for chat in [chats] if alone else chats:
            yield sound(render(chat), where)
    elif are_ids(value):
        raise QlabError(f"{where} holds token ids; give them to qlab.from_ids")
    elif isinstance(value, Mapping):
        raise QlabError(f'{where} has neither a "text" nor "messages"; {WAYS}')
    else:
        raise QlabError(f"{where} is a {type(value).__name__} and no text; {WAYS}")


def _listed(value: Any) -> bool:
    kind = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    return kind and not are_numbers(value)


def are_numbers(value: Any) -> bool:
    """Whether this is a tensor or an array of numbers; columns of strings have a dtype too."""
    return hasattr(value, "shape") and bool(
        re.search("int|float|bool", str(getattr(value, "dtype", "")))
    )


def are_ids(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(name in value for name in IDS)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value):
        return isinstance(value[0], int) or are_ids(value[0])
    return isinstance(value, int) or are_numbers(value)


def sound(text: str, where: str) -> str:
    """A piece of text, unless it is none: half characters, NUL bytes, or control characters as
    binary files have them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise QlabError(
            f"{where}: its text has {half} at {error.start}, half of a character; repair or "
            "remove it"
        ) from error
    if "\0" in text:
        raise QlabError(
            f"{where}: its text has a NUL at {text.index(chr(0))}, as binary files and UTF-16 "
            "have; convert it to UTF-8, or remove it"
        )
    if 20 * len(CONTROL.findall(text)) > len(text):
        raise QlabError(
            f"{where}: more than a twentieth of its text are control characters, as in binary "
            "files; give text"
        )
    return text
