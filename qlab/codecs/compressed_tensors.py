"""compressed-tensors `pack-quantized`: W = (q - z) * s with u = q + 2^(b-1) as one dense bit stream per row.

weight_packed int32 [o, ceil(k*b/32)], weight_scale [o, g] in its own dtype, weight_shape int64 [2]; asymmetric adds
weight_zero_point int32 [ceil(o*b/32), g], the same stream along dim 0. A scale per tensor is weight_scale [1] with an
unpacked int8 weight_zero_point [1]; vLLM reads group and channel scales only. Source: compressed-tensors 0.20.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlab.codecs.bits import pack, unpack, words_of
from qlab.errors import QlabError
from qlab.qtensor import QTensor
from qlab.spec import Int, Spec, Tile

METHOD, FORMAT, LINEAR = "compressed-tensors", "pack-quantized", "Linear"
VERSION = "0.20.0"  # the release whose layout and keys these files follow
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a config group may say besides its spec; the first value is meant when the key is absent.
ALLOWED: Mapping[str, tuple] = {
    "format": (FORMAT,), "type": ("int",), "dynamic": (False,), "block_structure": (None,),
    "input_activations": (None,), "output_activations": (None,), "actorder": (None, False, "weight", "static"),
}  # fmt: skip
SPEC_KEYS = {"targets", "weights", "num_bits", "symmetric", "strategy", "group_size"}
# How the producer found its scales; in which dtype they are stored, the tensors say.
PROVENANCE_KEYS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}


def refusal(spec: Spec, online: Collection = ()) -> str | None:
    """Why pack-quantized cannot hold such a weight, or None when it can."""
    if not isinstance(spec, Int):
        return f"{FORMAT} holds integers, not {spec}"
    if online:
        return f"{FORMAT} holds no run-time operations; fold them into the weights or leave the method out"
    if _strategy(spec.tile) is None:
        return f"{FORMAT} has no scale per {spec.tile} block; use a group, channel or tensor scale"
    if spec.scale_dtype not in (None, *FLOATS):
        return f"{FORMAT} has no {spec.scale_dtype} scales; store them as float32, bfloat16 or float16"
    return None


def _strategy(tile: Tile) -> str | None:
    if tile.rows == 1:
        return "group" if tile.cols else "channel"
    return "tensor" if (tile.rows, tile.cols) == (None, None) else None


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.weight_packed, path.weight_scale, path.weight_shape[, path.weight_zero_point]}."""
    _check_leaf(path, leaf)
    bits, per_tensor = leaf.spec.bits, _strategy(leaf.spec.tile) == "tensor"
    tensors = {
        "weight_packed": _pack(leaf.codes, bits),
        "weight_scale": leaf.scales.reshape(1) if per_tensor else leaf.scales.contiguous(),
        "weight_shape": torch.tensor(leaf.shape),
    }
    if leaf.zeros is not None:
        zeros = leaf.zeros.reshape(1) if per_tensor else _pack(leaf.zeros.mT, bits).mT
        tensors["weight_zero_point"] = zeros.contiguous()
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def _check_leaf(path: str, leaf: QTensor) -> None:
    spec = leaf.spec
    if reason := refusal(spec):
        raise QlabError(f"{path}: {reason}")
    if len(leaf.shape) != 2:
        raise QlabError(f"{path}: {FORMAT} holds one [o, k] weight per module, not {tuple(leaf.shape)}; split it")
    for field in ("outer", "perm"):
        if getattr(leaf, field) is not None:
            raise QlabError(f"{path}: {FORMAT} cannot express the leaf's `{field}`; fold it in or use another codec")
    if leaf.scales.dtype not in _scale_dtypes(spec):
        raise QlabError(f"{path}: scales are {leaf.scales.dtype}, expected {_scale_dtypes(spec)[0]}; "
                        f"round scales to their stored dtype before rounding codes")
    if leaf.zeros is not None and leaf.zeros.dtype != torch.int8:
        raise QlabError(f"{path}: {FORMAT} stores int8 zeros, not {leaf.zeros.dtype}; choose a grid that rounds them")
    assert isinstance(spec, Int)  # refused otherwise
    for name, codes in (("codes", leaf.codes), ("zeros", leaf.zeros)):
        low, high = (0, 0) if codes is None else (int(x) for x in codes.aminmax())
        if low < spec.qmin or high > spec.qmax:
            raise QlabError(f"{path}: {name} span [{low}, {high}] but int{spec.bits} holds [{spec.qmin}, {spec.qmax}]; "
                            f"clamp them when rounding")


def _scale_dtypes(spec: Spec) -> tuple[torch.dtype, ...]:
    return (spec.scale_dtype,) if spec.scale_dtype else FLOATS


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors of the module.

    Files of compressed-tensors before 0.15 packed 3, 5, 6 and 7 bits without straddling; their weight_packed has more
    columns and is refused as misshaped.
    """
    if reason := refusal(spec):
        raise QlabError(f"{path}: {reason}")
    for name in ("weight", "weight_g_idx", "weight_global_scale", *(["weight_zero_point"] * spec.symmetric)):
        if f"{path}.{name}" in tensors:
            raise QlabError(f"{path}.{name} has no place in {FORMAT} at {spec}; check the file's quantization_config")
    o, k = shape = torch.Size(_take(path, tensors, "weight_shape", (2,), torch.int64).tolist())
    if o < 1 or k < 1 or (spec.tile.cols and k % spec.tile.cols):
        raise QlabError(f"{path}.weight_shape {tuple(shape)} does not fit {spec}; the file or its config is wrong")
    grid, per_tensor = spec.tile.scales_shape(shape), _strategy(spec.tile) == "tensor"
    stored = (1,) if per_tensor else grid
    words = _take(path, tensors, "weight_packed", (o, words_of(k, spec.bits)), torch.int32)
    scales = _take(path, tensors, "weight_scale", stored, *_scale_dtypes(spec))
    if spec.symmetric:
        zeros = None
    elif per_tensor:
        zeros = _take(path, tensors, "weight_zero_point", stored, torch.int8).reshape(grid)
    else:
        packed = _take(path, tensors, "weight_zero_point", (words_of(o, spec.bits), grid[1]), torch.int32)
        zeros = _unpack(packed.mT, spec.bits, o).mT.contiguous()
    return QTensor(_unpack(words, spec.bits, k), scales.reshape(grid), zeros, spec)


def _take(path: str, tensors: Mapping[str, Tensor], name: str, shape: tuple, *dtypes: torch.dtype) -> Tensor:
    if f"{path}.{name}" not in tensors:
        raise QlabError(f"{path}.{name} is missing; the file is incomplete or its quantization_config is wrong")
    tensor = tensors[f"{path}.{name}"]
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        raise QlabError(f"{path}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtypes[0]} {shape}; "
                        f"the file is damaged or its quantization_config is wrong")
    return tensor


# uint8 arithmetic wraps, so one addition takes every signed code to its unsigned one, at 8 bits too.
def _pack(codes: Tensor, bits: int) -> Tensor:
    return pack(codes.contiguous().view(torch.uint8) + 2 ** (bits - 1), bits)


def _unpack(words: Tensor, bits: int, k: int) -> Tensor:
    return (unpack(words, bits, k) - 2 ** (bits - 1)).view(torch.int8)


def config(specs: Mapping[str, Spec | None]) -> dict[str, Any]:
    """config.json's quantization_config for a model whose every nn.Linear is in `specs`; None is unquantized.

    Unquantized modules go to `ignore` by full name, a tied lm_head too. One spec targets the class Linear. Several
    target full names, or one anchored pattern where all layers of a family share a spec; no module matches two groups,
    so every reader's order of matching gives the same answer. Scale dtypes are not written: the tensors say them.
    transformers quantizes nn.Linear only and loads a Conv1D named here at random: a plan refuses such modules.
    """
    for path, spec in specs.items():
        if spec and (reason := refusal(spec)):
            raise QlabError(f"{path}: {reason}")
    quantized = {path: replace(spec, scale_dtype=None) for path, spec in specs.items() if spec}
    if not quantized:
        raise QlabError(f"none of the {len(specs)} modules is quantized; write the model without a quantization_config")
    groups = _targets(quantized)
    return {
        "config_groups": {f"group_{i}": _group(spec, groups[spec]) for i, spec in enumerate(groups)},
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": [path for path in specs if path not in quantized],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _group(spec: Spec, targets: list[str]) -> dict[str, Any]:
    weights = {"dynamic": False, "group_size": spec.tile.cols, "num_bits": spec.bits, "strategy": _strategy(spec.tile),
               "symmetric": spec.symmetric, "type": "int"}  # fmt: skip
    return {"format": FORMAT, "input_activations": None, "output_activations": None, "targets": targets,
            "weights": weights}  # fmt: skip


def _targets(quantized: Mapping[str, Spec]) -> dict[Spec, list[str]]:
    """Disjoint targets per spec: a pattern for a family (paths that differ in numbers only) of one spec, else names."""
    if len(set(quantized.values())) == 1:
        return {spec: [LINEAR] for spec in quantized.values()}
    families: dict[str, list[Spec]] = defaultdict(list)
    for path, spec in quantized.items():
        families[_pattern(path)].append(spec)
    targets: dict[Spec, set[str]] = defaultdict(set)
    for path, spec in quantized.items():
        family = families[_pattern(path)]
        targets[spec].add(_pattern(path) if len(family) > 1 and len(set(family)) == 1 else path)
    return {spec: sorted(names) for spec, names in targets.items()}


def _pattern(path: str) -> str:
    return "re:" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in path.split(".")) + "$"


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with packed tensors among `names`, as compressed-tensors matches it; refuses by name what
    it cannot read.

    `ignore` wins; then exact names, `re:` patterns (re.match, alphabetically), the class Linear.
    """
    _check_config(config)
    paths = sorted(name.removesuffix(".weight_packed") for name in names if name.endswith(".weight_packed"))
    modules = {*paths, *(name.removesuffix(".weight") for name in names if name.endswith(".weight"))}
    targets: dict[str, Spec] = {}
    for name, group in (config.get("config_groups") or {}).items():
        spec = _read_group(name, group, config.get("format"))
        targets |= dict.fromkeys(group["targets"], spec)
    if unknown := {t for t in targets if not t.startswith("re:")} - {LINEAR, *modules}:
        raise QlabError(f"targets {sorted(unknown)} are not linears of this model; qlab knows the class {LINEAR} only")
    ignored, target = _matcher(config.get("ignore") or ()), _matcher(targets)
    found: dict[str, Spec] = {}
    for path in paths:
        match = target(path)
        if ignored(path) or match is None:
            raise QlabError(f"{path}.weight_packed is in the files, and quantization_config names no spec for it; the file or "
                            "its config is wrong")
        found[path] = targets[match]
    return found


def _matcher(targets: Collection[str]) -> Callable[[str], str | None]:
    """module path -> the target that takes precedence for it, or None."""
    names, patterns = frozenset(targets), sorted(t for t in targets if t.startswith("re:"))
    fallback = LINEAR if LINEAR in names else None
    return lambda path: path if path in names else next((t for t in patterns if re.match(t[3:], path)), fallback)


def _check_config(config: Mapping[str, Any]) -> None:
    for key, expected in (("quant_method", METHOD), ("quantization_status", "compressed")):
        if config.get(key) != expected:
            raise QlabError(f"quantization_config has {key} {config.get(key)!r}; qlab reads {expected!r}")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":  # old releases write {"format": "dense", ...}
        raise QlabError(f"quantization_config has sparsity_config {sparsity}; qlab reads dense weights only")
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if config.get(key):
            raise QlabError(f"quantization_config has {key} {config[key]}; qlab reads plain weight quantization only")


def _read_group(name: str, group: Any, default_format: str | None) -> Spec:
    if not isinstance(group, Mapping) or not group.get("weights") or not group.get("targets"):
        raise QlabError(f"config group {name} lacks `weights` or `targets`; write preset names out in full")
    weights = group["weights"]
    found = {**weights, **group, "format": group.get("format") or default_format}
    problems = [f"{key} {found[key]!r}" for key, ok in ALLOWED.items() if found.get(key, ok[0]) not in ok]
    problems += [f"unknown key {key!r}" for key in sorted(found.keys() - ALLOWED.keys() - SPEC_KEYS - PROVENANCE_KEYS)]
    if problems:
        raise QlabError(f"config group {name} has {', '.join(problems)}; qlab reads int {FORMAT} weights only")
    return Int(weights.get("num_bits", 8), _tile(name, weights), weights.get("symmetric", True))


def _tile(name: str, weights: Mapping[str, Any]) -> Tile:
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy == "group" and size and size > 0:
        return Tile(1, size)
    if strategy in ("channel", "tensor") and size in (None, -1):
        return Tile(1 if strategy == "channel" else None, None)
    raise QlabError(f"config group {name} has strategy {strategy!r} with group_size {size}; "
                    f"qlab reads group with a size, channel and tensor")
