"""The kinds of plain arguments of public functions: numbers, texts, paths, dtypes, functions.

Each is a function (value, name) -> value that refuses, in one sentence, a value that it does not
take.
"""

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlab.errors import QlabError

Kind = Callable[[Any, str], Any]
LONGEST = 80  # characters of a value that an error shows
LONGEST_TEXT = 500  # characters of a name, a pattern or a description
LARGEST = 2**63 - 1


def said(value: Any) -> str:
    """A value in an error: the value itself where it is a short number or text, else its type."""
    plain = value is None or isinstance(value, bool | int | float | str | os.PathLike)
    if not plain:
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more than 64 bits"
    text = repr(value if not isinstance(value, os.PathLike) else os.fspath(value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}... of {len(text)} characters"


def whole(value: Any, name: str) -> Any:
    """A whole number of 64 bits; the function itself checks its range."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not -LARGEST <= number <= LARGEST:
        raise QlabError(f"{name} is {said(value)}; give a whole number")
    return number


def optional_whole(value: Any, name: str) -> Any:
    """A whole number, or None."""
    return value if value is None else whole(value, name)


def fraction(value: Any, name: str) -> Any:
    """A finite number; the function itself checks its range."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not -LARGEST <= value <= LARGEST:
        raise QlabError(f"{name} is {said(value)}; give a number from 0 to 1")
    return value


def optional_fraction(value: Any, name: str) -> Any:
    """A finite number, or None."""
    return value if value is None else fraction(value, name)


def bits(value: Any, name: str) -> Any:
    """A number of bits, which need not be whole."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= LARGEST:
        raise QlabError(f"{name} is {said(value)}; give a number above 0, such as 3.5")
    return value


def flag(value: Any, name: str) -> Any:
    """True or False."""
    if not isinstance(value, bool):
        raise QlabError(f"{name} is {said(value)}; give True or False")
    return value


def text(value: Any, name: str) -> Any:
    """A string of at most 500 characters."""
    if not isinstance(value, str):
        raise QlabError(f"{name} is {said(value)}; give a string")
    if len(value) > LONGEST_TEXT:
        raise QlabError(f"{name} is {said(value)}; give a shorter string")
    return value


def optional_text(value: Any, name: str) -> Any:
    """A string of at most 500 characters, or None."""
    return value if value is None else text(value, name)


def word(value: Any, name: str) -> Any:
    """A name in lower case; upper case means the same."""
    return text(value, name).lower()


def optional_word(value: Any, name: str) -> Any:
    """A name in lower case, or None."""
    return value if value is None else word(value, name)


def names(value: Any, name: str) -> Any:
    """Several strings, or one."""
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple | set | frozenset):
        raise QlabError(f"{name} is {said(value)}; give a list of strings")
    return tuple(text(each, name) for each in value)


def path(value: Any, name: str) -> Any:
    """The path of a directory to be written."""
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise QlabError(f"{name} is {said(value)}; give the path of a directory")
    for part in Path(value).parts:
        # While a directory is written, a folder of a longer name lies beside it.
        if len(os.fsencode(part)) > 200:
            raise QlabError(
                f"{name} names a folder by {len(part)} characters; choose a shorter name"
            )
    return value


def optional_path(value: Any, name: str) -> Any:
    """The path of a folder that is read, or None."""
    if value is None:
        return value
    if "\0" in os.fspath(path(value, name)) or not os.fspath(value).strip():
        raise QlabError(f"{name} is {said(value)}; give the path of a folder")
    return value


def folder(value: Any, name: str) -> Any:
    """The path of a folder that is read."""
    return optional_path(path(value, name), name)


def dtype(value: Any, name: str) -> Any:
    """A floating-point dtype, or its name."""
    import torch

    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        shown = said(value)
    elif not dtype.is_floating_point or dtype.itemsize < 2:
        shown = str(dtype)
    else:
        return dtype
    raise QlabError(f"{name} is {shown}; give a floating-point dtype such as torch.bfloat16")


def device(value: Any, name: str) -> Any:
    """A device of torch, or its name."""
    import torch

    if not isinstance(value, str | torch.device):
        raise QlabError(f"{name} is {said(value)}; give 'cpu' or 'cuda'")
    return word(value, name) if isinstance(value, str) else value


def seeds(value: Any, name: str) -> Any:
    """Whole numbers."""
    if not isinstance(value, list | tuple | range):
        raise QlabError(f"{name} is {said(value)}; give a list of whole numbers")
    return [whole(each, name) for each in value]


def pair(value: Any, name: str) -> Any:
    """Two whole numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise QlabError(f"{name} is {said(value)}; give two whole numbers, such as (1, 8)")
    return tuple(whole(each, name) for each in value)


def function(value: Any, name: str) -> Any:
    """A function."""
    if not callable(value):
        raise QlabError(f"{name} is {said(value)}; give a function")
    return value
