"""GGUF files whose bytes, keys and tensors are changed at random."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from bytewise import model_folder
from gguf_files import KINDS as TYPES
from gguf_files import write

from faults import Trial
from faults.inputs import READ, REFUSED, case, refusal
from faults.mutations import any_value, changed_bytes, changed_json, text_of
from qlab.algebra.spec import parse_spec
from qlab.codecs import gguf as file_format
from qlab.directories.convert import convert
from qlab.directories.gguf import RECORDED, from_gguf
from qlab.directories.inspect import inspect
from qlab.directories.model_free import quantize_files
from qlab.methods.rtn import rtn


def gguf_files(shared: Path) -> Trial:
    """Headers, keys, lists of tensors and data."""
    kinds = dict(attn_q=TYPES.Q4_0, ffn_up=TYPES.Q8_0, attn_v=TYPES.F16, token_embd=TYPES.Q8_0)
    files = [write(shared / f"{arch}.gguf", kinds, arch) for arch in ("llama", "qwen3")]
    files.append(_own(shared))
    keys = [key for file in files for key in gguf.GGUFReader(file).fields if "." in key]

    def one(draw: random.Random, folder: Path) -> str:
        raw = draw.choice(files).read_bytes()
        kind = draw.randrange(4)
        if kind == 0:
            raw = changed_bytes(draw, raw)
        elif kind == 1:
            raw = _key_changed(draw, raw, draw.choice(keys))
        elif kind == 2:
            raw = _tensor_changed(draw, raw)
        else:
            raw = _claims(draw, raw)
        file = folder / "model.gguf"
        file.write_bytes(raw)
        said = [refusal(lambda: repr(inspect(file)))[1]]
        ours, refused = refusal(lambda: contents(file))
        said.append(refused)
        if not refused:
            assert ours == by_reference(file)
        if not any(said) and draw.random() < 0.1:
            act = lambda: from_gguf(file, "compressed-tensors", folder / "out", False, False)
            said.append(refusal(act)[1])
        return REFUSED if any(said) else READ

    return one


def _own(shared: Path) -> Path:
    """A file that qlab wrote, which holds its qlab.json and texts of the directory."""
    model = model_folder(shared / "source", dtype=torch.bfloat16)
    made = quantize_files(model, rtn(parse_spec("int4-g32")), shared / "quantized")
    return convert(made.path, "gguf", shared / "own.gguf").path


def contents(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file as qlab opens it: its kind, shape and bytes."""
    reader, _ = file_format.opened(file)
    return {
        t.name: (t.tensor_type.name, tuple(t.shape.tolist()), np.array(t.data).tobytes())
        for t in reader.tensors
    }


def by_reference(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same from the bytes of the file, by the description of the format."""
    raw = file.read_bytes()
    _, tensors, at = parsed(raw)
    found = {}
    for name, kind, shape, offset in tensors:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        count = 1
        for n in shape:
            count *= n
        assert count % block == 0 and at + offset + count // block * size <= len(raw)
        data = raw[at + offset : at + offset + count // block * size]
        found[name] = (gguf.GGMLQuantizationType(kind).name, shape, data)
    assert len(found) == len(tensors)
    return found


SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, LIST = 8, 9


def parsed(raw: bytes) -> tuple[dict[str, tuple[int, int, int]], list, int]:
    """(key -> where its type, its value and the next key begin; tensors; where data begin)."""
    at = 24
    count, keys = struct.unpack_from("<QQ", raw, 8)
    found: dict[str, tuple[int, int, int]] = {}
    alignment = 32
    for _ in range(keys):
        name, at = _text(raw, at)
        (kind,), start = struct.unpack_from("<I", raw, at), at
        end = _after(raw, at + 4, kind)
        if name == "general.alignment":
            (alignment,) = struct.unpack_from("<I", raw, at + 4)
        found[name], at = (start, at + 4, end), end
    tensors = []
    for _ in range(count):
        name, at = _text(raw, at)
        (axes,) = struct.unpack_from("<I", raw, at)
        shape = struct.unpack_from(f"<{axes}Q", raw, at + 4)
        kind, offset = struct.unpack_from("<IQ", raw, at + 4 + 8 * axes)
        tensors.append((name, kind, shape, offset))
        at += 4 + 8 * axes + 12
    return found, tensors, at + -at % alignment


def _text(raw: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", raw, at)
    return raw[at + 8 : at + 8 + length].decode(), at + 8 + length


def _after(raw: bytes, at: int, kind: int) -> int:
    """Where what follows a value begins."""
    if kind == TEXT:
        return int(at + 8 + struct.unpack_from("<Q", raw, at)[0])
    if kind != LIST:
        return at + struct.calcsize(SCALARS[kind])
    inner, count = struct.unpack_from("<IQ", raw, at)
    at += 12
    for _ in range(count):
        at = _after(raw, at, inner)
    return at


def _key_changed(draw: random.Random, raw: bytes, key: str) -> bytes:
    """A key with another value, of any type."""
    keys, _, _ = parsed(raw)
    if key not in keys:
        return raw
    start, begin, end = keys[key]
    value: Any = any_value(draw)
    if key.startswith((RECORDED, "qlab.file.")) and draw.random() < 0.8:
        said = raw[begin + 8 : end]
        is_json = said.startswith(b"{") and not said.startswith((b"{{", b"{%"))  # a chat template
        said = text_of(draw, changed_json(draw, json.loads(said))) if is_json else said[:-1]
        return raw[:begin] + struct.pack("<Q", len(said)) + said + raw[end:]
    kind = draw.choice([*SCALARS, TEXT, LIST, 77])
    if kind in SCALARS:
        size = struct.calcsize(SCALARS[kind])
        number = value if isinstance(value, int) else draw.getrandbits(64)
        packed = (number % 2 ** (8 * size)).to_bytes(size, "little")
    else:
        text = json.dumps(value).encode()[:1000]
        packed = struct.pack("<Q", draw.choice([len(text)] * 4 + [2**60, 2**64 - 1])) + text
        if kind == LIST:
            count = draw.choice([len(text), 2**31, 2**60, 0])
            packed = struct.pack("<IQ", draw.choice([*SCALARS, TEXT, LIST]), count) + text
    return raw[:start] + struct.pack("<I", kind) + packed + raw[end:]


def _tensor_changed(draw: random.Random, raw: bytes) -> bytes:
    """A tensor of another name, shape, kind or offset."""
    _, tensors, _ = parsed(raw)
    name, kind, shape, offset = draw.choice(tensors)
    head = struct.pack("<Q", len(name)) + name.encode()
    old = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    which = draw.randrange(4)
    if which == 0:
        shape = tuple(draw.choice([*shape, 0, 1, 2**31, 2**60, 2**64 - 1, 32]) for _ in shape)
    elif which == 1:
        kind = draw.choice([*map(int, TYPES), 99, 2**31])
    elif which == 2:
        offset = draw.choice([0, 32, offset + 1, offset + 32, 2**40, 2**63, 2**64 - 1])
    else:
        name = draw.choice([draw.choice(tensors)[0], "", "x" * 100, "output.weight"])
    new = struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return raw.replace(head + old, struct.pack("<Q", len(name)) + name.encode() + new, 1)


def _claims(draw: random.Random, raw: bytes) -> bytes:
    """Counts of keys or tensors, a version or an alignment that are not the file's."""
    at, width = draw.choice([(0, 4), (4, 4), (8, 8), (16, 8)])
    number = draw.choice([0, 1, 2, 3, 4, 255, 2**16, 2**31, 2**32 - 1, 2**60, 2**64 - 1])
    return raw[:at] + (number % 2 ** (8 * width)).to_bytes(width, "little") + raw[at + width :]


CASES = [case("GGUF files", gguf_files)]
