"""Texts as documents, from files or from values of Python, with one piece in memory at a time.

A file is prose (one document), JSON lines or parquet; its content tells which. A value is a
document, a row with a "text" or with "messages", or columns of these, as `datasets` returns them.
No error shows the words of a document.
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
# The first bytes of files that qlab does not read -> what such a file is.
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
LONGEST_NAME = 255  # bytes of the name of a file; a longer string is a document


class Digest(Protocol):
    """A running hash."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Text:
    """One text.

    name: what reports call it. read(digest, render): its documents, each an iterable of pieces that
    must be used up before the next document is asked for; all that is read goes into the hash.
    path: its file, if it is one.
    """

    name: str
    read: Callable[[Digest, Render], Iterator[Iterable[str]]]
    path: Path | None = None


def texts_of(given: Any) -> list[Text]:
    """The texts that a path, a document, or any iterable of paths, documents or rows stands for."""
    if isinstance(given, str | os.PathLike | Mapping):
        given = [given]
    _refuse_no_text(given)
    values = iter(given)
    first = next(values, None)
    if first is None:
        raise QlabError("no text was given; name at least one text or jsonl file")
    if _is_path(first):
        listed = [first, *values]
        if not any(isinstance(value, str) and _is_document(value) for value in listed):
            return [_file(value) for value in listed]
        values = iter(listed[1:])
    return [Text("documents", partial(_of_values, chain([first], values)))]


def _refuse_no_text(given: Any) -> None:
    """Refuse a value that is no text and no iterable of texts."""
    kind = type(given).__name__
    if are_numbers(given):
        raise QlabError(f"a {kind} is no text; give token ids to qlab.from_ids")
    if hasattr(given, "columns"):
        raise QlabError(
            f'a {kind} is a table; give the column that holds its texts, such as table["text"]'
        )
    if isinstance(given, bytes | bytearray) or not isinstance(given, Iterable):
        raise QlabError(f"a {kind} is no text; {WAYS}")


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and not _is_document(value))


def _is_document(text: str) -> bool:
    """Whether a string is a document and no path: no file can have such a name, or it reads as a
    sentence and no file has that name."""
    names = re.split(r"[/\\]", text)
    if "\n" in text or any(len(name.encode(errors="replace")) > LONGEST_NAME for name in names):
        return True
    like_a_path = re.match(r"[~./\\]", text) or re.search(r"\.\w{1,8}$", text)
    like_a_sentence = len(text.split()) > 2 or text != text.strip()
    return bool(text) and like_a_sentence and not like_a_path and not os.path.exists(text)


def _of_values(values: Iterable[Any], digest: Digest, render: Render) -> Iterator[Iterable[str]]:
    """The documents of values of Python."""
    blank = True
    for number, value in enumerate(values, 1):
        if isinstance(value, str) and not _is_document(value) and _is_file(value):
            raise QlabError(
                f"document {number} is the path of a file, {_shown(Path(value))}; "
                "give files alone, or documents alone"
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


def open_regular(path: Path, kind: str) -> IO[bytes]:
    """The file, open for reading; refuses folders, pipes (which may never end) and devices."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # opening a folder fails below
            return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        reason = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise QlabError(
            f"the {kind} {_shown(path)} cannot be read ({reason}); check the path"
        ) from error
    raise QlabError(f"the {kind} {_shown(path)} is a pipe or a device; give an ordinary file")


def _shown(path: Path) -> str:
    """A path in an error."""
    text = str(path)
    return text if len(text) <= LONGEST_NAME else f"{text[:40]}... of {len(text)} characters"


def _of_file(path: Path, digest: Digest, render: Render) -> Iterator[Iterable[str]]:
    """The documents of a file."""
    with open_regular(path, "text") as file:
        head = _block(file, path)
        for mark, kind in OTHERS.items():
            if head.startswith(mark):
                raise QlabError(
                    f"the text {path} is {kind}; write its text as a .txt file, or as a .jsonl "
                    'file with a "text" on every line'
                )
        digest.update(head)
        rest = _blocks(file, path, digest)
        if head.startswith(PARQUET):
            for _ in rest:  # each block is hashed as it is read; pyarrow opens the file itself
                pass
            documents = _rows(path, render)
        else:
            documents = _of_text(path, head, rest, render)
        blank = True
        for document in documents:
            seen = _Seen(document)
            yield seen
            for _ in seen:  # pieces that nobody asked for are checked and hashed all the same
                pass
            blank = blank and seen.blank
    if blank:
        raise QlabError(f"the text {path} is empty; give one with words in it")


def _of_text(
    path: Path, head: bytes, rest: Iterator[bytes], render: Render
) -> Iterator[Iterable[str]]:
    """The documents of a file of text: of each line where it holds JSON lines, else the whole."""
    pieces = _decoded(chain([head], rest), path)
    first = next(pieces, "")
    lines = _holds_lines(path, first, whole=len(head) < BLOCK)
    pieces = chain([first], pieces)
    return _of_lines(path, pieces, render) if lines else iter([pieces])


class _Seen:
    """The pieces of a document. blank: whether all pieces that were asked for are blank."""

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


def _blocks(file: IO[bytes], path: Path, digest: Digest) -> Iterator[bytes]:
    """The rest of a file in blocks, each of which goes into the hash."""
    block = _block(file, path)
    while block:
        digest.update(block)
        yield block
        block = _block(file, path)


def _decoded(blocks: Iterable[bytes], path: Path) -> Iterator[str]:
    """The text of a file in pieces; refuses bytes that are not UTF-8."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for block in chain(blocks, [b""]):
        pending = len(decoder.getstate()[0])  # bytes of a character that the last block began
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise QlabError(
                f"the text {path} is not UTF-8 (byte {offset - pending + error.start}); "
                "convert it first"
            ) from error
        if not offset:
            piece = piece.removeprefix("\ufeff")  # the byte order mark of some editors
        offset += len(block)
        yield sound(piece, f"the text {path}")


def _holds_lines(path: Path, head: str, whole: bool) -> bool:
    """Whether a file holds JSON lines; refuses one that holds neither these nor prose. head: its
    beginning; whole: whether this is all of it."""
    suffix = path.suffix.lower()
    line, *more = head.lstrip().split("\n", 1)
    value, like_json = _parsed(line), bool(JSON_VALUE.match(line))
    cut_off = not whole and not more  # the first line goes on behind the head
    if suffix in LINES or (cut_off and like_json) or isinstance(value, Mapping):
        return True
    if like_json and are_ids(value):
        raise QlabError(f"the text {path} holds token ids; give them to qlab.from_ids")
    if suffix == ".json" or like_json:
        raise QlabError(
            f'the text {path} is one JSON value; write a JSON object with a "text" on every line '
            "of a .jsonl file"
        )
    _refuse_other_than_prose(path, suffix, head, line)
    return False


def _refuse_other_than_prose(path: Path, suffix: str, head: str, line: str) -> None:
    """Refuse tables, markup, and JSON lines below a line of prose. line: the first line of the
    head."""
    if suffix in TABLES or MARKUP.match(line):
        form = "a table" if suffix in TABLES else "HTML or XML"
        raise QlabError(
            f"the text {path} is {form}, whose marks would be calibrated on; give its words alone"
        )
    lines = [line for line in head.split("\n") if line.strip()]
    rows = sum(_is_row(_parsed(line)) for line in lines)
    if 2 * rows > len(lines):
        raise QlabError(
            f"the text {path} begins as prose, and most of its lines are JSON objects with a "
            '"text"; remove what is before them'
        )


def _is_row(value: Any) -> bool:
    """Whether a JSON value is an object with a "text" or "messages"."""
    return isinstance(value, Mapping) and ("text" in value or "messages" in value)


def _parsed(line: str) -> Any:
    """The JSON value of a line; None where there is none, or one that is nested too deep."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _of_lines(path: Path, pieces: Iterable[str], render: Render) -> Iterator[Iterable[str]]:
    """The documents of JSON lines."""
    for number, line in enumerate(_lines(pieces), 1):
        if not line.strip():
            continue
        where, row = f"{path}, line {number}", _parsed(line)
        if are_ids(row) and not _is_row(row):
            raise QlabError(
                f'{where}: not a JSON object with a "text" but token ids; '
                "give them to qlab.from_ids"
            )
        if not isinstance(row, Mapping) or not (
            isinstance(row.get("text"), str) or isinstance(row.get("messages"), list)
        ):
            raise QlabError(
                f'{where}: not a JSON object with a "text", or with "messages"; write one per line'
            )
        yield from ([document] for document in documents_of(row, where, render))


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text, which end in line feeds alone: JSON strings may hold other characters
    at which str.splitlines cuts."""
    begun: list[str] = []
    for piece in pieces:
        *ends, rest = piece.split("\n")
        for end in ends:
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
            names = file.schema_arrow.names
            columns = [name for name in ("text", "messages") if name in names][:1]
            batches = file.iter_batches(batch_size=256, columns=columns) if columns else ()
            for batch in batches:
                yield from batch.to_pylist()
    except Exception as error:  # whatever a damaged file makes pyarrow raise
        raise QlabError(
            f"the text {path} is no parquet that pyarrow reads ({type(error).__name__}); "
            "write it again"
        ) from error
    if not columns:
        raise QlabError(
            f'the text {path} has no column "text" or "messages"; '
            "rename the one that holds its texts"
        )
