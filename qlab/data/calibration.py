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

from qlab.data.texts import Text, texts_of
from qlab.data.tokenizing import token_ids
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.process.shown import Shown, some
from qlab.process.surroundings import undisturbed

SPOOL = 1 << 25  # bytes of token ids that are kept in memory; more go to a temporary file


class Data(Protocol):
    """What a model is calibrated on. count: tokens of all samples; longest: of the longest one."""

    @property
    def count(self) -> int: ...

    @property
    def longest(self) -> int: ...

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """What the model is called with, about `tokens` at a time."""

    def describe(self) -> dict[str, object]: ...


@dataclass(frozen=True, repr=False)
class Tokens(Shown):
    """ids [samples, length] and where they came from: names and sha256 of the texts, and the seed
    that chose them."""

    ids: Tensor
    texts: tuple[str, ...]
    sha256: str
    seed: int | None
    files: tuple[Path, ...] = ()  # that they were read from

    @property
    def count(self) -> int:
        """Tokens of all samples."""
        return self.ids.numel()

    @property
    def longest(self) -> int:
        """Tokens of each sample."""
        return self.ids.shape[1]

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """Windows of about `tokens` tokens together."""
        return [{"input_ids": ids} for ids in self.ids.split(max(1, tokens // self.longest))]

    def summary(self) -> dict[str, str]:
        """In a few words."""
        samples, length = self.ids.shape
        chosen = "all in their order" if self.seed is None else f"chosen by seed {self.seed}"
        return {
            "tokens": f"{self.count:,}: {samples} windows of {length}, {chosen}",
            "texts": some(self.texts) or "token ids of one's own",
            "sha256": self.sha256[:16],
        }

    def describe(self) -> dict[str, object]:
        """For reports: everything but the ids themselves, and their hash."""
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        return {
            "texts": list(self.texts),
            "sha256": self.sha256,
            "seed": self.seed,
            "samples": self.ids.shape[0],
            "length": self.ids.shape[1],
            "ids_sha256": digest,
        }


def generator(seed: int, path: str) -> torch.Generator:
    """The random numbers of one purpose: they depend on the seed and its name, not on the order of
    visits."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@undisturbed
def tokens(
    model: Checkpoint, texts: Any, samples: int = 128, length: int = 2048, seed: int = 0
) -> Tokens:
    """`samples` distinct windows of `length` tokens, drawn without replacement from all full
    windows of the texts.

    texts: files of prose, of JSON lines with a "text" or "messages" in every line (known by their
    content) or of parquet with such a column; or documents, rows or columns of them, as `datasets`
    gives them, from any iterable. A string is a path unless no file can have that name. Chats go
    through the model's template. No special tokens are added.
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
    """The first `count` full windows of `length` tokens (None: all of them), in the order of the
    texts (see `tokens`)."""
    if count is not None and count < 1:
        raise QlabError(f"{count} windows were asked for; give at least 1")
    with _streamed(model, texts, length, count) as stream:
        return stream.taken(range(stream.windows)[:count], None)


@undisturbed
def from_ids(model: Checkpoint, ids: Tensor) -> Tokens:
    """Token ids [samples, length] of one's own."""
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


def _refuse_outside(model: Checkpoint, low: int, high: int) -> None:
    vocabulary = model.config.get_text_config().vocab_size
    if low < 0 or high >= vocabulary:
        raise QlabError(
            f"token id {low if low < 0 else high} is outside the vocabulary of {vocabulary} of "
            f"{model.path}; tokenize with the model's own tokenizer"
        )


def _tokenizer(model: Checkpoint) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the tokenizer's files make it raise
        reason = first_line(error)
        raise QlabError(
            f"{model.path} has no tokenizer that transformers can read ({reason}); add its files"
        ) from error


@dataclass(frozen=True)
class _Stream:
    """The ids of all documents one after the other, in a file that goes to the disk where it grows
    long."""

    file: IO[bytes]
    texts: Sequence[Text]
    sha256: str
    length: int
    windows: int

    @property
    def name(self) -> str:
        return _named(self.texts)

    def taken(self, windows: Iterable[int], seed: int | None) -> Tokens:
        """These windows, by their numbers."""
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
    """All full windows of `length` tokens, or the first `count`: text beyond them is hashed and not
    tokenized."""
    if length < 1:
        raise QlabError(f"windows of {length} tokens hold nothing; give a length of at least 1")
    texts, digest, tokenizer = texts_of(given), hashlib.sha256(), _tokenizer(model)
    documents = chain.from_iterable(
        text.read(digest, _renderer(model, tokenizer)) for text in texts
    )
    with SpooledTemporaryFile(max_size=SPOOL) as file:
        held = _spool(
            model, token_ids(tokenizer, documents), file, None if count is None else count * length
        )
        for _ in documents:  # what is left is checked and hashed
            pass
        name = _named(texts)
        if not held:
            raise QlabError(
                f"the tokenizer of {model.path} makes no token of {name}; check that it belongs "
                "to the model"
            )
        if held < length:
            raise QlabError(
                f"{name} holds {held} tokens, less than one window of {length}; give more text or "
                "a shorter length"
            )
        yield _Stream(file, texts, digest.hexdigest(), length, held // length)


def _spool(model: Checkpoint, pieces: Iterable[array], file: IO[bytes], enough: int | None) -> int:
    """Write ids until there are enough, and count them."""
    held = 0
    for ids in pieces:
        if ids:
            _refuse_outside(model, min(ids), max(ids))
            held += len(ids)
            try:
                file.write(ids.tobytes())
            except OSError as error:
                raise QlabError(
                    f"the ids of {held} tokens do not go into {gettempdir()} ({error.strerror}); "
                    "make room there, or name another folder in TMPDIR"
                ) from error
        if enough is not None and held >= enough:
            break
    return held


def _named(texts: Sequence[Text]) -> str:
    names = [text.name for text in texts]
    return " and ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def _renderer(model: Checkpoint, tokenizer: Any) -> Any:
    def render(messages: Any) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # whatever the template says of messages that it does not know
            reason = first_line(error)
            raise QlabError(
                f"the chat template of {model.path} refuses a row of messages "
                f'({reason:.100}); repair the row, or give it as a "text"'
            ) from error

    return render
