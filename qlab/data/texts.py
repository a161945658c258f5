"""Texts as documents, from files or from values of Python: one piece in memory at a time, and known
by their content.

A file is prose (one document), JSON lines or parquet; a value is a document, a row with a "text" or
with "messages", or columns of them, as `datasets` hands them out. No error shows the words of a
document.
"""

import codecs
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any, Protocol

from qlab.data.documents import WAYS, Render, are_ids, are_numbers, documents_of, sound
from qlab.errors import QlabError

BLOCK = 1 << 16  # bytes of a file that are read at a time
LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv")
PARQUET = b"PAR1"
# first bytes -> what a file is that holds its text in another form
OTHERS = {
    b"\x1f\x8b": "compressed",
    b"BZh": "compressed",
    b"\xfd7zXZ": "compressed",
    b"\x28\xb5\x2f\xfd": "compressed",
    b"PK\x03\x04": "an archive",
    b"%PDF-": "a PDF",
    b"ARROW1": "an Arrow file",
    b"{\\rtf": "RTF",
}
JSON_VALUE = re.compile(r'\s*(\{\s*("|$)|\[\s*([\[{"]|-?\d+\s*,|$))')
MARKUP = re.compile(r"\s*<(!doctype html|html|\?xml)\b", re.IGNORECASE)
LONGEST_NAME = 255  # bytes of a file's name; a longer string is a document


class Digest(Protocol):
    """A running hash."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Text:
    """One text. name: what reports call it. read: its documents, each an iterable of pieces that is
    used up before the next one is asked for; what is read goes into the hash."""

    name: str
    read: Callable[[Digest, Render], Iterator[Iterable[str]]]
    path: Path | None = None  # of its file


def texts_of(given: Any) -> list[Text]:
    """The texts that a path, a document, or any iterable of paths, documents or rows stands for."""
    if isinstance(given, str | os.PathLike | Mapping):
        given = [given]
    if are_numbers(given):
        raise QlabError(f"a {type(given).__name__} is no text; give token ids to qlab.from_ids")
    if hasattr(given, "columns"):
        raise QlabError(
            f"a {type(given).__name__} is a table; give the column that holds its texts, such as "
            'table["text"]'
        )
    if isinstance(given, bytes | bytearray) or not isinstance(given, Iterable):
        raise QlabError(f"a {type(given).__name__} is no text; {WAYS}")
    values = iter(given)
    first = next(values, None)
    if first is None:
        raise QlabError("no text was given; name at least one text or jsonl file")
    if isinstance(first, os.PathLike) or (isinstance(first, str) and not _is_document(first)):
        every = [first, *values]
        if not any(isinstance(value, str) and _is_document(value) for value in every):
            return [_file(value) for value in every]
        values = iter(every[1:])
    return [Text("documents", partial(_of_values, chain([first], values)))]


def _is_document(text: str) -> bool:
    """Whether a string is a document and no path: no file has such a name, or it is a sentence that
    no file is called."""
    names = re.split(r"[/\\]", text)
    if "\n" in text or any(len(name.encode(errors="replace")) > LONGEST_NAME for name in names):
        return True
    a_path = re.match(r"[~./\\]", text) or re.search(r"\.\w{1,8}$", text)
    sentence = len(text.split()) > 2 or text != text.strip()
    return bool(text) and sentence and not a_path and not os.path.exists(text)


def _of_values(values: Iterable[Any], digest: Digest, render: Render) -> Iterator[Iterable[str]]:
    blank = True
    for number, value in enumerate(values, 1):
        if isinstance(value, str) and not _is_document(value) and _is_file(value):
            raise QlabError(
                f"document {number} is the path of a file, {_shown(Path(value))}; give files "
                "alone, or documents alone"
            )
        for document in documents_of(value, f"document {number}", render):
            digest.update(document.encode() + b"\0")
            blank = blank and not document.strip()
            yield [document]
    if blank:
        raise QlabError("the documents are empty; give some with words in them")


def _is_file(text: str) -> bool:
    try:
        return os.path.isfile(text)
    except ValueError:  # a NUL
        return False


def _file(path: str | os.PathLike[str]) -> Text:
    if not isinstance(path, str | os.PathLike):
        raise QlabError(f"a {type(path).__name__} stands among the paths of texts; {WAYS}")
    if path == "":
        raise QlabError(f"'' holds no words and is the path of no file; {WAYS}")
    return Text(Path(path).name, partial(_of_file, Path(path)), Path(path))


def open_regular(path: Path, what: str) -> IO[bytes]:
    """The file, open for reading; refuses what is none: a folder, a pipe (which may never end), a
    device."""
    try:
        mode = path.stat().st_mode
        ordinary = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
        if ordinary:
            return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise QlabError(
            f"the {what} {_shown(path)} cannot be read ({reason}); check the path"
        ) from error
    raise QlabError(f"the {what} {_shown(path)} is a pipe or a device; give an ordinary file")


def _shown(path: Path) -> str:
    text = str(path)
    return text if len(text) <= LONGEST_NAME else f"{text[:40]}... of {len(text)} characters"


def _of_file(path: Path, digest: Digest, render: Render) -> Iterator[Iterable[str]]:
    with open_regular(path, "text") as file:
        head = _block(file, path)
        what = next((what for mark, what in OTHERS.items() if head.startswith(mark)), None)
        if what:
            raise QlabError(
                f"the text {path} is {what}; write its text as a .txt file, or as a .jsonl "
                'file with a "text" on every line'
            )
        digest.update(head)
        raw = _read(file, path, digest)
        if head.startswith(PARQUET):
            for _ in raw:
                pass
            documents = _rows(path, render)
        else:
            pieces = _decoded(chain([head], raw), path)
            first = next(pieces, "")
            lines = _holds_lines(path, first, whole=len(head) < BLOCK)
            pieces = chain([first], pieces)
            documents = _of_lines(path, pieces, render) if lines else iter([pieces])
        blank = True
        for document in documents:
            seen = _Seen(document)
            yield seen
            for _ in seen:  # what nobody asked for is checked and hashed all the same
                pass
            blank = blank and seen.blank
    if blank:
        raise QlabError(f"the text {path} is empty; give one with words in it")


class _Seen:
    """The pieces of a document, and whether those that went by were blank."""

    def __init__(self, pieces: Iterable[str]):
        self.pieces, self.blank = pieces, True

    def __iter__(self) -> Iterator[str]:
        for piece in self.pieces:
            self.blank = self.blank and not piece.strip()
            yield piece


def _block(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read(BLOCK)
    except OSError as error:
        raise QlabError(
            f"the text {path} cannot be read ({error.strerror}); check the path"
        ) from error


def _read(file: IO[bytes], path: Path, digest: Digest) -> Iterator[bytes]:
    while block := _block(file, path):
        digest.update(block)
        yield block


def _decoded(blocks: Iterable[bytes], path: Path) -> Iterator[str]:
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    for block in chain(blocks, [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise QlabError(
                f"the text {path} is not UTF-8 (byte {done - waiting + error.start}); convert it "
                "first"
            ) from error
        if not done:
            piece = piece.removeprefix("\ufeff")  # the mark that some editors begin files with
        done += len(block)
        yield sound(piece, f"the text {path}")


def _holds_lines(path: Path, head: str, whole: bool) -> bool:
    """Whether a file that begins so holds JSON lines; refuses what is neither they nor prose."""
    kind, (line, *more) = path.suffix.lower(), head.lstrip().split("\n", 1)
    begun = (
        not whole and not more and bool(JSON_VALUE.match(line))
    )  # the first line is longer than what was read of it
    if kind in LINES or begun or isinstance(_parsed(line), Mapping):
        return True
    if JSON_VALUE.match(line) and are_ids(_parsed(line)):
        raise QlabError(f"the text {path} holds token ids; give them to qlab.from_ids")
    if kind == ".json" or JSON_VALUE.match(line):
        raise QlabError(
            f'the text {path} is one JSON value; write a JSON object with a "text" on every line '
            "of a .jsonl file"
        )
    if kind in TABLES or MARKUP.match(line):
        form = "a table" if kind in TABLES else "HTML or XML"
        raise QlabError(
            f"the text {path} is {form}, whose marks would be calibrated on; give its words alone"
        )
    lines = [line for line in head.split("\n") if line.strip()]
    if 2 * sum(_is_row(_parsed(line)) for line in lines) > len(lines):
        raise QlabError(
            f"the text {path} begins as prose, and most of its lines are JSON objects with a "
            '"text"; remove what is before '
            "them"
        )
    return False


def _is_row(value: Any) -> bool:
    return isinstance(value, Mapping) and ("text" in value or "messages" in value)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or nested deeper than any text is
        return None


def _of_lines(path: Path, pieces: Iterable[str], render: Render) -> Iterator[Iterable[str]]:
    for number, line in enumerate(_lines(pieces), 1):
        if line.strip():
            where, row = f"{path}, line {number}", _parsed(line)
            if are_ids(row) and not (
                isinstance(row, Mapping) and ("text" in row or "messages" in row)
            ):
                raise QlabError(
                    f'{where}: not a JSON object with a "text" but token ids; give them to '
                    "qlab.from_ids"
                )
            if not isinstance(row, Mapping) or not (
                isinstance(row.get("text"), str) or isinstance(row.get("messages"), list)
            ):
                raise QlabError(
                    f'{where}: not a JSON object with a "text", or with "messages"; write one per '
                    "line"
                )
            yield from ([document] for document in documents_of(row, where, render))


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """Not splitlines: JSON strings may hold other line separators."""
    begun: list[str] = []
    for piece in pieces:
        *ended, rest = piece.split("\n")
        for end in ended:
            yield "".join([*begun, end])
            begun = []
        begun.append(rest)
    yield "".join(begun)


def _rows(path: Path, render: Render) -> Iterator[Iterable[str]]:
    """The documents of a parquet file."""
    for number, row in enumerate(_parquet_rows(path), 1):
        yield from ([document] for document in documents_of(row, f"{path}, row {number}", render))


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """The "text" or the "messages" of every row, a few rows in memory at a time."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise QlabError(
            f"the text {path} is parquet, which is read with pyarrow; install it, or write "
            'a .jsonl file with a "text" on every line'
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "messages") if name in file.schema_arrow.names][:1]
            for batch in file.iter_batches(batch_size=256, columns=columns) if columns else ():
                yield from batch.to_pylist()
    except Exception as error:  # whatever a damaged file makes pyarrow raise
        raise QlabError(
            f"the text {path} is no parquet that pyarrow reads ({type(error).__name__}); "
            "write it again"
        ) from error
    if not columns:
        raise QlabError(
            f'the text {path} has no column "text" or "messages"; rename the one that '
            "holds its texts"
        )
