"""Values of Python as documents: a string, a row of a table, or columns. No error shows the words
of a document."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from qlab.errors import QlabError

CONTROL = re.compile(r"[\x01-\x08\x0e-\x1a\x1c-\x1f\x7f]")  # characters that are rare in text
IDS = ("input_ids", "ids", "tokens")  # names of columns of token ids
WAYS = (
    'give paths of files, documents, rows such as {"text": ...} or {"messages": [...]}, or token '
    "ids to qlab.from_ids"
)

Render = Callable[[Any], str]  # the messages of a chat -> its text


def documents_of(value: Any, where: str, render: Render) -> Iterator[str]:
    """The documents of a value: a string is one; a row, or columns (whose values are lists), has a
    "text" or "messages". where: the value's name in errors."""
    if isinstance(value, str):
        yield sound(value, where)
        return
    row: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    texts, chats = row.get("text"), row.get("messages")
    if isinstance(texts, str):
        yield sound(texts, where)
    elif _is_column(texts):
        for text in texts:
            yield from documents_of(text, where, render)
    elif _is_column(chats):
        one_chat = all(isinstance(message, Mapping) for message in chats)
        for chat in [chats] if one_chat else chats:
            yield sound(render(chat), where)
    elif are_ids(value):
        raise QlabError(f"{where} holds token ids; give them to qlab.from_ids")
    elif isinstance(value, Mapping):
        raise QlabError(f'{where} has neither a "text" nor "messages"; {WAYS}')
    else:
        raise QlabError(f"{where} is a {type(value).__name__} and no text; {WAYS}")


def _is_column(value: Any) -> TypeGuard[Iterable]:
    """Whether this is a list of values that are no numbers."""
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        return False
    return not are_numbers(value)


def are_numbers(value: Any) -> bool:
    """Whether this is a tensor or an array of numbers; columns of strings have a dtype too."""
    return hasattr(value, "shape") and bool(
        re.search("int|float|bool", str(getattr(value, "dtype", "")))
    )


def are_ids(value: Any) -> bool:
    """Whether this is a token id, several of them, or a row or table that has a column of them."""
    if isinstance(value, Mapping):
        return any(name in value for name in IDS)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value):
        return isinstance(value[0], int) or are_ids(value[0])
    return isinstance(value, int) or are_numbers(value)


def sound(text: str, where: str) -> str:
    """The text; refuses half characters, NUL bytes, and as many control characters as binary files
    have."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise QlabError(
            f"{where}: its text has {half} at {error.start}, half of a character; "
            "repair or remove it"
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
