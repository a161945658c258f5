"""A GGUF file as a Hugging Face directory: blocks that are exact codes stay codes, in the format of
a codec.

Only linears of the model are read as codes. Tensors that the file stores as floats keep their
dtype, so that nothing is lost; what is dequantized (other kinds of blocks, embeddings) is written
as bfloat16, which has the range of the float32 products. Config and tokenizer are those that
transformers reads from the file; a file that qlab wrote (to_gguf.py) holds them word for word, and
the config has to say what transformers reads.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.algebra.spec import Spec
from qlab.codecs import CODECS, Codec, gguf, gguf_keys
from qlab.codecs.gguf import RECORDED
from qlab.codecs.gguf_keys import Said
from qlab.directories.gguf_config import refuse_contradiction
from qlab.driver.report import stored_bits
from qlab.errors import QlabError, first_line
from qlab.files.certificate import certify
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import CONFIG, read_header, read_json
from qlab.files.readback import MARKS, mark, refuse_misread
from qlab.files.record import refuse_foreign_record, versions, written
from qlab.files.writer import Writer
from qlab.model.linears import linears_of
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import foreign, undisturbed

GENERATION = "generation_config.json"
ROUNDED = 1e-6  # relative: the file has floats of 32 bits
EMBEDDED = "qlab.file."  # begins the keys of texts of the directory that such a file was made of
KEPT = ("changed",)  # sections of that which stay true of the directory
WIDENED = "widened"  # the section of vectors that the file holds as float32: name -> their dtype
NARROW = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16)}
TEXTS = (".json", ".jinja", ".txt")
FLOATS = ("F64", "F32", "F16", "BF16")
Notes = dict[str, dict[str, Any]]


@undisturbed
@torch.no_grad()
def from_gguf(path: Path, codec: str, out: Path, overwrite: bool, resume: bool) -> Path:
    """Write the file's model as a directory `out` (of `files.place`), which has no
    quantization_config where no tensor stays codes.

    `dequantized` in its qlab.json says which kind of blocks every dequantized tensor had. Refuses
    what is no GGUF file, an architecture that qlab or transformers does not know, and codes that
    the format cannot hold.
    """
    # refused before any work, in fewer words than transformers has
    reader, arch = gguf.opened(path)
    gguf.blocks_of(path, reader, arch)  # before that many are built
    fields = gguf.fields(reader)
    embedded = _embedded(fields)
    said = None if embedded else gguf_keys.said(path, arch, fields)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    job = {"source": digest, "codec": codec, "versions": versions()}
    with Writer(out, overwrite, resume) as writer:
        writer.begin(job)
        if not writer.finished:
            with writer.refusing(), TemporaryDirectory() as scratch:
                _save_config_and_tokenizer(path, said, embedded, Path(scratch))
                _fill(path, CODECS[codec], writer, job, record_of(path, fields), Path(scratch))
    return writer.out


def _fill(
    path: Path,
    codec: Codec,
    writer: Writer,
    job: dict[str, Any],
    record: Mapping[str, Any],
    scratch: Path,
) -> None:
    """Write the tensors of the file, and config.json with what became of them.

    record: what qlab says of a file that it wrote. scratch: a directory with the config and the
    tokenizer, which become the written one's.
    """
    raw = read_json(scratch / CONFIG)
    empty = Checkpoint(path=scratch, raw=raw, stored={}, codec=None, quantized={})
    skeleton = Skeleton(empty, torch.bfloat16)
    generation = skeleton.model.generation_config
    if generation is not None and not (scratch / GENERATION).exists():
        generation.save_pretrained(scratch)
    specs: dict[str, Spec] = {}
    notes: Notes = {"sites": {}, "certificates": {}, "dequantized": {}}
    writer.write_shard(0, _tensors(path, codec, skeleton, specs, record, notes))
    refuse_misread(writer.shard(0), notes.pop(MARKS, {}), codec)
    writer.write_notes(0, notes)
    raw |= {"architectures": [type(skeleton.model).__name__], "dtype": "bfloat16"}
    if specs:
        raw["dtype"] = "float16"  # that of the blocks' scales, which bfloat16 would round
        coded = replace(empty, stored=read_header(writer.shard(0)), codec=codec, quantized=specs)
        linears = linears_of(Skeleton(coded, torch.bfloat16, model=skeleton.model))
        raw["quantization_config"] = codec.config(
            {name: specs.get(module) for name, module in linears.items()}
        )
    kept = {key: rows for key, rows in record.items() if key in KEPT}
    writer.finish(written(raw, job, kept | notes), scratch)


def _tensors(
    path: Path,
    codec: Codec,
    skeleton: Skeleton,
    specs: dict[str, Spec],
    record: Mapping[str, Any],
    notes: Notes,
) -> Iterator[tuple[str, Tensor]]:
    """What the directory holds, one tensor at a time; fills in the specs of linears and experts
    that stay codes, and their rows and certificates, which are those that a file of qlab's has."""
    rows, certificates = record.get("sites", {}), record.get("certificates", {})
    widened = record.get(WIDENED, {})
    saved, linears = skeleton.names.saved(), {f"{n}.weight" for n in skeleton.names.linears()}
    for name, kind, leaf in gguf.tensors(path, saved):
        module, (parameter, shape) = name.rpartition(".")[0], saved[name]
        if leaf.shape != shape:
            raise QlabError(
                f"{path}: {name} is {tuple(leaf.shape)} and {tuple(shape)} by the config "
                "that transformers reads from the file, which is damaged or of a variant that "
                "transformers does not know; convert another"
            )
        may_stay = parameter in linears or gguf.expert_of(name) is not None
        if isinstance(leaf, QTensor) and may_stay:
            specs[module] = leaf.spec
            notes["sites"][module] = {
                **rows.get(module, {}),
                "spec": str(leaf.spec),
                "shape": list(leaf.shape),
                "bits_per_weight": stored_bits(leaf, leaf.scales.dtype),
            }
            notes["certificates"][module] = certificates.get(module) or certify(leaf, None)
            notes.setdefault(MARKS, {})[f"{module}.weight"] = mark(leaf)
            yield from codec.encode(module, leaf).items()
            continue
        if kind not in FLOATS:
            notes["dequantized"][name] = {"kind": kind}
        tensor = _dense(leaf, kind)
        yield name, tensor.to(NARROW[widened[name]["dtype"]]) if name in widened else tensor


def _dense(leaf: Leaf, kind: str) -> Tensor:
    """A dense leaf in the dtype of the file's floats, or in bfloat16 where the file holds blocks.

    The gguf package widens BF16 to float32, which is narrowed again.
    """
    wide = dense(leaf, torch.float32) if isinstance(leaf, QTensor) else leaf
    keeps_dtype = kind in FLOATS and kind != "BF16"
    return wide if keeps_dtype else wide.to(torch.bfloat16)


def _save_config_and_tokenizer(
    path: Path, said: Said | None, embedded: Mapping[str, str], folder: Path
) -> None:
    """Save the config and the tokenizer of a GGUF file as files of a model directory: those that it
    holds word for word, or those that transformers reads of it, where it says what the keys do."""
    for name, text in embedded.items():
        (folder / name).write_text(text, encoding="utf-8")
    if said is None:
        refuse_contradiction(path, folder)
        return
    config = config_of(path, said)
    config.save_pretrained(folder)
    with _reading(path):
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def config_of(path: Path, said: Said) -> Any:
    """The config that transformers reads of a file, and what it does not read: the size of heads
    and the scaling of rotary positions. Refuses one that says other than the file does."""
    with _reading(path):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    if hasattr(config, "head_dim"):
        config.head_dim = said.head_size
    _refuse_another(path, said, config)
    config.rope_parameters = {**config.rope_parameters, **said.rotary}
    return config


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What transformers reads of a file, without its warnings; refused where it cannot."""
    with quiet_transformers():
        try:
            yield
        except Exception as error:  # whatever its readers run into
            raise QlabError(
                f"transformers cannot read the config and the tokenizer of {path} "
                f"({first_line(error)}); convert a file that holds both"
            ) from error


def record_of(path: Path, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What qlab says of a file that it wrote; {} for files of others. Refuses what qlab did not
    write there."""
    said = fields.get(RECORDED, "{}")
    try:
        record = json.loads(said)
    except (TypeError, ValueError, RecursionError) as error:
        raise QlabError(
            f"{path} has a key {RECORDED} that is no JSON ({first_line(error)}); convert the "
            "directory again"
        ) from error
    where = f"{path}, {RECORDED}"
    refuse_foreign_record(record, where)
    widened = record.get(WIDENED, {})
    for name, row in widened.items() if isinstance(widened, dict) else [("", None)]:
        if not isinstance(row, dict) or row.get("dtype") not in NARROW:
            raise QlabError(
                f"{where}, {WIDENED}, {name!r:.100} is not what qlab writes there; convert the "
                "directory again"
            )
    return record


def _embedded(fields: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the directory that qlab made a file of: name -> text. Empty for other files."""
    names = {
        key.removeprefix(EMBEDDED): text for key, text in fields.items() if key.startswith(EMBEDDED)
    }
    texts = {name: text for name, text in names.items() if is_embedded(name)}
    is_ours = (
        RECORDED in fields and CONFIG in texts and all(isinstance(t, str) for t in texts.values())
    )
    return texts if is_ours else {}


def is_embedded(name: str) -> bool:
    """Whether a file of this name goes along with a model: a text beside its weights."""
    return Path(name).name == name and name.endswith(TEXTS)


def _refuse_another(path: Path, said: Said, config: Any) -> None:
    """Refuse a config that says other than the file does."""
    settings = {**config.to_dict(), **config.rope_parameters}
    settings["sliding_window"] = settings.get("sliding_window") or 0
    if not settings.get("head_dim"):
        settings["head_dim"] = config.hidden_size // config.num_attention_heads
    for key, name, value in said.values:
        setting = settings[name]
        is_number = isinstance(setting, int | float)
        if not is_number or not math.isclose(setting, value, rel_tol=ROUNDED):
            raise QlabError(
                f"{key} of {path} is {value:g}, stated or understood, and the config that "
                f"transformers makes of it has {name} {setting!r}; quantize the model from its "
                "safetensors files"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep back the warnings of transformers, which speak of a quantized model, and its progress
    bars, which would cut through qlab's."""
    from transformers.utils import logging

    with foreign:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            # The GGUF reader of transformers ignores the switch for progress bars.
            with redirect_stderr(StringIO()):
                yield
        finally:
            logging.set_verbosity(verbosity)
