"""A model directory as lazily loaded tensors: the one door to safetensors files and to configurations."""

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from qlab.codecs import Codec, reader
from qlab.errors import QlabError
from qlab.graph import Op
from qlab.qtensor import Leaf
from qlab.spec import InputSpec, Spec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """files: tensor name -> the safetensors file that holds it. quantized: module path -> its spec on disk (None: a dense
    weight in a layout of the codec's). inputs: module path -> how its input is rounded at run time."""

    path: Path
    config: PretrainedConfig
    files: Mapping[str, Path]
    codec: Codec | None
    quantized: Mapping[str, Spec | None]
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype most of its floating-point numbers are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.files:
            shape, dtype = self.shape_and_dtype(name)
            if dtype.is_floating_point and dtype.itemsize > 1:  # 8 bits are codes
                sizes[dtype] = sizes.get(dtype, 0) + shape.numel()
        return max(sizes, key=lambda d: sizes[d]) if sizes else torch.float32

    def shape_and_dtype(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """Read from the file's header; no tensor is loaded."""
        with safe_open(self.files[name], "pt") as file:
            part = file.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise QlabError(f"{self.files[name]}: {name} is stored as {part.get_dtype()}, which qlab does not read")
            return torch.Size(part.get_shape()), _DTYPES[part.get_dtype()]

    def tensor(self, name: str) -> Tensor:
        """One tensor, by its name in the files."""
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def leaf(self, name: str, dtype: torch.dtype | None = None) -> Leaf:
        """The leaf called `name` in the model: decoded where its module is quantized, else in `dtype`."""
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in self.quantized and self.codec:
            parts = {key: self.tensor(key) for key in self.files if key.rpartition(".")[0] == module}
            return self.codec.decode(module, parts, self.quantized[module])
        if name not in self.files:
            raise QlabError(f"{self.path} has no tensor {name}, which the architecture {self.config.model_type} needs; "
                            "the download may be incomplete")
        tensor = self.tensor(name)
        return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

    def online(self, module: str) -> tuple[Op, ...]:
        """What happens to the module's input at run time."""
        if module not in self.inputs or self.codec is None or self.codec.decode_input is None:
            return ()
        parts = {key: self.tensor(key) for key in self.files if key.rpartition(".")[0] == module}
        return (self.codec.decode_input(module, parts, self.inputs[module]),)

    def fingerprint(self) -> str:
        """sha256 over the config and every file's header and size: names the model without reading all of it."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted(set(self.files.values())):
            with file.open("rb") as f:
                (size,) = struct.unpack("<Q", f.read(8))
                digest.update(f.read(min(size, 1 << 24)))
                f.seek(-min(file.stat().st_size, 1 << 16), 2)
                digest.update(f.read())
            digest.update(str(file.stat().st_size).encode())
        return digest.hexdigest()


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A Hugging Face model directory, quantized by qlab's formats or not. Nothing is loaded but headers.

    Errors: a missing or empty directory, no safetensors in it, a truncated or foreign shard, an unknown config.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise QlabError(f"{folder} is not a model directory; give the path of one, or 'demo'")
    if not (folder / "config.json").is_file():
        raise QlabError(f"{folder} has no config.json; a model directory holds one beside its safetensors files")
    raw = _json(folder / "config.json")
    quantization = raw.get("quantization_config")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a config's own checks raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise QlabError(f"{folder}/config.json: transformers cannot read model_type {raw.get('model_type')!r} ({reason}); "
                        "check the file, or whether this version of transformers knows the model") from error
    files = _files(folder)
    if not quantization:
        return Checkpoint(folder, config, files, None, {})
    try:
        codec = reader(quantization)
        specs, inputs = codec.specs(quantization, files), codec.inputs(quantization, files)
    except QlabError as error:
        raise QlabError(f"{folder}: {error}") from error
    del config.quantization_config  # the skeleton is built unquantized; leaves carry the codes
    return Checkpoint(folder, config, files, codec, specs, inputs)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise QlabError(f"{path} is not valid JSON ({error}); repair or download it again") from error
    if not isinstance(value, dict):
        raise QlabError(f"{path} holds no JSON object but {type(value).__name__}; repair or download it again")
    return value


def _files(folder: Path) -> dict[str, Path]:
    files = {}
    for shard in _shards(folder):
        try:
            with safe_open(shard, "pt") as file:
                files.update(dict.fromkeys(file.keys(), shard))
        except (SafetensorError, OSError, ValueError) as error:
            raise QlabError(f"{shard} is truncated or not a safetensors file ({error}); download it again") from error
    return files


def _shards(folder: Path) -> list[Path]:
    """What transformers would load: the single file, else those of the index; without either, all there are."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise QlabError(f"{folder} holds no safetensors files; convert the model to safetensors first")
        return found
    listed = _json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise QlabError(f"{folder / INDEX} has no weight_map; download it again")
    shards = sorted({folder / str(name) for name in listed.values()})
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise QlabError(f"{folder / INDEX} lists {', '.join(missing)}, which is missing; download the model again")
    return shards
