"""A quantized directory as one GGUF file, which llama.cpp runs: the inverse of `from_gguf`.

Codes keep their bits. Dense matrices keep their dtype, vectors (norms and biases) become float32,
as engines need them. What a GGUF file has no keys for stands in it too, word for word, so that the
directory comes back: config.json, the tokenizer and qlab.json.

The keys are written first, to a file of their own, and read back: a model of which the keys do not
say everything is refused before any weight is touched. The finished file is read
back before it gets its name.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import torch
from torch import Tensor

from qlab.algebra.spec import Spec
from qlab.codecs import gguf as file_format
from qlab.codecs import gguf_blocks, gguf_keys
from qlab.codecs.gguf import RECORDED
from qlab.codecs.gguf_models import MODELS, Model
from qlab.data.calibration import tokenizer_of
from qlab.directories.gguf import EMBEDDED, WIDENED, is_embedded
from qlab.directories.gguf_config import frequency_factors, unsaid
from qlab.directories.gguf_tokenizer import Vocabulary, vocabulary
from qlab.errors import QlabError
from qlab.files.atomic import atomically, remove_abandoned
from qlab.files.checkpoint import GGUF, Checkpoint
from qlab.files.directory import CONFIG
from qlab.files.explained import KEY
from qlab.files.ownership import RECORD
from qlab.files.readback import MARKS, Mark, mark
from qlab.files.record import recorded
from qlab.files.shardwise import Notes, leaves_by_file
from qlab.files.writer import beside
from qlab.process.progress import progress
from qlab.process.shown import some

ROUTER = ".ffn_gate_inp"  # of a tensor whose products choose experts, kept from being rounded
NAME = f"model{GGUF}"  # of the file in a directory
KINDS = gguf.GGMLQuantizationType
FLOATS = {torch.float32: KINDS.F32, torch.float16: KINDS.F16, torch.bfloat16: KINDS.BF16}
Rewrite = Callable[[str, Notes], Mapping[str, Tensor]]


def gguf_place(out: Path, source: Path, overwrite: bool) -> Path:
    """The file that an output stands for: itself where its name ends in .gguf, else `model.gguf` in
    that folder. Refuses one that is there and may not be replaced."""
    out = out.expanduser()
    file = out if out.suffix == GGUF else out / NAME
    if file.parent.resolve() == source.resolve():
        raise QlabError(f"{file} lies in the model's own directory; choose another place")
    if file.parent.exists() and not file.parent.is_dir():
        raise QlabError(f"{file.parent} is a file; choose another output directory")
    if file.is_dir():
        raise QlabError(f"{file} is a directory; choose another name for the file")
    if file.exists() and not (overwrite and _is_ours(file)):
        raise QlabError(f"{file} exists; choose another name, or --overwrite it if qlab wrote it")
    return file


def _is_ours(file: Path) -> bool:
    try:
        reader, _ = file_format.opened(file)
    except QlabError:
        return False
    return RECORDED in reader.fields


def to_gguf(
    source: Checkpoint,
    targets: Mapping[str, Spec],
    rewritten: Rewrite,
    refuse_lost: Callable[[Notes], None],
    job: Mapping[str, Any],
    file: Path,
) -> Notes:
    """Write a directory's model as `file` (of `gguf_place`), and return its report.

    Args:
        source: The directory.
        targets: Module -> the spec of its weight in the file.
        rewritten: Gives the tensors of a leaf in the codec's form, and notes what it did.
        refuse_lost: Raises what the notes say that is lost.
        job: What identifies the conversion.
        file: Where the file appears, whole, at the end.

    Raises:
        QlabError: An architecture, a setting of the config or a tokenizer that the format does not
            say, or a leaf that it does not hold.
    """
    model, words = _Model.of(source), said_in_keys(source)
    notes: Notes = {}

    def write(temporary: Path) -> None:
        with closing(gguf.GGUFWriter(temporary, model.kind.arch, use_temp_file=True)) as writer:
            rows = _Tensors(writer, model)
            for name in progress(list(model.names), "converting"):
                spec = targets.get(name.rpartition(".")[0])
                for part, tensor in rewritten(name, notes).items():
                    rows.add(part, tensor, spec, notes)
            refuse_lost(notes)
            rows.refuse_incomplete()
            marks = notes.pop(MARKS, {})
            model.write_keys(writer)
            words.write(writer)
            _add_kind(writer, targets)
            for name, text in _files_beside(source).items():
                writer.add_string(f"{EMBEDDED}{name}", text)
            told = {**recorded(source.path), **notes, "job": job}
            writer.add_string(RECORDED, json.dumps(told, sort_keys=True))
            _finish(writer)
        _refuse_misread(temporary, model.names, marks)

    file.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(file)
    atomically(file, write)
    return notes


def said_in_keys(source: Checkpoint) -> Vocabulary:
    """The vocabulary of a model, quantized or not yet, as a file says it; refuses a model whose
    architecture, config or tokenizer the keys of a file do not say, before a weight is read."""
    model = _Model.without_tensors(source)
    words = vocabulary(str(source.path), tokenizer_of(source), model.settings["vocab_size"])
    _refuse_unsaid(source, model)
    return words


@dataclass(frozen=True)
class _Model:
    """What a directory is in the terms of the format.

    settings: of its config and of its rotary positions. names: leaf -> its tensor in the file.
    """

    title: str
    kind: Model
    config: Any
    settings: Mapping[str, Any]
    names: Mapping[str, str]

    @classmethod
    def without_tensors(cls, source: Checkpoint) -> "_Model":
        """The same before the leaves have names."""
        kind = MODELS.get(str(source.raw.get("model_type")))
        if kind is None:
            raise QlabError(
                f"{source.path} is a model of architecture {source.raw.get('model_type')!r}; qlab "
                f"writes GGUF files of {', '.join(MODELS)}: run the directory as it is"
            )
        settings = gguf_keys.flat(source.config.to_dict())
        return cls(source.path.name, kind, source.config, settings, {})

    @classmethod
    def of(cls, source: Checkpoint) -> "_Model":
        """That of a directory as it is written."""
        model = cls.without_tensors(source)
        leaves = [name for file in leaves_by_file(source) for name in file]
        blocks = model.settings["num_hidden_layers"]
        called = file_format.file_names(model.kind.arch, blocks, leaves)
        nameless = [name for name, file_name in called.items() if file_name is None]
        if nameless:
            raise QlabError(
                f"GGUF has no name for {some(nameless)} of {source.path}; run the directory as it "
                "is"
            )
        names = {name: file_name for name, file_name in called.items() if file_name}
        return replace(model, names=names)

    def write_keys(self, writer: "gguf.GGUFWriter") -> None:
        """Add what the format's keys say of the model, and the factors of its frequencies."""
        writer.add_name(self.title)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in gguf_keys.told(self.kind, self.settings).items():
            name = f"{self.kind.arch}.{key}"
            if isinstance(value, str):
                writer.add_string(name, value)
            elif isinstance(value, int):
                writer.add_uint32(name, value)
            else:
                writer.add_float32(name, value)
        factors = frequency_factors(self.config)
        if factors is not None:
            writer.add_tensor(file_format.SCALED_ROTARY, factors.numpy())

    def heads(self, file_name: str) -> int | None:
        """Heads of a tensor whose rows the file interleaves."""
        key = file_format.heads_key(self.kind.arch, file_name)
        return None if key is None else self.settings[gguf_keys.READ[key]]


def _refuse_unsaid(source: Checkpoint, model: _Model) -> None:
    """Refuse a model whose config the format's keys do not say, before any weight is read."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / NAME
        with closing(gguf.GGUFWriter(file, model.kind.arch)) as writer:
            model.write_keys(writer)
            writer.add_string(RECORDED, "{}")  # whose file it is
            _finish(writer)
        lost = unsaid(source.config, file)
    if lost:
        key, (ours, theirs) = next(iter(lost.items()))
        raise QlabError(
            f"{source.path} has {key} {ours!r:.60}, and engines read {theirs!r:.60} of a GGUF file "
            f"of architecture {model.kind.arch!r}, whose keys do not say it; run the directory as "
            "it is"
        )


# ------------------------------------------------------------------ parts of the file
class _Tensors:
    """The tensors of a file, of which those of experts are gathered until all are there."""

    def __init__(self, writer: "gguf.GGUFWriter", model: _Model):
        self.writer, self.model = writer, model
        named = [
            file for name, file in model.names.items() if file_format.expert_of(name) is not None
        ]
        self.experts: dict[str, dict[int, Tensor]] = {file: {} for file in named}
        self.kinds: dict[str, KINDS] = {}

    def add(self, name: str, tensor: Tensor, spec: Spec | None, notes: Notes) -> None:
        """Add a tensor of a leaf; notes the mark of a dense one."""
        file_name = self.model.names[name]
        kind, rows = self._rows(name, file_name, tensor, spec, notes)
        expert = file_format.expert_of(name)
        if expert is None:
            self.writer.add_tensor(file_name, rows.contiguous().numpy(), raw_dtype=kind)
            return
        if self.kinds.setdefault(file_name, kind) != kind:
            raise QlabError(
                f"{name} is {kind.name} and other experts of its projection are "
                f"{self.kinds[file_name].name}, and GGUF has one tensor for all; quantize all "
                "experts to one spec"
            )
        gathered = self.experts[file_name]
        gathered[expert] = rows
        count = gguf_keys.told(self.model.kind, self.model.settings)["expert_count"]
        if len(gathered) == count:
            del self.experts[file_name]
            stacked = torch.stack([rows for _, rows in sorted(gathered.items())])
            self.writer.add_tensor(file_name, stacked.numpy(), raw_dtype=kind)

    def _rows(
        self, name: str, file_name: str, tensor: Tensor, spec: Spec | None, notes: Notes
    ) -> tuple[KINDS, Tensor]:
        """How the file stores a tensor, and its bytes or numbers."""
        if spec is not None and tensor.dtype == torch.uint8:
            kind = KINDS.__members__[gguf_blocks.KINDS[spec.bits]]
        else:
            if tensor.dtype not in FLOATS:
                raise QlabError(f"{name} is {tensor.dtype}, of which GGUF holds no weights")
            is_narrow = tensor.dtype in (torch.float16, torch.bfloat16)
            if is_narrow and (tensor.ndim == 1 or ROUTER in file_name):
                notes.setdefault(WIDENED, {})[name] = {"dtype": str(tensor.dtype)}
                tensor = tensor.float()
            tensor = self.model.kind.stored(name, tensor)
            kind = FLOATS[tensor.dtype]
            notes.setdefault(MARKS, {})[name] = mark(self.model.kind.restored(name, tensor))
        heads = self.model.heads(file_name)
        rows = tensor if heads is None else file_format.interleaved(tensor, heads)
        # numpy has no bfloat16
        return kind, rows.contiguous().view(torch.uint8) if rows.dtype == torch.bfloat16 else rows

    def refuse_incomplete(self) -> None:
        """Refuse projections of which not every expert has a weight."""
        if self.experts:
            raise QlabError(
                f"the files do not have a weight of every expert for {some(list(self.experts))}; "
                "download the model again"
            )


def _add_kind(writer: "gguf.GGUFWriter", targets: Mapping[str, Spec]) -> None:
    """The kind of most weights, for those who list files."""
    [(bits, _)] = Counter(spec.bits for spec in targets.values()).most_common(1)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{gguf_blocks.KINDS[bits]}"])


def _files_beside(source: Checkpoint) -> dict[str, str]:
    """The texts of a directory that are no weights: name -> text. Its config without what it says
    of codes, which are others in the file."""
    config = {key: value for key, value in source.raw.items() if key != KEY}
    texts = {CONFIG: json.dumps(config, sort_keys=True)}
    for name, path in beside(source.path).items():
        if is_embedded(name) and name not in (CONFIG, RECORD):
            texts[name] = path.read_text(encoding="utf-8")
    return texts


def _finish(writer: "gguf.GGUFWriter") -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()


def _refuse_misread(file: Path, names: Mapping[str, str], marks: Mapping[str, Mark]) -> None:
    """Refuse a file that does not give back the leaves that it was written from."""
    for name, kind, leaf in file_format.tensors(file, names):
        there = leaf.to(torch.bfloat16) if isinstance(leaf, Tensor) and kind == "BF16" else leaf
        if mark(there) != marks[name]:
            raise QlabError(
                f"{name} does not read back from the GGUF file as it was written, which is "
                "therefore not put in place; report this, and run the directory as it is"
            )
