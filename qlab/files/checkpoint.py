"""A model directory as lazily loaded tensors: the one door to a model's files and to its
configuration."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import Leaf
from qlab.algebra.spec import InputSpec, Spec
from qlab.codecs import Codec, reader
from qlab.codecs.extra import Extra
from qlab.errors import QlabError, first_line, warn
from qlab.files.directory import CONFIG, INDEX, Stored, locate, read_json, reading
from qlab.files.explained import KEY, explained, refuse_unexplained
from qlab.files.hashed import fingerprint
from qlab.files.tensors import dtype_of, read, refuse_overflow, same_bytes
from qlab.process.shown import Shown, size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["GGUF", "INDEX", "Checkpoint", "open_checkpoint"]

GGUF = ".gguf"
OTHERS = "configuration_files"  # a key of config.json
# key of config.json -> the least that it may be
SIZES = {
    "vocab_size": 1,
    "hidden_size": 1,
    "num_hidden_layers": 1,
    "intermediate_size": 0,
    "head_dim": 0,
    "num_attention_heads": 0,
    "num_key_value_heads": 0,
}
LARGEST_SIZE = 2**31


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """raw: config.json, with what it says of codes at its top. stored: tensor name -> where it
    lies. quantized: module path -> its spec on disk (None: a dense weight in a layout of the
    codec's). inputs: module path -> how its input is rounded at run time. extras: what else its
    readers do. reader: reads a tensor from its place.

    Only `config` asks transformers, so that everything else also works for models it does not know.
    """

    path: Path
    raw: Mapping[str, Any]
    stored: Mapping[str, Stored]
    codec: Codec | None
    quantized: Mapping[str, Spec | None]
    inputs: Mapping[str, InputSpec] = field(default_factory=dict)
    extras: tuple[Extra, ...] = ()
    reader: Callable[[str, Stored], Tensor] = read

    def summary(self) -> dict[str, str]:
        """In a few words; `qlab.inspect` says more."""
        stored = sum(tensor.nbytes for tensor in self.stored.values())
        specs = sorted({str(spec or "dense") for spec in self.quantized.values()})
        return {
            "directory": str(self.path),
            "model": str(self.raw.get("model_type")),
            "tensors": f"{len(self.stored)}, {size(stored)}",
            "quantized": f"{len(self.quantized)} weights ({', '.join(specs)})"
            if specs
            else "no weight",
        }

    @cached_property
    def config(self) -> "PretrainedConfig":
        """The configuration as transformers reads it, without its quantization: the skeleton is
        built unquantized and leaves carry the codes."""
        from transformers import AutoConfig

        text = self.raw.get("text_config")
        said = {**self.raw, **(text if isinstance(text, dict) else {})}
        for name, least in SIZES.items():
            size_said = said.get(name)
            if type(size_said) is int and not least <= size_said <= LARGEST_SIZE:
                raise QlabError(
                    f"{self.path / CONFIG} has {name} {size_said}, and it goes from {least} to "
                    f"{LARGEST_SIZE:,}; correct it, or download the file again"
                )
        layers = said.get("num_hidden_layers")
        # The module would be built with all these layers, whatever that takes.
        if isinstance(layers, int) and self.stored and layers > len(self.stored):
            raise QlabError(
                f"{self.path / CONFIG} has num_hidden_layers {layers}, and the files hold "
                f"{len(self.stored)} tensors; the one or the other is of another model"
            )
        try:
            config = AutoConfig.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a config's own checks raise
            raise QlabError(
                f"{self.path / CONFIG}: transformers cannot read model_type "
                f"{self.raw.get('model_type')!r:.100} ({first_line(error)}); check the file, or "
                "whether this version of transformers knows the model"
            ) from error
        _refuse_foreign_part(config, self.path / CONFIG)
        _forget_codes(config)
        return config

    @property
    def has_weights(self) -> bool:
        """Whether there are files behind the tensors; a plan can do without."""
        return all(file.exists() for file in {tensor.file for tensor in self.stored.values()})

    @property
    def known(self) -> bool:
        """Whether transformers has the architecture."""
        from transformers import CONFIG_MAPPING

        kind = self.raw.get("model_type")
        return isinstance(kind, str) and kind in CONFIG_MAPPING

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        return {name: stored.file for name, stored in self.stored.items()}

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype most of its floating-point numbers are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.stored:
            if name in self.beside:
                continue
            shape, dtype = self.shape_and_dtype(name)
            if dtype.is_floating_point and dtype.itemsize > 1:  # 8 bits are codes
                sizes[dtype] = sizes.get(dtype, 0) + shape.numel()
        return max(sizes, key=lambda d: sizes[d]) if sizes else torch.float32

    @cached_property
    def running_dtype(self) -> torch.dtype:
        """The dtype in which the model is run where nobody asks for another: its own, or float32
        where that does not hold a number of its files, as float16 does not hold all of
        bfloat16's."""
        most = torch.finfo(self.dtype).max
        plain = [name for name in self.stored if name.rpartition(".")[0] not in self.quantized]
        dtypes = {name: self.shape_and_dtype(name)[1] for name in plain}
        wider = [
            name
            for name, dtype in dtypes.items()
            if dtype.is_floating_point and torch.finfo(dtype).max > 2 * most
        ]
        return (
            torch.float32
            if any((self.tensor(name).abs() > most).any() for name in wider)
            else self.dtype
        )

    def shape_and_dtype(self, name: str) -> tuple[torch.Size, torch.dtype]:
        """As the file's header says; no tensor is loaded."""
        self._refuse_missing(name)
        return torch.Size(self.stored[name].shape), dtype_of(name, self.stored[name])

    def tensor(self, name: str) -> Tensor:
        """One tensor, by its name in the files."""
        return self.reader(name, self.stored[name])

    def place(self, name: str) -> tuple[Path, int]:
        """Where a leaf begins: its file, and the byte there. Leaves that are read in this order are
        hashed as they are read."""
        module = name.rpartition(".")[0]
        coded = self.parts(module) if module in self.quantized else ()
        places = [self.stored[part] for part in (name, *coded) if part in self.stored]
        return min((tensor.file, tensor.start) for tensor in places)

    def nbytes(self, name: str) -> int:
        """Bytes of the files that hold a leaf."""
        parts = self.parts(name.rpartition(".")[0]) if self.is_coded(name) else (name,)
        return sum(self.stored[part].nbytes for part in parts)

    def equal(self, a: str, b: str) -> bool:
        """Whether two leaves of the files are one, bit for bit: tensors, or the weights of two
        quantized modules, whose tensors are all alike."""
        modules = [name.removesuffix(".weight") for name in (a, b)]
        if all(module in self.quantized for module in modules):
            return self._equal_codes(*modules)
        stored = [self.stored.get(name) for name in (a, b)]
        return stored[0] is not None and stored[1] is not None and same_bytes(stored[0], stored[1])

    def _equal_codes(self, a: str, b: str) -> bool:
        ours, theirs = (
            {name.removeprefix(module): self.stored[name] for name in self.parts(module)}
            for module in (a, b)
        )
        return ours.keys() == theirs.keys() and all(
            same_bytes(ours[part], theirs[part]) for part in ours
        )

    def parts(self, module: str) -> Sequence[str]:
        """Names of the tensors directly under a module, but for those of `extras`."""
        return self._modules.get(module, ())

    @cached_property
    def beside(self) -> frozenset[str]:
        """Names of the tensors that are of `extras`, wherever they lie."""
        return frozenset(name for extra in self.extras for name in extra.tensors)

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        modules: dict[str, list[str]] = defaultdict(list)
        for name in self.stored:
            if name not in self.beside:
                modules[name.rpartition(".")[0]].append(name)
        return dict(modules)

    def leaf(self, name: str, dtype: torch.dtype | None = None) -> Leaf:
        """The leaf called `name` in the model: decoded where its module is quantized, else in
        `dtype`."""
        module = name.rpartition(".")[0]
        if self.is_coded(name) and self.codec:
            return self.codec.decode(
                module,
                {key: self.tensor(key) for key in self.parts(module)},
                self.quantized[module],
            )
        self._refuse_missing(name)
        tensor = self.tensor(name)
        if dtype is None or not tensor.is_floating_point():
            return tensor
        refuse_overflow(f"{self.path}: {name}", tensor, dtype)
        return tensor.to(dtype)

    def is_coded(self, name: str) -> bool:
        """Whether the files hold codes of the leaf called `name` in the model."""
        module, _, kind = name.rpartition(".")
        return kind == "weight" and module in self.quantized

    def _refuse_missing(self, name: str) -> None:
        if name not in self.stored:
            raise QlabError(
                f"{self.path} has no tensor {name}, which the architecture "
                f"{self.raw.get('model_type')} needs; the download may be incomplete"
            )

    def rounding(self, module: str) -> tuple[Op, ...]:
        """How the module's input is rounded at run time, if it is."""
        if module not in self.inputs or self.codec is None or self.codec.decode_input is None:
            return ()
        parts = {key: self.tensor(key) for key in self.parts(module)}
        return (self.codec.decode_input(module, parts, self.inputs[module]),)

    def rotations(self, module: str, location: str, n: int) -> tuple[Op, ...]:
        """What the "input" [..., n] of a linear module is multiplied with before it is rounded, or
        its "output"."""
        return self.around(module, location, n)

    def attended(self, module: str, channels: Mapping[str, int]) -> dict[str, tuple[Op, ...]]:
        """What happens to the "query", "key" and "value" of an attention module, of which each has
        so many channels per head. Empty where none is rounded, since queries and keys that turn
        together change nothing else."""
        found = {place: self.around(module, place, n) for place, n in channels.items()}
        rounds = any(isinstance(op, QuantizeInput) for ops in found.values() for op in ops)
        return {place: ops for place, ops in found.items() if ops} if rounds else {}

    def around(self, module: str, location: str, n: int) -> tuple[Op, ...]:
        """What happens at a location of a module as `extras` say it (`Extra.ops`): it is turned
        before it is rounded."""
        ops = [op for extra in self.extras for op in extra.ops(module, location, n, self._needed)]
        return tuple(sorted(ops, key=lambda op: isinstance(op, QuantizeInput)))

    def _needed(self, name: str) -> Tensor:
        if name not in self.stored:
            raise QlabError(
                f"{self.path} has no tensor {name}, which its quantization_config needs; the "
                "download may be incomplete"
            )
        return self.tensor(name)

    def warn_unapplied(self) -> None:
        """Warn of what the directory's readers do at run time and qlab does not."""
        for extra in self.extras:
            if not extra.applied:
                warn(
                    f"{self.path}: {extra.says}, which qlab does not do: it computes with keys "
                    "and values as they are"
                )

    def fingerprint(self) -> str:
        """What tells this model from another one, wherever it lies, before it is read: the hash of
        config.json, where each tensor lies, and some bytes of each."""
        return fingerprint(self.path, self.stored)

    def sha256(self) -> str:
        """sha256 over config.json and the sha256 of every file, by which kept statistics are found;
        all are read for it."""
        digest = hashlib.sha256((self.path / CONFIG).read_bytes())
        for file in sorted(set(self.files.values())):
            with reading(file), file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())  # type: ignore[arg-type]
        return digest.hexdigest()


def _refuse_foreign_part(config: "PretrainedConfig", where: Path) -> None:
    """Refuse a part of a configuration that the architecture has not: transformers would take it
    for the model's own."""
    for name in ("text_config", "decoder"):
        if isinstance(vars(config).get(name), dict):
            raise QlabError(
                f"{where} has {name}, which the architecture {config.model_type} has not; move "
                "what it says to the top, or remove it"
            )


def _forget_codes(config: "PretrainedConfig") -> None:
    """Take its quantization out of a configuration and out of those inside it."""
    vars(config).pop(KEY, None)
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            _forget_codes(part)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A Hugging Face model directory, quantized by a format that qlab reads or not. Nothing is
    loaded but headers.

    Errors: a missing or empty directory, no safetensors in it, a truncated or foreign shard, an
    unknown quantization.
    """
    folder = Path(path).expanduser()
    if folder.suffix == GGUF and folder.is_file():
        raise QlabError(
            f"{folder} is a GGUF file, which is converted first: "
            f"`qlab convert {quote(str(folder))} --codec compressed-tensors --out DIR`"
        )
    if not folder.is_dir():
        raise QlabError(f"{folder} is not a model directory; give the path of one, or 'demo'")
    if not (folder / CONFIG).is_file():
        raise QlabError(
            f"{folder} has no config.json; a model directory holds one beside its safetensors files"
        )
    raw, stored = explained(read_json(folder / CONFIG), folder), locate(folder)
    if OTHERS in raw:
        raise QlabError(
            f"{folder / CONFIG} has {OTHERS}, by which transformers reads another file in its "
            "place; remove that key, or rename the file to config.json"
        )
    model = with_codes(Checkpoint(path=folder, raw=raw, stored=stored, codec=None, quantized={}))
    refuse_unexplained(folder, stored, model.quantized, model.beside)
    return model


def with_codes(model: Checkpoint) -> Checkpoint:
    """The directory with what its configuration says of codes."""
    quantization = model.raw.get(KEY)
    if not quantization:
        return model
    if not isinstance(quantization, dict):
        raise QlabError(
            f"{model.path / CONFIG} has a quantization_config that is no object but "
            f"{quantization!r:.40}; download it again"
        )
    try:
        codec = reader(quantization)
        specs = codec.specs(quantization, model.stored)
        inputs = codec.inputs(quantization, model.stored)
        extras = codec.extras(quantization, model.stored)
    except QlabError as error:
        raise QlabError(f"{model.path}: {error}") from error
    return replace(model, codec=codec, quantized=specs, inputs=inputs, extras=extras)
