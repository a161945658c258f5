"""Samples of text and images through the model's own processor: what a decoder behind a vision
tower is calibrated on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from qlab.data.calibration import generator
from qlab.data.texts import open_regular
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.process.shown import Shown, some
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, repr=False, kw_only=True)
class Samples(Shown):
    """What the model is called with, sample by sample, and where it came from; images and
    image_tokens are counted over all."""

    inputs: tuple[Mapping[str, Tensor], ...]
    texts: tuple[str, ...]
    sha256: str
    seed: int
    images: int
    image_tokens: int
    files: tuple[Path, ...] = ()  # that they were read from

    @property
    def count(self) -> int:
        """Tokens of all samples, those of images too."""
        return sum(sample["input_ids"].numel() for sample in self.inputs)

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return max(sample["input_ids"].shape[1] for sample in self.inputs)

    def batches(self, tokens: int) -> list[Mapping[str, Tensor]]:
        """One sample is one batch: samples differ in length, and padding would be calibrated on."""
        return list(self.inputs)

    def summary(self) -> dict[str, str]:
        """In a few words."""
        return {
            "tokens": f"{self.count:,} in {len(self.inputs)} samples, chosen by seed {self.seed}",
            "images": f"{self.images}, which are {self.image_tokens:,} of the tokens",
            "texts": some(self.texts),
            "sha256": self.sha256[:16],
        }

    def describe(self) -> dict[str, object]:
        """For reports: everything but the tensors, and their hash."""
        digest = hashlib.sha256()
        for sample in self.inputs:
            for name in sorted(sample):
                digest.update(
                    name.encode() + sample[name].contiguous().view(torch.uint8).numpy().tobytes()
                )
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
    """`samples` distinct lines, drawn without replacement, each one sample of at most `length`
    tokens.

    texts: .jsonl files. A line has "images", paths beside the file (it may have none), and either
    "text", in which the processor's placeholders stand for them in order, or "messages", which go
    through the processor's chat template; there
    {"type": "image"} stands for the next one. Needs Pillow.
    """
    processor, digest = _processor(model), hashlib.sha256()
    paths = [Path(text) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    lines = [line for path in paths for line in _lines(path, digest)]
    if not 1 <= samples <= len(lines):
        raise QlabError(
            f"{' and '.join(map(str, paths))} holds {len(lines)} samples and {samples} were asked "
            "for; give more lines, or fewer samples"
        )
    chosen = torch.randperm(len(lines), generator=generator(seed, "calibration"))[:samples].tolist()
    inputs, images = [], 0
    files: list[Path] = []
    for at in (lines[i] for i in chosen):
        where, line = str(at), at.read()
        sample, found = _sample(processor, line, at.path.parent, where)
        if sample["input_ids"].shape[1] > length:
            raise QlabError(
                f"{where} has {sample['input_ids'].shape[1]} tokens, more than the {length} of a "
                "sample, and cutting it would part images from their tokens; shorten it, or give "
                "a greater length"
            )
        inputs.append(sample)
        images += found
        files += [at.path, *(at.path.parent / name for name in line.get("images", []))]
    token = getattr(model.config, "image_token_id", None)
    seen = (
        sum(int(sample["input_ids"].eq(token).sum()) for sample in inputs)
        if token is not None
        else 0
    )
    return Samples(
        inputs=tuple(inputs),
        texts=tuple(path.name for path in paths),
        sha256=digest.hexdigest(),
        seed=seed,
        images=images,
        image_tokens=seen,
        files=tuple(dict.fromkeys(files)),
    )


def _processor(model: Checkpoint) -> Any:
    try:
        return AutoProcessor.from_pretrained(
            model.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        # whatever the processor's files, or a package that it needs and is absent, make it raise
        reason = first_line(error)
        raise QlabError(
            f"{model.path} has no processor that transformers can make here ({reason}); add its "
            "files, and install Pillow and, for models that also take videos, torchvision"
        ) from error


@dataclass(frozen=True)
class _Line:
    """Where a sample lies: its words stay in the file until they are asked for."""

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
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        line = None
    images = line.get("images", []) if isinstance(line, dict) else None
    whole = isinstance(images, list) and all(isinstance(i, str) for i in images)
    if (
        line is None
        or not whole
        or isinstance(line.get("text"), str) == isinstance(line.get("messages"), list)
    ):
        raise QlabError(
            f'{where}: not a JSON object with a "text" or "messages", and "images" as a list of '
            "paths; write one per line"
        )
    return line


def _sample(
    processor: Any, line: Mapping[str, Any], folder: Path, where: str
) -> tuple[dict[str, Tensor], int]:
    images = [_image(folder / name, where) for name in line.get("images", [])]
    try:
        text = (
            line["text"]
            if "text" in line
            else processor.apply_chat_template(line["messages"], tokenize=False)
        )
        found = processor(text=[text], images=images or None, return_tensors="pt")
    except Exception as error:  # whatever the processor says of text and images that do not fit
        reason = first_line(error)
        raise QlabError(
            f"{where}: the processor refuses this sample ({reason}); check its placeholders and "
            "images"
        ) from error
    # one sample has no padding, so its mask says nothing
    return {
        name: t for name, t in found.items() if isinstance(t, Tensor) and name != "attention_mask"
    }, len(images)


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
        reason = first_line(error)
        raise QlabError(
            f"{where}: the image {path} cannot be read ({reason}); check the path and the file"
        ) from error
