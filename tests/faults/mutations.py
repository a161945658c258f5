"""Valid files changed at random: their bytes, the values of their JSON, and its text.

Each function takes what draws (`random.Random`) and returns a changed copy.
"""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Numbers at the ends of what formats, languages and memories hold.
NUMBERS = [
    *(0, 1, -1, 2, 3, 7, 63, 64, 65, 127, 128, 255, 1000, 10**6, 10**9, 2**31 - 1, 2**31, 2**32),
    *(2**53 + 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -(2**31), -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
]
OUTSIDE = ["../outside/model.safetensors", "../outside/config.json", "../outside", "/etc/passwd"]
TEXTS = [
    *("", " ", "x", "0", "null", "none", "auto", "4", "int4-g64", "float16", "linear", "llama"),
    *OUTSIDE,
    *(
        "..",
        ".",
        "~",
        "a/b",
        "a\\b",
        "a\0b",
        "\ud800",
        "\u202e",
        "é",
        "中",
        "x" * 300,
        "x" * 70_000,
    ),
    *("{{ 1/0 }}", "(" * 300, "re:(a+)+$", "re:[", "%s%n", "\n", "-1", "1e9", "NaN"),
]
OTHERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": None},
    [0] * 100,
    {"a": {"a": 1}},
]
DEEP = 3000  # levels, more than Python follows


def any_value(draw: random.Random) -> Any:
    """A value that no file should hold in this place."""
    return copy.deepcopy(draw.choice(draw.choice([NUMBERS, TEXTS, OTHERS])))


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a value, itself among them."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:50]) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def at(value: Any, path: tuple) -> Any:
    """The value in this place."""
    for key in path:
        value = value[key]
    return value


def changed_json(draw: random.Random, value: Any, times: int = 3) -> Any:
    """A value of JSON in which a few values are others, gone, doubled, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, times)):
        everywhere = list(places(value))
        # near the top as often as in long lists below it
        depth = draw.randint(0, max(map(len, everywhere)))
        path = draw.choice([p for p in everywhere if len(p) == depth])
        if not path:
            value = any_value(draw) if draw.random() < 0.05 else value
            continue
        holder, key = at(value, path[:-1]), path[-1]
        _change(draw, holder, key, at(value, draw.choice(everywhere)))
    return value


def _change(draw: random.Random, holder: Any, key: Any, other: Any) -> None:
    """One change of one value. other: what stands elsewhere."""
    old = holder[key]
    kind = draw.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[key] = copy.deepcopy(other)
    elif kind == 2 and type(old) is int:
        holder[key] = draw.choice([old + 1, old - 1, -old, 2 * old, old * 10**6, f"{old}"])
    elif kind == 3 and isinstance(holder, dict):
        holder[draw.choice(TEXTS)] = holder.pop(key)
    elif kind == 4 and isinstance(old, str) and old:
        cut = draw.randrange(len(old))
        holder[key] = old[:cut] + draw.choice(TEXTS) + old[cut + draw.randint(0, 1) :]
    elif kind == 5 and isinstance(old, list):
        holder[key] = draw.choice([old * 2, old[:-1], [old], [*old, any_value(draw)], old[::-1]])
    elif kind == 6 and isinstance(old, dict):
        old[draw.choice([*TEXTS, *old])] = any_value(draw)
    else:
        holder[key] = any_value(draw)


def text_of(draw: random.Random, value: Any) -> bytes:
    """The JSON of a value as bytes, now and then damaged as text."""
    text = json.dumps(value)
    raw = text.encode(errors="surrogatepass")
    kind = draw.randrange(24)
    if kind == 0:
        return changed_bytes(draw, raw)
    if kind == 1:  # a key twice
        return raw.replace(b"{", b'{"model_type": "gpt2", "a": 1, "a": 2, ', 1)
    if kind == 2:
        opened = draw.choice([b"[", b'{"a":'])
        return raw[:-1] + b', "deep": ' + opened * DEEP + b"}"
    if kind == 3:
        return draw.choice([b"\xef\xbb\xbf" + raw, text.encode("utf-16"), b"", b"\0" * 8, b"null"])
    if kind == 4:
        closed = b"[" * DEEP + b"]" * DEEP
        return raw.replace(b": ", b": " + closed + b', "x": ', 1)
    if kind == 5:
        return raw.replace(b": ", b": " + b"9" * 5000 + b', "x": ', 1)
    return raw


def changed_bytes(draw: random.Random, raw: bytes, times: int = 4) -> bytes:
    """Bytes in which a few are others, gone, doubled, or a number at the end of its range."""
    whole = bytearray(raw)
    for _ in range(draw.randint(1, times)):
        head = min(len(whole), 400)
        start = draw.randint(0, draw.choice([head, len(whole)]))
        length = draw.choice([1, 1, 2, 4, 8, 16, 64, 1000])
        kind = draw.randrange(6)
        if kind == 0 and start < len(whole):
            whole[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            whole[start : start + length] = draw.randbytes(min(length, 64))
        elif kind == 2:
            del whole[start : start + length]
        elif kind == 3:
            whole[start:start] = whole[start : start + length]
        elif kind == 4:
            width = draw.choice([1, 2, 4, 8])
            number = draw.choice([n for n in NUMBERS if isinstance(n, int)])
            whole[start : start + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        elif draw.random() < 0.3:
            del whole[start:]
    return bytes(whole)


def changed_text(draw: random.Random, text: str, words: list[str]) -> str:
    """A text in which a few characters or words are others, gone or doubled."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randint(0, len(text))
        stop = min(len(text), start + draw.choice([0, 1, 1, 3, 8]))
        piece = draw.choice([text[start:stop] * 2, "", draw.choice(words), draw.choice(TEXTS)])
        text = text[:start] + piece + text[stop:]
    return text
