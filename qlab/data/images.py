"""Samples of text and images, made by the model's own processor, to calibrate the decoder behind a
vision tower."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from qlab.algebra.random import generator
from qlab.data.chats import text_of_chat
from qlab.data.texts import open_regular
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.process.shown import Shown, some
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, repr=False, kw_only=True)
class Samples(Shown):
    """Samples of text and images to calibrate a model on, and where they came from.

    Args:
        inputs: the arguments of the model for each sample: name -> tensor, with input_ids
            [1, tokens] and what the processor makes of the images.
        texts: the names of the .jsonl files.
        sha256: the hash of these files.
        seed: the seed that chose the samples.
        images: how many images all samples have.
        image_tokens: how many tokens of all samples stand for images.
        files: the files that were read, images among them.

    Example:
        >>> import qlab, torch
        >>> ids = torch.ones(1, 5, dtype=torch.long)
        >>> samples = qlab.Samples(inputs=({"input_ids": ids},), texts=("one.jsonl",), sha256="",
        ...                        seed=0, images=0, image_tokens=0)
        >>> samples.count, samples.longest, len(samples.batches(64))
        (5, 5, 1)
    """

    inputs: tuple[Mapping[str, Tensor], ...]
    texts: tuple[str, ...]
    sha256: str
    seed: int
    images: int
    image_tokens: int
    files: tuple[Path, ...] = ()

    @property
    def count(self) -> int:
        """Tokens of all samples, with those that stand for images."""
        return sum(sample["input_ids"].numel() for sample in self.inputs)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(sample["input_ids"].shape[1] for sample in self.inputs)

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """The arguments of each call of the model: one sample, whatever `tokens` is. Samples
        differ in length, and calibration would see the padding of larger batches."""
        return list(self.inputs)

    def summary(self) -> dict[str, str]:
        """The facts that are printed."""
        return {
            "tokens": f"{self.count:,} in {len(self.inputs)} samples, chosen by seed {self.seed}",
            "images": f"{self.images}, which are {self.image_tokens:,} of the tokens",
            "texts": some(self.texts),
            "sha256": self.sha256[:16],
        }

    def describe(self) -> dict[str, object]:
        """What reports say of the samples: where they came from, and the hash of their tensors."""
        digest = hashlib.sha256()
        for sample in self.inputs:
            for name in sorted(sample):
                content = sample[name].contiguous().view(torch.uint8).numpy().tobytes()
                digest.update(name.encode() + content)
        return {
            "texts": list(self.texts),
            "sha256": self.sha256,
            "seed": self.seed,
            "samples": len(self.inputs),
            "tokens": self.count,
            "images": self.images,
            "image_tokens": self.image_tokens,
            "inputs_sha256": digest.hexdigest(),
        }


@undisturbed
def image_samples(
    model: Checkpoint,
    texts: Sequence[str | Path],
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
) -> Samples:
    """Samples of text and images, drawn at random and without replacement from lines of files.

    Needs Pillow.

    Args:
        model: a model with a processor: what `qlab.open` returns, or its directory.
        texts: .jsonl files, one sample on every line. "images" lists paths relative to the file, or
            is absent. "text" holds the processor's placeholders for the images in their order;
            "messages", instead of it, go through the processor's chat template, and
            {"type": "image"} in them stands for the next image.
        samples: how many lines to draw.
        length: the most tokens that a sample may have.
        seed: chooses the lines.

    Returns:
        The samples, in the order in which they were drawn.

    Raises:
        QlabError: a model without a processor, lines or images that cannot be read, fewer lines
            than `samples`, or a sample of more than `length` tokens.

    Example:
        >>> import qlab
        >>> model = qlab.open("llava")  # doctest: +SKIP
        >>> qlab.image_samples(model, ["samples.jsonl"], samples=8).images  # doctest: +SKIP
        11
        >>> qlab.image_samples("demo", ["my.jsonl"], samples=8)
        Traceback (most recent call last):
        ...
        qlab.errors.QlabError: my.jsonl holds 1 samples and 8 were asked for; give more lines, or
        fewer samples
    """
    processor, digest = processor_of(model), hashlib.sha256()
    paths = [Path(text) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    inputs: list[dict[str, Tensor]] = []
    images: list[Path] = []
    files: list[Path] = []
    for line in _drawn(paths, digest, samples, seed):
        row = line.read()
        paths_of_images = [line.path.parent / name for name in row.get("images", [])]
        inputs.append(_sample(processor, row, paths_of_images, length, str(line)))
        images += paths_of_images
        files += [line.path, *paths_of_images]
    return Samples(
        inputs=tuple(inputs),
        texts=tuple(path.name for path in paths),
        sha256=digest.hexdigest(),
        seed=seed,
        images=len(images),
        image_tokens=_count_of_image_tokens(model, inputs),
        files=tuple(dict.fromkeys(files)),
    )


def _drawn(paths: list[Path], digest: "hashlib._Hash", samples: int, seed: int) -> "list[_Line]":
    """As many lines of the files as there shall be samples, drawn without replacement."""
    lines = list(chain.from_iterable(_lines(path, digest) for path in paths))
    if not 1 <= samples <= len(lines):
        raise QlabError(
            f"{' and '.join(map(str, paths))} holds {len(lines)} samples and {samples} were asked "
            "for; give more lines, or fewer samples"
        )
    order = torch.randperm(len(lines), generator=generator(seed, "calibration"))
    return [lines[number] for number in order[:samples].tolist()]


def _count_of_image_tokens(model: Checkpoint, inputs: Sequence[Mapping[str, Tensor]]) -> int:
    """How many tokens of the samples stand for images; 0 where the config does not say which."""
    token = getattr(model.config, "image_token_id", None)
    if token is None:
        return 0
    return sum(int(sample["input_ids"].eq(token).sum()) for sample in inputs)


def processor_of(model: Checkpoint) -> Any:
    """The processor of a model's directory, which makes its inputs of text and images."""
    try:
        return AutoProcessor.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # whatever the files of the processor, or a missing package, make it raise
        raise QlabError(
            f"{model.path} has no processor that transformers can make here "
            f"({first_line(error)}); "
            "add its files, and install Pillow and, for models that also take videos, torchvision"
        ) from error


@dataclass(frozen=True)
class _Line:
    """The place of a sample in a file. Its text stays in the file until it is read."""

    path: Path
    number: int
    offset: int

    def read(self) -> Mapping[str, Any]:
        with open_regular(self.path, "samples") as file:
            file.seek(self.offset)
            return _parsed(file.readline(), str(self))

    def __str__(self) -> str:
        return f"{self.path}, line {self.number}"


def _lines(path: Path, digest: "hashlib._Hash") -> Iterator[_Line]:
    """The samples of a file, each of which is checked and hashed."""
    with open_regular(path, "samples") as file:
        offset = 0
        for number, text in enumerate(file, 1):
            digest.update(text)
            line = _Line(path, number, offset)
            offset += len(text)
            if text.strip():
                _parsed(text, str(line))
                yield line


def _parsed(text: bytes, where: str) -> Mapping[str, Any]:
    """The JSON object of a line; refuses one that is no sample."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not _is_sample(row):
        raise QlabError(
            f'{where}: not a JSON object with a "text" or "messages", and "images" as a list of '
            "paths; write one per line"
        )
    return row


def _is_sample(row: Mapping[str, Any]) -> bool:
    """Whether an object has either a "text" or "messages", and no other images than paths."""
    images = row.get("images", [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        return False
    return isinstance(row.get("text"), str) != isinstance(row.get("messages"), list)


def _sample(
    processor: Any, row: Mapping[str, Any], paths: Sequence[Path], length: int, where: str
) -> dict[str, Tensor]:
    """The arguments of the model for one sample; refuses one of more than `length` tokens."""
    images = [_image(path, where) for path in paths]
    try:
        text = row["text"] if "text" in row else text_of_chat(processor, row["messages"])
        processed = processor(text=[text], images=images or None, return_tensors="pt")
    except Exception as error:  # whatever the processor says of text and images that do not fit
        raise QlabError(
            f"{where}: the processor refuses this sample ({first_line(error)}); "
            "check its placeholders and images"
        ) from error
    # The attention mask of a single sample is 1 everywhere: the sample has no padding.
    sample = {
        name: tensor
        for name, tensor in processed.items()
        if isinstance(tensor, Tensor) and name != "attention_mask"
    }
    count = sample["input_ids"].shape[1]
    if count > length:
        raise QlabError(
            f"{where} has {count} tokens, more than the {length} of a sample, and cutting it would "
            "part images from their tokens; shorten it, or give a greater length"
        )
    return sample


def _image(path: Path, where: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise QlabError(
            "images are read with Pillow, which is not installed; install qlab[images]"
        ) from error
    try:
        with open_regular(path, "image") as file:
            return Image.open(file).convert("RGB")
    except QlabError as error:
        raise QlabError(f"{where}: {error}") from error
    except Exception as error:  # whatever the decoder of a format makes of a damaged file
        raise QlabError(
            f"{where}: the image {path} cannot be read ({first_line(error)}); "
            "check the path and the file"
        ) from error
