"""The same codes in another format.

What the format cannot hold is refused by name; weights are rounded anew only where that is asked
for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Spec
from qlab.codecs import CODECS, Codec, codec_of_directories, joined
from qlab.directories.converted import Converted
from qlab.directories.recoded import Recoded, lossy
from qlab.driver.admissible import Admission
from qlab.driver.siblings import Siblings
from qlab.errors import QlabError
from qlab.files.checkpoint import GGUF, Checkpoint, open_checkpoint
from qlab.files.hashed import HashedFiles
from qlab.files.place import place, refuse_early
from qlab.files.record import recorded, versions, written
from qlab.files.shardwise import leaves_by_file, rewrite_files
from qlab.files.writer import Writer
from qlab.model.modules import Modules
from qlab.process.extras import needed
from qlab.process.surroundings import undisturbed


@undisturbed
@torch.no_grad()
def convert(
    model: Checkpoint | str | Path,
    codec: str,
    out: str | Path,
    *,
    requantize: Spec | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Converted:
    """Write a quantized directory, or the model of a GGUF file, in another format, file by file.

    Codes, scales and zeros stay what they are, and so do the unquantized tensors, the tokenizer and
    the other files.

    Args:
        model: A quantized model directory in any format that qlab reads, or what `open` returned
            for it, or a GGUF file.
        codec: The name of the format to write: "compressed-tensors", "gptq", "awq" and the other
            names of `qlab.codecs.CODECS`.
        out: The directory to write. For "gguf" the file, whose name ends in .gguf, or a folder for
            a `model.gguf`.
        requantize: A grid on which every weight is to lie. Weights that lie on it keep their codes
            where the format can hold them; the others are dequantized and rounded to nearest. None
            rounds nothing.
        overwrite: Whether to replace a directory of qlab's that is there.
        resume: Whether to continue a conversion that was interrupted. A file is begun anew.

    Returns:
        The directory, or the file, with a row for each of its weights, and what was rounded anew
        or dequantized.

    Raises:
        QlabError: The directory is not quantized, or holds weights of another model than its
            config.json describes; or, without `requantize`, the format cannot hold some of its
            codes. The error names the modules and what they would lose.

    Example:
        >>> import qlab
        >>> made = qlab.convert("demo-int4", "gptq", "demo-gptq")
        >>> made.path.name, made.requantized
        ('demo-gptq', {})
    """
    file = None if isinstance(model, Checkpoint) else Path(model).expanduser()
    if file is not None and file.suffix == GGUF and not file.is_dir():
        return _from_gguf(file, codec, Path(out), requantize, overwrite, resume)
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if not source.quantized:
        raise QlabError(
            f"{source.path} is not quantized, so there is nothing to convert; quantize it first"
        )
    _check_codec(codec)
    modules, admission = Modules(source), Admission(codec=codec, dtype=source.dtype)
    modules.refuse_unheld()
    output = _output(source, codec, Path(out), overwrite, resume)
    kept_settings = _carried(source, codec)
    _refuse_rounded_inputs(source, codec)
    _refuse_transposed(modules, admission)
    _refuse_embeddings(modules, codec)
    targets = _targets(source, admission, requantize)
    record = recorded(source.path)
    job = _job(source, codec, requantize, record)
    leaves = Recoded(
        source=source,
        admission=admission,
        targets=targets,
        shapes=modules.shapes(),
        siblings=Siblings(targets, lambda module: _dense_weight(source, module)),
        rounds=requantize is not None,
        record=record,
    )
    if CODECS[codec].file:
        return _as_file(leaves, job, output)
    quantization = joined(_quantization_config(modules, CODECS[codec], targets), kept_settings)
    config = {**modules.untied_where_apart(targets), "quantization_config": quantization}
    with Writer(output, overwrite, resume) as writer:
        writer.begin(job, len(leaves_by_file(source)), source.path)
        if not writer.finished:
            with writer.refusing():
                rewrite_files(source, writer, leaves, "converting", CODECS[codec])
                notes = writer.notes()
                leaves.refuse_lost(notes)
            writer.finish(written(config, job, {**record, **notes}), source.path)
    return Converted(path=writer.out, sites=recorded(writer.out)["sites"])


def _job(
    source: Checkpoint, codec: str, requantize: Spec | None, record: Mapping[str, Any]
) -> dict[str, Any]:
    """What identifies a conversion. record: the source's qlab.json."""
    return {
        "source": HashedFiles(source.path, source.stored).digest(),
        "codec": codec,
        "requantize": requantize and str(requantize),
        "versions": versions(),
        "converted_from": record.get("job"),
    }


def _output(source: Checkpoint, codec: str, out: Path, overwrite: bool, resume: bool) -> Path:
    """The directory or the file that is written; refuses one that may not be."""
    if CODECS[codec].file:
        needed("gguf", "gguf")  # directories do without it
        from qlab.directories.to_gguf import gguf_place

        return gguf_place(out, source.path, overwrite)
    folder = place(out, source.path, set(source.files.values()))
    refuse_early(folder, overwrite, resume)
    return folder


def _as_file(leaves: Recoded, job: Mapping[str, Any], file: Path) -> Converted:
    from qlab.directories.to_gguf import to_gguf

    notes = to_gguf(
        leaves.source,
        leaves.targets,
        lambda name, notes: leaves.rewritten(name, leaves.read(name), notes),
        refuse_lost=leaves.refuse_lost,
        job=job,
        file=file,
    )
    return Converted(path=file, sites=notes["sites"])


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise QlabError(f"the codec {codec!r} is unknown; qlab writes {', '.join(CODECS)}")


def _from_gguf(
    path: Path, codec: str, out: Path, requantize: Spec | None, overwrite: bool, resume: bool
) -> Converted:
    needed("gguf", "gguf")  # directories do without it
    from qlab.directories.gguf import from_gguf

    codec_of_directories(codec)
    folder = place(out, path)
    refuse_early(folder, overwrite, resume)
    if requantize is not None:
        raise QlabError(
            f"{path} is a GGUF file, whose codes are not rounded anew on the way; convert it "
            "without a grid, and then the directory with one (--requantize)"
        )
    directory = from_gguf(path, codec, folder, overwrite, resume)
    record = recorded(directory)
    return Converted(
        path=directory,
        sites=record["sites"],
        dequantized={name: row["kind"] for name, row in record["dequantized"].items()},
    )


# ------------------------------------------------------------------ what a format can hold
def _quantization_config(
    modules: Modules, codec: Codec, targets: Mapping[str, Spec]
) -> dict[str, Any]:
    """What the new format's configuration says of weights, and of the rounding of inputs."""
    source = modules.checkpoint
    # experts are no linears of the model
    names = {**modules.linears(), **{module: module for module in source.quantized}}
    specs = {name: targets.get(module) for name, module in names.items()}
    embeddings = modules.embeddings() & source.quantized.keys()
    arguments: dict[str, Any] = {"embeddings": embeddings} if embeddings else {}
    if source.inputs:
        inputs = {name: source.inputs.get(module) for name, module in names.items()}
        return codec.config(specs, inputs, **arguments)
    return codec.config(specs, **arguments)


def _carried(source: Checkpoint, codec: str) -> dict[str, Any]:
    """What the config says beside weights and inputs, word for word; refused where it happens at
    run time and the new format has no place for it. Its tensors are carried on as they are."""
    assert source.codec is not None  # it is quantized
    same = CODECS[codec].extras is source.codec.extras
    lost = [extra for extra in source.extras if extra.online and not same]
    if lost:
        raise QlabError(
            f"{codec} cannot hold the {lost[0].key} of {source.path}, which would be lost "
            f"({lost[0].says}); choose the codec that the directory is in"
        )
    said = source.raw["quantization_config"]
    kept: dict[str, Any] = {}
    for extra in source.extras if same else ():
        if extra.part is not None:
            kept.setdefault(extra.key, {})[extra.part] = said[extra.key][extra.part]
        elif extra.key in said:
            kept[extra.key] = said[extra.key]
    return kept


def _refuse_rounded_inputs(source: Checkpoint, codec: str) -> None:
    """Where inputs are rounded at run time, a format that says nothing of them would give another
    model."""
    if source.inputs and CODECS[codec].decode_input is None:
        path, rounded = next(iter(source.inputs.items()))
        more = f" and {len(source.inputs) - 1} more" if len(source.inputs) > 1 else ""
        raise QlabError(
            f"{codec} cannot hold the rounding of inputs that {source.path} has at {path} "
            f"({rounded}){more}, which would be lost; choose compressed-tensors, or quantize the "
            "model without rounded inputs"
        )


def _refuse_transposed(modules: Modules, admission: Admission) -> None:
    """Refuse codes of linears that hold their dense weight as [k, o], which readers of most formats
    never look for."""
    source, reason = modules.checkpoint, admission.transposed_refusal
    if not reason or source.codec is None or not source.codec.transposed:
        return
    coded = sorted(modules.transposed() & source.quantized.keys())
    if coded:
        raise QlabError(f"{coded[0]} and {len(coded) - 1} more of {source.path}: {reason}")


def _refuse_embeddings(modules: Modules, codec: str) -> None:
    """Refuse codes of embeddings, which readers of most formats never look for."""
    source = modules.checkpoint
    if CODECS[codec].embeddings:
        return
    coded = sorted(modules.embeddings() & source.quantized.keys())
    if coded:
        raise QlabError(
            f"{codec} holds codes of linears, and {coded[0]} of {source.path} is an embedding "
            "with codes, which its readers would skip; choose compressed-tensors"
        )


def _targets(source: Checkpoint, admission: Admission, requantize: Spec | None) -> dict[str, Spec]:
    """The spec that every module will have in the new format, decided before a tensor is read."""
    specs = {module: spec for module, spec in source.quantized.items() if spec}
    if not specs:
        raise QlabError(
            f"{source.path} holds no codes on a grid that qlab has, only weights that its format "
            "gives back dense, so there is nothing to convert; quantize the model that it was "
            "made from"
        )
    if requantize is not None:
        target = admission.nearest_to_round_to(requantize)
        if isinstance(target, str):
            raise QlabError(
                f"{admission.codec} cannot hold {requantize} weights ({target}); choose another "
                "grid to round to"
            )
        return dict.fromkeys(specs, target)
    nearest = {spec: admission.nearest(spec) for spec in set(specs.values())}
    targets: dict[str, Spec] = {}
    lost: dict[str, str] = {}
    for module, spec in specs.items():
        target = nearest[spec]
        if isinstance(target, str):
            lost[module] = target
        else:
            targets[module] = target
    if lost:
        raise lossy(admission.codec, lost)
    return targets


def _dense_weight(source: Checkpoint, module: str) -> Tensor:
    return dense(source.leaf(f"{module}.weight"), torch.float32)
