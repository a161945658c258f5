"""Directories whose safetensors files, index and links are changed at random."""

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from faults import Trial
from faults.inputs import READ, REFUSED, case, refusal
from faults.mutations import OUTSIDE, any_value, changed_bytes, changed_json, text_of
from qlab.directories.inspect import inspect
from qlab.files.checkpoint import open_checkpoint
from qlab.files.directory import CONFIG, INDEX, SINGLE, WIDTHS
from qlab.files.tensors import DTYPES, bytes_of

PLAIN = {"model_type": "none", "num_hidden_layers": 1}


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor that qlab reads in a directory: its dtype, shape and bytes."""
    model = open_checkpoint(path)
    return {
        name: (stored.dtype, stored.shape, bytes(bytes_of(model.tensor(name))))
        for name, stored in model.stored.items()
        if stored.dtype in DTYPES
    }


def by_reference(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file as the format's own library reads it."""
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in safetensors.deserialize(file.read_bytes())
    }


def file_of(header: Any, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file. header: a value, or its JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else max(length, 0)).to_bytes(8, "little") + text + data


def entries_of(draw: random.Random) -> tuple[dict[str, Any], bytes]:
    """A valid header and its data: a few small tensors of any dtype."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for i in range(draw.randint(0, 4)):
        dtype = draw.choice([dtype for dtype, bits in WIDTHS.items() if bits >= 8])
        shape = [draw.choice([0, 1, 2, 3, 5]) for _ in range(draw.randint(0, 3))]
        size = WIDTHS[dtype] // 8
        for n in shape:
            size *= n
        header[f"layer{i}.weight"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    return header, draw.randbytes(end)


def safetensors_files(shared: Path) -> Trial:
    """Headers, offsets, lengths and bytes of one file."""

    def one(draw: random.Random, folder: Path) -> str:
        (folder / CONFIG).write_text(json.dumps(PLAIN))
        header, data = entries_of(draw)
        kind = draw.randrange(5)
        text = (
            text_of(draw, changed_json(draw, header)) if kind < 3 else json.dumps(header).encode()
        )
        lengths = [None, None, None, 0, 1, len(text) - 1, len(text) + 1, 2**60, 2**63, 2**64 - 1]
        raw = file_of(text, data, draw.choice(lengths))
        raw = changed_bytes(draw, raw) if kind == 4 else raw
        (folder / SINGLE).write_bytes(raw)
        ours, refused = refusal(lambda: contents(folder))
        if refused:
            return REFUSED
        theirs = by_reference(folder / SINGLE)
        known = {name: entry for name, entry in theirs.items() if entry[0] in DTYPES}
        assert ours == known, f"{sorted(ours)} are not {sorted(known)}"
        return READ

    return one


NAMES = [f"model-0000{i}.safetensors" for i in range(1, 4)]


def index_files(shared: Path) -> Trial:
    """Indices that lie, shards that are gone, doubled or links, and files of foreign names."""
    (shared / "outside").mkdir()
    secret = {"secret": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    (shared / "outside" / SINGLE).write_bytes(file_of(secret, b"gold"))

    def one(draw: random.Random, folder: Path) -> str:
        (folder / "model").mkdir()
        (folder / "outside").symlink_to(shared / "outside")
        folder = folder / "model"
        (folder / CONFIG).write_text(json.dumps(PLAIN))
        index: dict[str, Any] = {"metadata": {"total_size": 12}, "weight_map": {}}
        for i, name in enumerate(NAMES):
            entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
            names = [f"layer{i}.weight", f"layer{draw.randrange(4)}.bias"]
            header = {names[0]: entry, names[1]: {**entry, "data_offsets": [2, 4]}}
            (folder / name).write_bytes(file_of(header, draw.randbytes(4)))
            index["weight_map"] |= dict.fromkeys(names, name)
        for _ in range(draw.randint(0, 2)):
            _misplace(draw, folder)
        if draw.random() < 0.8:
            changed = changed_json(draw, index)
            if isinstance(changed.get("weight_map") if isinstance(changed, dict) else None, dict):
                places = [*OUTSIDE, *NAMES, "config.json", any_value(draw)]
                name = draw.choice(["layer0.weight", "layer1.weight", "new"])
                changed["weight_map"][name] = draw.choice(places)
            (folder / INDEX).write_bytes(text_of(draw, changed))
        ours, refused = refusal(lambda: contents(folder))
        refusal(lambda: inspect(folder))
        if refused:
            return REFUSED
        _agree(folder, ours)
        return READ

    return one


def _misplace(draw: random.Random, folder: Path) -> None:
    """One of the shards is gone, another, or a link as a snapshot of a hub has it."""
    name = draw.choice(NAMES)
    file, kind = folder / name, draw.randrange(8)
    if not file.is_file() or file.is_symlink():
        return
    if kind == 0:
        file.unlink()
    elif kind == 1:
        shutil.copyfile(file, folder / SINGLE)
    elif kind == 2:
        blobs = folder.parent / "blobs"
        blobs.mkdir(exist_ok=True)
        file.rename(blobs / f"hash of {name}")
        file.symlink_to(Path("..", "blobs", f"hash of {name}"))
    elif kind == 3:
        file.unlink()
        file.symlink_to(draw.choice([name, "nowhere", ".", "/dev/zero", "/dev/null"]))
    elif kind == 4:
        file.unlink()
        file.mkdir()
    elif kind == 5:
        file.unlink()
        os.mkfifo(file)
    elif kind == 6:
        file.rename(folder / "extra.safetensors")
    else:
        os.truncate(file, draw.choice([0, 8, 50, 100]))


def _agree(folder: Path, ours: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Each tensor is that of a file which lies in the directory, of the one that the index names
    where several have it."""
    single, index = folder / SINGLE, {}
    if not single.exists() and (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_bytes())["weight_map"]
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    listed = [file for file in files if not index or file.name in index.values()]
    held = {file.name: by_reference(file) for file in listed}
    for name, tensor in ours.items():
        holders = [file for file, tensors in held.items() if name in tensors]
        assert tensor in [held[file][name] for file in holders], f"{name} is of no file"
        if len(holders) > 1:
            assert tensor == held[index[name]][name], f"{name} is of another file than listed"
    assert ours.keys() == {name for tensors in held.values() for name in tensors}


CASES = [
    case("safetensors files", safetensors_files, bounded=40),
    case("index files and links", index_files, bounded=20),
]
