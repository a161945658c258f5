"""A model of which there is a configuration and no weight: its tensors as files would list them.

A plan asks for names, shapes and dtypes, which the modules on the meta device have. The tensors
that it runs, an embedding and norms, are zeros that take the memory of one number. `quant_method:
fp8` is laid out as DeepSeek-V3's files are: linears in e4m3, and a scale in float32 for each tile.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlab.algebra.spec import Tile
from qlab.codecs import fp8
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint, with_codes
from qlab.files.directory import CONFIG, INDEX, PICKLES, SINGLE, Seen, Stored, read_json
from qlab.files.explained import KEY, explained
from qlab.files.tensors import NAMES, dtype_of
from qlab.model.headers import shape_of
from qlab.model.names import Names
from qlab.model.paper import find_blocks, on_paper
from qlab.process.surroundings import undisturbed

MOST_LAYERS, MOST_EXPERTS = 2_000, 1_000_000  # of a model that is built module by module
LAYERS = r"layers?$|depth$|^(num|n)_blocks?$"  # names of numbers of layers; a block_size is none
UNSAID = torch.bfloat16  # the dtype where a configuration names none
UNWRITTEN = Seen(size=0, modified=0, number=0, header="")  # of files that are not there


def is_alone(path: Path) -> bool:
    """Whether a path is that of a configuration without weights: a JSON file, or a folder that
    holds config.json and no file of weights."""
    if path.suffix == ".json":
        return path.is_file()
    if not (path / CONFIG).is_file() or (path / INDEX).exists():
        return False
    return not any(file.suffix in (".safetensors", *PICKLES) for file in path.iterdir())


@undisturbed
def open_config(path: Path) -> Checkpoint:
    """The checkpoint that the configuration describes, to plan with.

    Errors: more layers or experts than a model has, codes of another kind than fp8, a dtype that
    torch has not, and what transformers refuses.
    """
    file = path if path.suffix == ".json" else path / CONFIG
    raw = explained(read_json(file), file.parent)
    for name, count in _counts(raw):
        if count > MOST_LAYERS:
            raise QlabError(
                f"{file} has {name} {count}, and a plan builds at most {MOST_LAYERS:,} layers; "
                "correct that number"
            )
    said = raw.get(KEY)
    if said and not (isinstance(said, dict) and said.get("quant_method") == "fp8"):
        raise QlabError(
            f"{file} has a quantization_config, whose codes lie in files that are not here; remove "
            f"it to plan for the unquantized model (quant_method fp8 may stay): {said!r:.60}"
        )
    where = file.parent if file.name == CONFIG else file
    bare = Checkpoint(path=where, raw=raw, stored={}, codec=None, quantized={}, reader=_zeros)
    dtype = _dtype(raw, file)
    model = on_paper(bare, dtype)
    _refuse_empty(model, file)
    _refuse_experts(model, file)
    listed = _listed(bare, model, dtype, fp8.tile_of(said, fp8.BLOCK) if said else None)
    return with_codes(replace(bare, stored=_placed(where, listed)))


def _zeros(name: str, stored: Stored) -> Tensor:
    """A tensor of zeros, all of which are one number in memory."""
    return torch.zeros((), dtype=dtype_of(name, stored)).expand(stored.shape)


def _counts(raw: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of layers that a configuration and its parts name."""
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif type(value) is int and re.search(LAYERS, name):
            yield name, value


def _refuse_empty(model: PreTrainedModel, file: Path) -> None:
    """Refuse tensors without numbers."""
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            shape = " x ".join(map(str, parameter.shape))
            raise QlabError(f"{file} describes {name} of {shape} numbers; correct its sizes")


def _refuse_experts(model: PreTrainedModel, file: Path) -> None:
    """Refuse more experts than can be listed, of which the fused weights have none by name."""
    count = sum(p.shape[0] for p in model.parameters() if p.ndim == 3)
    if count > MOST_EXPERTS:
        raise QlabError(
            f"{file} has {count:,} experts in all layers, and a plan lists at most "
            f"{MOST_EXPERTS:,}; correct their number"
        )


def _dtype(raw: Mapping[str, Any], file: Path) -> torch.dtype:
    """The dtype that a configuration, or the part of it that is of text, names."""
    text = raw.get("text_config")
    parts = [raw, text] if isinstance(text, dict) else [raw]
    named = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
    name = next(filter(None, named), None)
    if name is None:
        return UNSAID
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise QlabError(f"{file} has the dtype {name!r:.40}; write bfloat16, float16 or float32")
    return dtype


def _listed(
    bare: Checkpoint, model: PreTrainedModel, dtype: torch.dtype, tile: Tile | None
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of the files. tile: what a scale of fp8 weights covers;
    None where weights are in `dtype`."""
    names = Names(bare, model, *find_blocks(model))
    coded = set() if tile is None else _coded(names, bare.raw[KEY])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name in model.all_tied_weights_keys:
            continue
        for piece in names.pieces(name):
            shape = shape_of(piece, parameter)
            if tile is not None and piece.module in coded and len(shape) == 2:
                scales = tile.scales_shape(shape)
                yield piece.name, torch.float8_e4m3fn, shape
                yield f"{piece.module}.{fp8.INVERSE}", torch.float32, scales
            else:
                yield piece.name, parameter.dtype, shape
    for name, tensor in model.state_dict().items():
        if name not in parameters and name not in model.all_tied_weights_keys:
            yield name, tensor.dtype, tuple(tensor.shape)


def _coded(names: Names, said: Mapping[str, Any]) -> set[str]:
    """The modules whose weights are in fp8: linears and experts in blocks, but for those that the
    configuration leaves out."""
    kept = [*(said.get("modules_to_not_convert") or ()), *(said.get("ignored_layers") or ())]
    inside = [name for name in names.linears() if name.startswith(f"{names.prefix}.")]
    return {
        module
        for module in (*inside, *names.expert_modules())
        if not any(f".{part}." in f".{module}." for part in kept)
    }


def _placed(
    folder: Path, listed: Iterator[tuple[str, torch.dtype, tuple[int, ...]]]
) -> dict[str, Stored]:
    """The tensors one behind the other, as in one file."""
    stored: dict[str, Stored] = {}
    start = 0
    for name, dtype, shape in listed:
        stop = start + prod(shape) * dtype.itemsize
        stored[name] = Stored(
            file=folder / SINGLE,
            dtype=NAMES[dtype],
            shape=tuple(shape),
            start=start,
            stop=stop,
            seen=UNWRITTEN,
        )
        start = stop
    return stored
