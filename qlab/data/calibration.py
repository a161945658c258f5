"""Token windows from texts, and the one source of random numbers."""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import IO, Any, Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlab.algebra.random import generator
from qlab.data.chats import text_of_chat
from qlab.data.documents import Render
from qlab.data.texts import Text, texts_of
from qlab.data.tokenizing import token_ids
from qlab.errors import QlabError, first_line, reraise_own
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import read_json, refuse_leading_out
from qlab.process.shown import Shown, some
from qlab.process.surroundings import undisturbed

SPOOL = 1 << 25  # bytes of token ids up to which they stay in memory, not in a temporary file


class Data(Protocol):
    """Calibration data: samples that a model is called with."""

    @property
    def count(self) -> int:
        """Tokens of all samples."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """The arguments of each call of the model, about `tokens` tokens a call."""

    def describe(self) -> dict[str, object]:
        """What reports say of the data."""


@dataclass(frozen=True, repr=False)
class Tokens(Shown):
    """Windows of token ids, to calibrate or evaluate a model on, and where they came from.

    Args:
        ids: token ids, int64 [samples, length].
        texts: the names of the texts; empty for token ids of one's own.
        sha256: the hash of the texts, or of the ids where these are one's own.
        seed: the seed that chose the windows; None for windows in the order of the texts.
        files: the files that the texts were read from.

    Example:
        >>> import qlab
        >>> data = qlab.first_windows(qlab.open("demo"), "held-out.jsonl", length=64, count=2)
        >>> data.ids.shape, data.count, data.texts, data.seed
        (torch.Size([2, 64]), 128, ('held-out.jsonl',), None)
    """

    ids: Tensor
    texts: tuple[str, ...]
    sha256: str
    seed: int | None
    files: tuple[Path, ...] = ()

    @property
    def count(self) -> int:
        """Tokens of all samples."""
        return self.ids.numel()

    @property
    def longest(self) -> int:
        """Tokens of each sample."""
        return self.ids.shape[1]

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """The arguments of each call of the model: as many windows as have about `tokens` tokens,
        and at least one."""
        return [{"input_ids": ids} for ids in self.ids.split(max(1, tokens // self.longest))]

    def summary(self) -> dict[str, str]:
        """The facts that are printed."""
        samples, length = self.ids.shape
        chosen = "all in their order" if self.seed is None else f"chosen by seed {self.seed}"
        return {
            "tokens": f"{self.count:,}: {samples} windows of {length}, {chosen}",
            "texts": some(self.texts) or "token ids of one's own",
            "sha256": self.sha256[:16],
        }

    def describe(self) -> dict[str, object]:
        """What reports say of the windows: where they came from, and the hash of the ids."""
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        return {
            "texts": list(self.texts),
            "sha256": self.sha256,
            "seed": self.seed,
            "samples": self.ids.shape[0],
            "length": self.ids.shape[1],
            "ids_sha256": digest,
        }


@undisturbed
def tokens(
    model: Checkpoint, texts: Any, samples: int = 128, length: int = 2048, seed: int = 0
) -> Tokens:
    """Windows of token ids, drawn at random and without replacement from all full windows of texts.

    The documents are tokenized in order, joined by blank lines, and cut into windows. No special
    tokens are added.

    Args:
        model: the model whose tokenizer is used: what `qlab.open` returns, or its directory.
        texts: a path, a document, or any iterable of paths, of documents or of rows. Files hold
            prose, JSON lines with a "text" or "messages" on every line, or parquet with such a
            column; rows are dictionaries, as `datasets` gives them. "messages" go through the chat
            template of the model. A string is a path, unless no file can have such a name.
        samples: how many windows to draw.
        length: tokens in each window.
        seed: chooses the windows.

    Returns:
        The windows, in the order in which they were drawn: `Tokens` with ids [samples, length].

    Raises:
        QlabError: texts that cannot be read, hold no text or give fewer windows than `samples`; a
            model without a tokenizer.

    Example:
        >>> import qlab
        >>> model = qlab.open("demo")
        >>> data = qlab.tokens(model, "my.jsonl", samples=4, length=128, seed=0)
        >>> data.ids.shape, data.count
        (torch.Size([4, 128]), 512)
        >>> qlab.tokens(model, ["a document of a few words"], samples=1, length=4).ids.shape
        torch.Size([1, 4])
    """
    if samples < 1:
        raise QlabError(f"{samples} samples were asked for; give at least 1")
    with _streamed(model, texts, length) as stream:
        if stream.windows < samples:
            raise QlabError(
                f"{stream.name} gives {stream.windows} windows of {length} tokens and {samples} "
                "were asked for; give more text, fewer samples or a shorter length"
            )
        chosen = torch.randperm(stream.windows, generator=generator(seed, "calibration"))[:samples]
        return stream.taken(chosen.tolist(), seed)


@undisturbed
def first_windows(model: Checkpoint, texts: Any, length: int, count: int | None = None) -> Tokens:
    """The first full windows of token ids in texts, in their order: the data to evaluate on.

    Args:
        model: the model whose tokenizer is used: what `qlab.open` returns, or its directory.
        texts: files, documents or rows, as in `qlab.tokens`.
        length: tokens in each window.
        count: how many windows to take, if there are as many; None takes all.

    Returns:
        The windows: `Tokens` with ids [windows, length].

    Raises:
        QlabError: texts that cannot be read or hold less than one window; a model without a
            tokenizer.

    Example:
        >>> import qlab
        >>> qlab.first_windows("demo", "held-out.jsonl", length=256).ids.shape
        torch.Size([..., 256])
        >>> qlab.first_windows("demo", "held-out.jsonl", length=256, count=2).ids.shape
        torch.Size([2, 256])
    """
    if count is not None and count < 1:
        raise QlabError(f"{count} windows were asked for; give at least 1")
    with _streamed(model, texts, length, count) as stream:
        return stream.taken(range(stream.windows)[:count], None)


@undisturbed
def from_ids(model: Checkpoint, ids: Tensor) -> Tokens:
    """Token ids of one's own as calibration data.

    Args:
        model: the model that the ids are for: what `qlab.open` returns, or its directory.
        ids: whole numbers [samples, length], as a tensor, a numpy array or lists.

    Returns:
        `Tokens` with these ids as int64 on the CPU.

    Raises:
        QlabError: ids of another shape, or outside the vocabulary of the model.

    Example:
        >>> import qlab
        >>> qlab.from_ids("demo", [[1, 2, 3], [4, 5, 6]]).ids
        tensor([[1, 2, 3],
                [4, 5, 6]])
    """
    if ids.ndim != 2 or 0 in ids.shape:
        raise QlabError(f"token ids have shape {tuple(ids.shape)}; give [samples, length]")
    ids = ids.cpu()
    _refuse_outside(model, int(ids.min()), int(ids.max()))
    return Tokens(
        ids=ids.long(),
        texts=(),
        sha256=hashlib.sha256(ids.long().numpy().tobytes()).hexdigest(),
        seed=None,
    )


def unread_windows(samples: int, length: int) -> Tokens:
    """Windows of which only the numbers are known, to plan with: one token in memory."""
    ids = torch.zeros((), dtype=torch.int64).expand(samples, length)
    return Tokens(ids=ids, texts=(), sha256="", seed=None)


def _refuse_outside(model: Checkpoint, low: int, high: int) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    if low < 0 or high >= vocabulary:
        raise QlabError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocabulary} of "
            f"{model.path}; tokenize with the model's own tokenizer"
        )


def tokenizer_of(model: Checkpoint) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's directory."""
    _refuse_leading_out(model.path / "tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
    except BaseException as error:  # whatever the tokenizer's files make it raise
        reraise_own(error)
        raise QlabError(
            f"{model.path} has no tokenizer that transformers can read ({first_line(error)}); "
            "add its files"
        ) from error


def _refuse_leading_out(config: Path) -> None:
    """Refuse a tokenizer's configuration that has transformers read a file of another directory."""
    files = read_json(config).get("fast_tokenizer_files") if config.is_file() else None
    for file in files if isinstance(files, list) else ():
        refuse_leading_out(config, file)


@dataclass(frozen=True)
class _Stream:
    """The int32 ids of all documents, one after the other, in a temporary file.

    length: tokens in a window. windows: the full windows in the file.
    """

    file: IO[bytes]
    texts: Sequence[Text]
    sha256: str
    length: int
    windows: int

    @property
    def name(self) -> str:
        return _named(self.texts)

    def taken(self, windows: Iterable[int], seed: int | None) -> Tokens:
        """The windows of these numbers, which `seed` has chosen."""
        rows = []
        for window in windows:
            ids = array("i")
            self.file.seek(window * self.length * ids.itemsize)
            ids.frombytes(self.file.read(self.length * ids.itemsize))
            rows.append(torch.frombuffer(ids, dtype=torch.int32).long())
        files = tuple(text.path for text in self.texts if text.path)
        return Tokens(
            ids=torch.stack(rows),
            texts=tuple(text.name for text in self.texts),
            sha256=self.sha256,
            seed=seed,
            files=files,
        )


@contextmanager
def _streamed(
    model: Checkpoint, given: Any, length: int, count: int | None = None
) -> Iterator[_Stream]:
    """The ids of texts, cut into windows of `length` tokens. With `count`, text beyond the first
    `count` windows is hashed and not tokenized."""
    if length < 1:
        raise QlabError(f"windows of {length} tokens hold nothing; give a length of at least 1")
    texts, digest, tokenizer = texts_of(given), hashlib.sha256(), tokenizer_of(model)
    render = _renderer(model, tokenizer)
    documents = chain.from_iterable(text.read(digest, render) for text in texts)
    enough = None if count is None else count * length
    with SpooledTemporaryFile(max_size=SPOOL) as file:
        written = _spool(model, token_ids(tokenizer, documents), file, enough)
        for _ in documents:  # the rest is checked and hashed as it is read
            pass
        name = _named(texts)
        if not written:
            raise QlabError(
                f"the tokenizer of {model.path} makes no token of {name}; "
                "check that it belongs to the model"
            )
        if written < length:
            raise QlabError(
                f"{name} holds {written} tokens, less than one window of {length}; "
                "give more text or a shorter length"
            )
        yield _Stream(
            file=file,
            texts=texts,
            sha256=digest.hexdigest(),
            length=length,
            windows=written // length,
        )


def _spool(model: Checkpoint, pieces: Iterable[array], file: IO[bytes], enough: int | None) -> int:
    """Write ids until there are `enough` (None: to the end); the number of ids written."""
    written = 0
    for ids in pieces:
        if ids:
            _refuse_outside(model, min(ids), max(ids))
            written += len(ids)
            try:
                file.write(ids.tobytes())
            except OSError as error:
                raise QlabError(
                    f"the ids of {written} tokens do not go into {gettempdir()} "
                    f"({error.strerror}); make room there, or name another folder in TMPDIR"
                ) from error
        if enough is not None and written >= enough:
            break
    return written


def _named(texts: Sequence[Text]) -> str:
    names = [text.name for text in texts]
    return " and ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def _renderer(model: Checkpoint, tokenizer: Any) -> Render:
    """A function from the messages of a chat to its text, by the chat template of the model."""

    def render(messages: Any) -> str:
        try:
            return text_of_chat(tokenizer, messages)
        except Exception as error:  # whatever the template says of messages that it does not know
            raise QlabError(
                f"the chat template of {model.path} refuses a row of messages "
                f'({first_line(error):.100}); repair the row, or give it as a "text"'
            ) from error

    return render
