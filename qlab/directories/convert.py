"""The same codes in another format. What the format cannot hold is refused by name; rounding anew
has to be asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.grid import encode as round_to_grid
from qlab.algebra.grid import minmax
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Spec
from qlab.codecs import CODECS, Codec, refusal_of_transposed
from qlab.driver.report import stored_bits
from qlab.driver.siblings import Siblings
from qlab.errors import QlabError
from qlab.files.certificate import certify, distances
from qlab.files.checkpoint import GGUF, Checkpoint, open_checkpoint
from qlab.files.place import place, refuse_early
from qlab.files.record import recorded, versions, written
from qlab.files.shardwise import Notes, leaves_by_file, rewrite_files
from qlab.files.writer import Writer
from qlab.model.linears import (
    embeddings,
    linear_names,
    refuse_unheld,
    transposed,
    untied_where_apart,
)
from qlab.process.extras import needed
from qlab.process.shown import Shown, some
from qlab.process.surroundings import undisturbed

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, repr=False)
class Converted(Shown):
    """The directory written, and per module what became of it: its spec, and the error of rounding
    it anew where it was.

    dequantized: tensor of a GGUF file -> the kind of blocks (Q6_K) that it was dequantized from.
    """

    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    dequantized: Mapping[str, str] = field(default_factory=dict)

    def __fspath__(self) -> str:
        """The directory: a result stands wherever a path does."""
        return str(self.path)

    @property
    def requantized(self) -> dict[str, float]:
        """Module -> relative error |W - W'| / |W| against the weights it was rounded anew from."""
        return {
            name: row["requantization_error"]
            for name, row in self.sites.items()
            if "requantization_error" in row
        }

    def summary(self) -> dict[str, str]:
        """Without the sites."""
        anew, dense = len(self.requantized), len(self.dequantized)
        return {
            "directory": str(self.path),
            "weights": (
                f"{len(self.sites) - anew} with the same codes, {anew} rounded anew, {dense} "
                "dequantized"
            ),
        }

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "path": str(self.path),
            "sites": dict(self.sites),
            "requantized": self.requantized,
            "dequantized": dict(self.dequantized),
        }


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
    """Write a quantized directory, or the model of a GGUF file, in the format that `codec` names,
    file by file.

    Codes, scales and zeros stay what they are, and so do the unquantized tensors, the tokenizer and
    the other files. requantize: a grid on which every weight is to lie. Those that do already keep
    their codes where the format can hold them; the others are dequantized and rounded to nearest.

    Errors: a directory that is not quantized; without `requantize`, any loss, with the modules and
    what they would lose.
    """
    if (
        not isinstance(model, Checkpoint)
        and (file := Path(model).expanduser()).suffix == GGUF
        and not file.is_dir()
    ):
        return _from_gguf(file, codec, Path(out), requantize, overwrite, resume)
    source = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    if not source.quantized:
        raise QlabError(
            f"{source.path} is not quantized, so there is nothing to convert; quantize it first"
        )
    _check_codec(codec)
    refuse_unheld(source)
    folder = place(out, source.path, set(source.files.values()))
    refuse_early(folder, overwrite, resume)
    carried = _carried(source, codec)
    _refuse_rounded_inputs(source, codec)
    _refuse_transposed(source, codec)
    _refuse_embeddings(source, codec)
    targets = _targets(source, codec, requantize)
    config = _config(source, CODECS[codec], targets) | carried
    raw = untied_where_apart(source, targets)
    record = recorded(source.path)
    job = {
        "source": source.fingerprint(),
        "codec": codec,
        "requantize": requantize and str(requantize),
        "versions": versions(),
        "converted_from": record.get("job"),
    }
    with Writer(folder, overwrite, resume) as writer:
        writer.begin(job, len(leaves_by_file(source)), source.path)
        if not writer.finished:
            siblings = Siblings(
                targets, lambda module: dense(source.leaf(f"{module}.weight"), torch.float32)
            )
            rewrite = partial(
                _rewrite, source, CODECS[codec], targets, siblings, requantize, record
            )
            with writer.refusing():
                rewrite_files(source, writer, rewrite, "converting")
                notes = writer.notes()
                if lost := notes.get("lost"):
                    raise _refusal(codec, lost)
            writer.finish(
                written({**raw, "quantization_config": config}, job, {**record, **notes}),
                source.path,
            )
    return Converted(writer.out, recorded(writer.out)["sites"])


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise QlabError(f"the codec {codec!r} is unknown; qlab writes {', '.join(CODECS)}")


def _from_gguf(
    path: Path, codec: str, out: Path, requantize: Spec | None, overwrite: bool, resume: bool
) -> Converted:
    needed("gguf", "gguf")  # directories do without it
    from qlab.directories.gguf import from_gguf

    _check_codec(codec)
    folder = place(out, path)
    refuse_early(folder, overwrite, resume)
    if requantize is not None:
        raise QlabError(
            f"{path} is a GGUF file, whose codes are not rounded anew on the way; convert it "
            "without a grid, and then the directory with one (--requantize)"
        )
    written = from_gguf(path, codec, folder, overwrite, resume)
    record = recorded(written)
    return Converted(
        written, record["sites"], {name: row["kind"] for name, row in record["dequantized"].items()}
    )


# ------------------------------------------------------------------ what a format can hold
def _config(source: Checkpoint, codec: Codec, targets: Mapping[str, Spec]) -> dict[str, Any]:
    names = {
        **linear_names(source),
        **{module: module for module in source.quantized},
    }  # experts are no linears of the model
    inputs = (
        [{name: source.inputs.get(module) for name, module in names.items()}]
        if source.inputs
        else []
    )
    coded = embeddings(source) & source.quantized.keys()
    more = {"embeddings": coded} if coded else {}
    return codec.config(
        {name: targets.get(module) for name, module in names.items()}, *inputs, **more
    )


def _carried(source: Checkpoint, codec: str) -> dict[str, Any]:
    """What the config says beside weights and inputs, word for word; refused where it happens at
    run time and the new format has no place for it. Its tensors are carried on as they are."""
    assert source.codec is not None  # it is quantized
    same = CODECS[codec].extras is source.codec.extras
    if lost := [extra for extra in source.extras if extra.online and not same]:
        raise QlabError(
            f"{codec} cannot hold the {lost[0].key} of {source.path}, which would be lost "
            f"({lost[0].says}); choose the codec that the directory is in"
        )
    said = source.raw["quantization_config"]
    return {extra.key: said[extra.key] for extra in source.extras if same and extra.key in said}


def _refuse_rounded_inputs(source: Checkpoint, codec: str) -> None:
    """Where inputs are rounded at run time, a format that says nothing of them would give another
    model."""
    if source.inputs and CODECS[codec].decode_input is None:
        path, rounded = next(iter(source.inputs.items()))
        more = f" and {len(source.inputs) - 1} more" if len(source.inputs) > 1 else ""
        raise QlabError(
            f"{codec} cannot hold the rounding of inputs that {source.path} has at {path} "
            f"({rounded}){more}, which would be lost; choose compressed-tensors"
        )


def _refuse_transposed(source: Checkpoint, codec: str) -> None:
    """Codes of linears that hold their dense weight as [k, o], which readers of most formats never
    look for."""
    reason = refusal_of_transposed(codec)
    if (
        reason
        and source.codec
        and source.codec.transposed
        and (turned := sorted(transposed(source) & source.quantized.keys()))
    ):
        raise QlabError(f"{turned[0]} and {len(turned) - 1} more of {source.path}: {reason}")


def _refuse_embeddings(source: Checkpoint, codec: str) -> None:
    """Codes of embeddings, which readers of most formats never look for."""
    if not CODECS[codec].embeddings and (
        coded := sorted(embeddings(source) & source.quantized.keys())
    ):
        raise QlabError(
            f"{codec} holds codes of linears, and {coded[0]} of {source.path} is an embedding "
            "with codes, which its readers would skip; choose compressed-tensors"
        )


def _targets(source: Checkpoint, codec: str, requantize: Spec | None) -> dict[str, Spec]:
    """The spec that every module will have in the new format, decided before a tensor is read."""
    if not any(source.quantized.values()):
        raise QlabError(
            f"{source.path} holds no codes on a grid that qlab has, only weights that its format "
            "gives back dense, so there is nothing to convert; quantize the model that it was "
            "made from"
        )
    if requantize is not None:
        target = _nearest(requantize, CODECS[codec])
        reason = target if isinstance(target, str) else CODECS[codec].risk(target)
        if isinstance(target, str) or reason:
            raise QlabError(
                f"{codec} cannot hold {requantize} weights ({reason}); choose another grid to "
                "round to"
            )
        return {module: target for module, spec in source.quantized.items() if spec}
    nearest = {
        spec: _nearest(spec, CODECS[codec]) for spec in set(source.quantized.values()) if spec
    }
    targets = {module: nearest[spec] for module, spec in source.quantized.items() if spec}
    if lost := {module: target for module, target in targets.items() if isinstance(target, str)}:
        raise _refusal(codec, lost)
    return {module: target for module, target in targets.items() if not isinstance(target, str)}


def _refusal(codec: str, lost: Mapping[str, str]) -> QlabError:
    """Modules by what they would lose."""
    by_reason: dict[str, list[str]] = {}
    for module, reason in lost.items():
        by_reason.setdefault(reason.removeprefix(f"{module}: "), []).append(module)
    parts = [f"{some(names)} ({reason})" for reason, names in by_reason.items()]
    return QlabError(
        f"{codec} cannot hold {'; '.join(parts)}; choose another codec, or a grid to round the "
        "weights to (--requantize)"
    )


def _nearest(spec: Spec, codec: Codec) -> Spec | str:
    """The spec itself, or the one that differs in storing zero points that are all 0 or not; else
    why not."""
    candidates = [spec]
    if isinstance(spec, Int) and spec.zero_dtype == torch.int8:
        candidates = [
            replace(spec, scale_dtype=None, symmetric=symmetric)
            for symmetric in (spec.symmetric, not spec.symmetric)
        ]
    for candidate in candidates:
        if _scale_dtypes(candidate, codec):
            return candidate
    return (
        codec.refusal(replace(spec, scale_dtype=spec.scale_dtype or SCALE_DTYPES[0]))
        or f"it has no {spec} weights"
    )


def _scale_dtypes(spec: Spec, codec: Codec, own: torch.dtype | None = None) -> list[torch.dtype]:
    """The dtypes in which the format can store such scales, the leaf's own first."""
    fixed = (
        spec.scale_dtype is not None and spec.scale_dtype.itemsize == 1
    )  # MX and NV: the dtype is part of the grid
    dtypes = (
        [spec.scale_dtype]
        if fixed
        else list(dict.fromkeys([own, *SCALE_DTYPES] if own else SCALE_DTYPES))
    )
    return [
        d for d in dtypes if d is not None and codec.refusal(replace(spec, scale_dtype=d)) is None
    ]


def express(leaf: QTensor, target: Spec, codec: Codec) -> QTensor:
    """The same numbers as a leaf of the target's spec that the codec can encode; refuses whatever
    would be lost."""
    leaf = in_order(leaf)
    zeros = leaf.zeros
    if isinstance(target, Int) != isinstance(leaf.spec, Int) or (
        leaf.spec.bits,
        leaf.spec.tile,
    ) != (target.bits, target.tile):
        raise QlabError(f"its codes lie on {leaf.spec}, not on {target}")
    if target.symmetric and zeros is not None:
        if (zeros != 0).any():
            raise QlabError("zero points that are not 0 would be lost")
        zeros = None
    elif not target.symmetric and zeros is None:
        zeros = torch.zeros_like(leaf.scales, dtype=torch.int8)
    dtypes = _scale_dtypes(target, codec, leaf.scales.dtype)
    if not dtypes:
        raise QlabError(codec.refusal(target) or f"its format has no scales of {target}")
    for dtype in dtypes:
        scales = leaf.scales.to(dtype)
        if torch.equal(scales.double(), leaf.scales.double()):
            return QTensor(
                leaf.codes, scales, zeros, replace(target, scale_dtype=dtype), leaf.outer, leaf.perm
            )
    raise QlabError(
        f"{leaf.scales.dtype} scales would be rounded to {dtypes[0]}".replace("torch.", "")
    )


def in_order(leaf: QTensor) -> QTensor:
    """The leaf without `perm` where every group still consists of neighbouring channels; else as it
    is."""
    if leaf.perm is None:
        return leaf
    k = leaf.shape[-1]
    cols = leaf.spec.tile.cols or k
    if k % cols:
        return leaf
    place = leaf.perm.argsort()  # input channel -> column of codes
    group = (place // cols).reshape(-1, cols)
    if (group != group[:, :1]).any():
        return leaf
    order = group[:, 0]
    zeros = None if leaf.zeros is None else leaf.zeros[..., order]
    return QTensor(leaf.codes[..., place], leaf.scales[..., order], zeros, leaf.spec, leaf.outer)


# ------------------------------------------------------------------ one leaf
def _rewrite(
    source: Checkpoint,
    codec: Codec,
    targets: Mapping[str, Spec],
    siblings: Siblings,
    requantize: Spec | None,
    record: Mapping[str, Any],
    name: str,
    notes: Notes,
) -> Mapping[str, Tensor]:
    """The tensors of one leaf in the new format; what would be lost goes into the notes instead."""
    module = name.rpartition(".")[0]
    leaf = (
        source.leaf(name)
        if module in source.quantized and name == f"{module}.weight"
        else source.tensor(name)
    )
    if isinstance(leaf, Tensor):
        return {name: leaf}  # also what its format laid out in a way of its own
    row = {**record.get("sites", {}).get(module, {}), "shape": list(leaf.shape)}
    certificate = record.get("certificates", {}).get(module)
    online = [ops] if (ops := source.rounding(module)) else []
    try:
        if online and (reason := codec.refusal(targets[module], ops)):
            raise QlabError(reason)
        new = express(leaf, targets[module], codec)
        tensors = codec.encode(module, new, *online)
    except QlabError as error:
        if requantize is None:
            notes.setdefault("lost", {})[module] = str(error)
            return {}
        new = _rounded(leaf, targets[module], codec, siblings.outer(module))
        tensors = codec.encode(module, new, *online)
        row = {
            "shape": row["shape"],
            "requantized_from": str(leaf.spec),
            "requantization_error": distances(new, leaf)["weight_error"],
        }
        # without the weight that the others were made from, which is not here, but with its name
        if certificate:
            certificate = certify(new, None) | {
                key: certificate[key] for key in ("made_of",) if key in certificate
            }
    row |= {"spec": str(new.spec), "bits_per_weight": stored_bits(new, new.scales.dtype)}
    notes.setdefault("sites", {})[module] = row
    if certificate:
        notes.setdefault("certificates", {})[module] = certificate
    return tensors


def _rounded(leaf: QTensor, target: Spec, codec: Codec, outer: Tensor | None) -> QTensor:
    settled = replace(target, scale_dtype=_scale_dtypes(target, codec)[0])
    return round_to_grid(minmax, dense(leaf, torch.float32), settled, outer=outer)
