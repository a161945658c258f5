"""Token windows from local text, and the one source of random numbers."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint

SEPARATOR = "\n\n"  # between documents
Texts = str | Path | Sequence[str | Path]  # one file, or several


class Data(Protocol):
    """What a model is calibrated on. count: tokens of all samples; longest: of the longest one."""

    @property
    def count(self) -> int: ...

    @property
    def longest(self) -> int: ...

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """What the model is called with, about `tokens` at a time."""

    def describe(self) -> dict[str, object]: ...


@dataclass(frozen=True)
class Tokens:
    """ids [samples, length] and where they came from: names and sha256 of the texts, and the seed that chose them."""

    ids: Tensor
    texts: tuple[str, ...]
    sha256: str
    seed: int | None

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

    def describe(self) -> dict[str, object]:
        """For reports: everything but the ids themselves, and their hash."""
        digest = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()
        return {"texts": list(self.texts), "sha256": self.sha256, "seed": self.seed, "samples": self.ids.shape[0],
                "length": self.ids.shape[1], "ids_sha256": digest}  # fmt: skip


def generator(seed: int, path: str) -> torch.Generator:
    """The random numbers of one purpose: they depend on the seed and its name, not on the order of visits."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def tokens(model: Checkpoint, texts: Texts, samples: int = 128, length: int = 2048, seed: int = 0) -> Tokens:
    """`samples` distinct windows of `length` tokens, drawn without replacement from all full windows of the texts.

    texts: .jsonl files with a "text" in every line, or plain text; tokenized without special tokens.
    """
    if samples < 1:
        raise QlabError(f"{samples} samples were asked for; give at least 1")
    texts = _listed(texts)
    stream, digest = _stream(model, texts)
    windows = _full_windows(stream, length, texts)
    if len(windows) < samples:
        raise QlabError(f"{_and(texts)} gives {len(windows)} windows of {length} tokens and {samples} were asked for; "
                        "give more text, fewer samples or a shorter length")
    chosen = torch.randperm(len(windows), generator=generator(seed, "calibration"))[:samples]
    return Tokens(windows[chosen], _names(texts), digest, seed)


def first_windows(model: Checkpoint, texts: Texts, length: int, count: int | None = None) -> Tokens:
    """The first `count` full windows of `length` tokens (None: all of them), in the order of the text."""
    if count is not None and count < 1:
        raise QlabError(f"{count} windows were asked for; give at least 1")
    texts = _listed(texts)
    stream, digest = _stream(model, texts)
    return Tokens(_full_windows(stream, length, texts)[:count], _names(texts), digest, None)


def from_ids(model: Checkpoint, ids: Tensor) -> Tokens:
    """Token ids [samples, length] of one's own."""
    if ids.ndim != 2 or 0 in ids.shape:
        raise QlabError(f"token ids have shape {tuple(ids.shape)}; give [samples, length]")
    ids, vocabulary = ids.cpu(), model.config.get_text_config().vocab_size
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise QlabError(f"token id {low if low < 0 else high} is outside the vocabulary of {vocabulary} of {model.path}; "
                        "tokenize with the model's own tokenizer")
    return Tokens(ids.long(), (), hashlib.sha256(ids.long().numpy().tobytes()).hexdigest(), None)


def _listed(texts: Texts) -> Sequence[str | Path]:
    return [texts] if isinstance(texts, str | Path) else texts


def _names(texts: Sequence[str | Path]) -> tuple[str, ...]:
    return tuple(Path(t).name for t in texts)


def _and(texts: Sequence[str | Path]) -> str:
    return " and ".join(_names(texts))


def _full_windows(stream: Tensor, length: int, texts: Sequence[str | Path]) -> Tensor:
    if length < 1:
        raise QlabError(f"windows of {length} tokens hold nothing; give a length of at least 1")
    count = len(stream) // length
    if not count:
        raise QlabError(f"{_and(texts)} holds {len(stream)} tokens, less than one window of {length}; give more text or "
                        "a shorter length")
    return stream[: count * length].view(count, length)


def _tokenizer(model: Checkpoint) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the tokenizer's files make it raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QlabError(f"{model.path} has no tokenizer that transformers can read ({reason}); add its files") from error


def _stream(model: Checkpoint, texts: Sequence[str | Path]) -> tuple[Tensor, str]:
    if not texts:
        raise QlabError("no text was given; name at least one text or jsonl file")
    tokenizer = _tokenizer(model)
    digest = hashlib.sha256()
    documents = []
    for path in map(Path, texts):
        for document in _documents(path, digest):
            documents.append(document + SEPARATOR)
    ids = [i for piece in tokenizer(documents, add_special_tokens=False, verbose=False).input_ids for i in piece]
    if not ids:
        raise QlabError(f"the tokenizer of {model.path} makes no token of {_and(texts)}; check that it belongs to the model")
    return from_ids(model, torch.tensor([ids])).ids[0], digest.hexdigest()


def _documents(path: Path, digest: "hashlib._Hash") -> Iterator[str]:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")  # without the mark that some editors begin files with
    except OSError as error:
        raise QlabError(f"the text {path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise QlabError(f"the text {path} is not UTF-8 (byte {error.start}); convert it first") from error
    if (kind := path.suffix.lower()) == ".json":
        raise QlabError(f'the text {path} is one JSON value; write a JSON object with a "text" on every line of a .jsonl file')
    lines = text.split("\n") if kind in (".jsonl", ".ndjson") else []  # not splitlines: JSON strings may hold other line separators
    texts = [_text_of(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()] or [text]
    if not any(text.strip() for text in texts):
        raise QlabError(f"the text {path} is empty; give one with words in it")
    digest.update(raw)
    yield from texts


def _text_of(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise QlabError(f'{where}: not a JSON object with a "text"; write one per line')
    try:
        value["text"].encode()
    except UnicodeEncodeError as error:
        half = ascii(value["text"][error.start])
        raise QlabError(f"{where}: its text has {half} at {error.start}, half of a character; repair or remove it") from error
    return value["text"]
