"""Images in chats: what a model's own processor makes of them, and at which positions they stand.

A chat holds them as parts of a content, beside {"type": "text", "text": ...}:

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}      OpenAI's
    {"type": "image", "path": "cat.png"}                                          transformers'

Nothing is fetched from a network.
"""

import base64
import binascii
import inspect
import io
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlab.data.chats import text_of_chat
from qlab.data.images import processor_of
from qlab.errors import QlabError, first_line, printable
from qlab.files.checkpoint import Checkpoint
from qlab.process.extras import needed

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PIXELS = 2**24  # of an image
IMAGES = 16  # of a prompt
OF_TOKENS = ("input_ids", "attention_mask")  # what a processor gives beside the images


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A prompt as a model takes it: token ids, and what its processor makes of images."""

    ids: list[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Placed:
    """inputs: arguments of a model for a prompt with images. shift: by how much the positions
    behind the prompt differ from counts of tokens."""

    inputs: Mapping[str, Tensor]
    shift: int


class ImageReader:
    """Reads chats with images for a model, by its processor, which is made for the first one. May
    be called from any thread.

    Args:
        model: whose directory has the processor.
    """

    def __init__(self, model: Checkpoint):
        self._model, self._lock = model, threading.Lock()

    @cached_property
    def processor(self) -> Any:
        """transformers'."""
        return processor_of(self._model)

    def encoded(self, chat: Sequence[Mapping[str, Any]], **template: Any) -> Encoded:
        """The prompt that a chat is. template: what its template takes beside the messages."""
        pictures: list[Any] = []
        with self._lock:  # the images of one prompt at a time are in memory
            messages = in_parts(chat, pictures)
            text = text_of_chat(self.processor, messages, **template)
            processed = self.processor(
                text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False
            )
        inputs = {
            name: value
            for name, value in processed.items()
            if isinstance(value, Tensor) and name not in OF_TOKENS
        }
        if "cross_attention_mask" in inputs:
            raise QlabError(
                "the model reads images by an attention of their own, which the cache does not "
                "hold; send text alone"
            )
        ids = processed["input_ids"][0].tolist()
        return Encoded(ids=ids, inputs=inputs if pictures else {})


def has_images(chat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message of a chat has a part that is not text."""
    contents = [message.get("content") for message in chat]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") != "text" for part in parts)


def as_text(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chat without images, whose contents are texts: one line for each part."""
    return [{**message, **_text(message.get("content"))} for message in chat]


def in_parts(
    chat: Sequence[Mapping[str, Any]], pictures: list[Any] | None = None
) -> list[dict[str, Any]]:
    """A chat whose contents are lists of parts, as templates of models that take images read them.
    Its images are added to the pictures."""
    pictures = [] if pictures is None else pictures
    return [{**message, "content": _parts(message.get("content"), pictures)} for message in chat]


def _text(content: Any) -> dict[str, str]:
    if not isinstance(content, list):
        return {}
    return {"content": "\n".join(str(part.get("text", "")) for part in content)}


def _parts(content: Any, pictures: list[Any]) -> list[dict[str, Any]]:
    if not isinstance(content, list):
        return [{"type": "text", "text": content}] if content else []
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "text":
            parts.append({"type": "text", "text": part.get("text", "")})
            continue
        if len(pictures) == IMAGES:
            raise QlabError(f"a prompt has at most {IMAGES} images; send fewer")
        pictures.append(_picture(part))
        parts.append({"type": "image"})
    return parts


# ------------------------------------------------------------------ pictures
def _picture(part: Mapping[str, Any]) -> Any:
    """The image of a part of a content, in RGB."""
    if part.get("type") == "image" and isinstance(part.get("path"), str):
        path = Path(part["path"]).expanduser()
        return decoded(_bytes_in(path), str(path))
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if part.get("type") != "image_url" or not isinstance(url, str):
        raise QlabError(
            f"a part of a content is {printable(str(part.get('type')))!r}; there are text, "
            "image_url with a url, and image with a path"
        )
    return decoded(_bytes_of(url), "the image")


def _bytes_of(url: str) -> bytes:
    head, comma, code = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise QlabError(
            f"the url of an image begins with {printable(url[:24])!r}; images are sent as data "
            "urls, data:image/png;base64,..."
        )
    try:
        return base64.b64decode(code, validate=True)
    except (binascii.Error, ValueError) as error:
        raise QlabError(f"the image is not base64 ({first_line(error)}); encode it so") from error


def _bytes_in(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QlabError(f"the image {path} cannot be read ({error.strerror})") from error


def decoded(content: bytes, name: str) -> Any:
    """An image in RGB. QlabError for what is none, or has too many pixels."""
    library = needed("PIL.Image", "images")
    try:
        picture = library.open(io.BytesIO(content), formats=FORMATS)
        width, height = picture.size
        picture = picture.convert("RGB") if width * height <= PIXELS else None
    except Exception as error:  # whatever the decoder of a format makes of damaged bytes
        raise QlabError(
            f"{name} cannot be read ({first_line(error)}); give one of {', '.join(FORMATS)}"
        ) from error
    if picture is None:
        raise QlabError(f"{name} is {width} x {height}; give one of at most {PIXELS} pixels")
    return picture


def part_of(path: Path) -> dict[str, Any]:
    """The image of a file as a part of a content that holds all of it."""
    content = _bytes_in(path)
    decoded(content, str(path))
    kind = needed("PIL.Image", "images").open(io.BytesIO(content)).format.lower()
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


# ------------------------------------------------------------------ positions
def placed(
    model: PreTrainedModel, ids_1q: Tensor, inputs: Mapping[str, Tensor], prompt: int
) -> Placed:
    """What a model takes beside the token ids [1, q] of a prompt with images, and new tokens.

    Positions of several axes (M-RoPE) are those of the model's own `get_rope_index`.

    Args:
        prompt: how many of the tokens are the prompt's.
    """
    taken = {name: _on(model, value) for name, value in inputs.items()}
    for name, value in taken.items():
        if value.shape == (1, prompt):  # a kind for each token; new ones are text
            taken[name] = torch.nn.functional.pad(value, (0, ids_1q.shape[1] - prompt))
    rule = getattr(model.base_model, "get_rope_index", None)
    if rule is None:
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        if "mrope_section" in rope:
            raise QlabError(
                f"{type(model).__name__} gives tokens of images positions by a rule that it does "
                "not name; send text alone"
            )
        return Placed(inputs=taken, shift=0)
    takes = inspect.signature(rule).parameters
    known = {name: value for name, value in taken.items() if name in takes}
    positions, shift = rule(ids_1q.to(model.device), **known)
    return Placed(inputs={**taken, "position_ids": positions}, shift=int(shift))


def _on(model: PreTrainedModel, value: Tensor) -> Tensor:
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
