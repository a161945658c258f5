"""compressed-tensors `pack-quantized`: W = (q - z) * s with u = q + 2^(b-1) as a dense bit stream per row.

weight_packed int32 [o, ceil(k*b/32)], weight_scale [o, g] in its own dtype, weight_shape int64 [2]; asymmetric adds
weight_zero_point int32 [ceil(o*b/32), g], the same stream along dim 0. One scale per tensor: weight_scale [1] and an
unpacked int8 weight_zero_point [1]. Source: the compressed-tensors package, 0.20.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from qlab.codecs.bits import pack, unpack, words_of
from qlab.errors import QlabError
from qlab.qtensor import QTensor
from qlab.spec import Int, Spec, Tile

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
VERSION = "0.20.0"  # the release whose layout and keys these files follow
LINEAR = "Linear"
GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
WEIGHT_KEYS = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder", "block_structure"}
# How the producer found its scales; the tensors say in which dtype they are stored.
PROVENANCE_KEYS = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}


def refusal(spec: Spec, online: Collection = ()) -> str | None:
    """Why pack-quantized cannot hold such a weight, or None when it can."""
    if online:
        return f"{FORMAT} holds no run-time operations; fold them into the weights or leave the method out"
    if _strategy(spec.tile) is None:
        return f"{FORMAT} has no scale per {spec.tile} block; use a group, channel or tensor scale"
    return None


def _strategy(tile: Tile) -> str | None:
    if tile.rows == 1:
        return "group" if tile.cols else "channel"
    return "tensor" if (tile.rows, tile.cols) == (None, None) else None


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.weight_packed, path.weight_scale, path.weight_shape[, path.weight_zero_point]}."""
    _check(path, leaf)
    bits, per_tensor = leaf.spec.bits, _strategy(leaf.spec.tile) == "tensor"
    tensors = {
        "weight_packed": pack(_unsigned(leaf.codes, bits), bits),
        "weight_scale": leaf.scales.reshape(1) if per_tensor else leaf.scales.contiguous(),
        "weight_shape": torch.tensor(leaf.shape),
    }
    if leaf.zeros is not None:
        tensors["weight_zero_point"] = leaf.zeros.reshape(1) if per_tensor else _pack_zeros(leaf.zeros, bits)
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def _check(path: str, leaf: QTensor) -> None:
    spec = leaf.spec
    if reason := refusal(spec):
        raise QlabError(f"{path}: {reason}")
    if len(leaf.shape) != 2:
        raise QlabError(f"{path}: {FORMAT} holds one [o, k] weight per module, not {tuple(leaf.shape)}; split experts")
    for field in ("outer", "perm"):
        if getattr(leaf, field) is not None:
            raise QlabError(f"{path}: {FORMAT} cannot express the leaf's `{field}`; fold it in or use another codec")
    if spec.scale_dtype not in (None, leaf.scales.dtype):
        raise QlabError(f"{path}: scales are {leaf.scales.dtype} but {spec} says {spec.scale_dtype}; "
                        f"round scales to their stored dtype before rounding codes")
    for name, codes in (("codes", leaf.codes), ("zeros", leaf.zeros)):
        if codes is None:
            continue
        low, high = (int(x) for x in codes.aminmax())
        if low < spec.qmin or high > spec.qmax:
            raise QlabError(f"{path}: {name} span [{low}, {high}] but int{spec.bits} holds [{spec.qmin}, {spec.qmax}]; "
                            f"clamp them when rounding")


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
    shape = torch.Size(_take(path, tensors, "weight_shape", (2,), torch.int64).tolist())
    try:
        grid = spec.tile.scales_shape(shape)
    except QlabError as error:
        raise QlabError(f"{path}: {error}") from None
    per_tensor = _strategy(spec.tile) == "tensor"
    (o, k), stored = shape, (1,) if per_tensor else grid
    words = _take(path, tensors, "weight_packed", (o, words_of(k, spec.bits)), torch.int32)
    scales = _take(path, tensors, "weight_scale", stored, spec.scale_dtype)
    if spec.symmetric:
        zeros = None
    elif per_tensor:
        zeros = _take(path, tensors, "weight_zero_point", stored, torch.int8).reshape(grid)
    else:
        packed = _take(path, tensors, "weight_zero_point", (words_of(o, spec.bits), grid[1]), torch.int32)
        zeros = _unpack_zeros(packed, spec.bits, o)
    return QTensor(_signed(unpack(words, spec.bits, k), spec.bits), scales.reshape(grid), zeros, spec)


def _take(path: str, tensors: Mapping[str, Tensor], name: str, shape: tuple, dtype: torch.dtype | None) -> Tensor:
    if f"{path}.{name}" not in tensors:
        raise QlabError(f"{path}.{name} is missing; the file is incomplete or its quantization_config is wrong")
    tensor = tensors[f"{path}.{name}"]
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != (dtype or tensor.dtype):
        raise QlabError(f"{path}.{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype or 'float'} "
                        f"{tuple(shape)}; the file is damaged or its quantization_config is wrong")
    return tensor


# uint8 arithmetic wraps, so one addition moves every signed code to its unsigned one, 8 bits included.
def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return codes.contiguous().view(torch.uint8) + 2 ** (bits - 1)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes - 2 ** (bits - 1)).view(torch.int8)


def _pack_zeros(zeros_og: Tensor, bits: int) -> Tensor:
    return rearrange(pack(_unsigned(rearrange(zeros_og, "o g -> g o"), bits), bits), "g w -> w g").contiguous()


def _unpack_zeros(words_wg: Tensor, bits: int, o: int) -> Tensor:
    return rearrange(_signed(unpack(rearrange(words_wg, "w g -> g w"), bits, o), bits), "g o -> o g").contiguous()


def config(specs: Mapping[str, Spec | None]) -> dict[str, Any]:
    """config.json's quantization_config for a model whose every nn.Linear is in `specs`; None is unquantized.

    Unquantized modules go to `ignore` by full name. One spec: the target is the class Linear. Several: full names, or
    one anchored pattern over the layer numbers where a whole family of modules shares its spec; no module matches two
    groups, so every reader's matching order gives the same answer. Scale dtypes are not written: the tensors say
    them. transformers quantizes nn.Linear only: a Conv1D named here would load at random, so plan without it.
    """
    for path, spec in specs.items():
        if reason := spec and refusal(spec):
            raise QlabError(f"{path}: {reason}")
    quantized = {path: replace(spec, scale_dtype=None) for path, spec in specs.items() if spec}
    if not quantized:
        raise QlabError(f"none of the {len(specs)} modules is quantized; write the model without a quantization_config")
    groups = {spec: [path for path in quantized if quantized[path] == spec] for spec in quantized.values()}
    return {
        "config_groups": {
            f"group_{i}": _group(spec, [LINEAR] if len(groups) == 1 else _targets(paths, quantized))
            for i, (spec, paths) in enumerate(groups.items())
        },
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
    return {
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": spec.tile.cols,
            "num_bits": spec.bits,
            "strategy": _strategy(spec.tile),
            "symmetric": spec.symmetric,
            "type": "int",
        },
    }


def _targets(paths: Iterable[str], quantized: Mapping[str, Spec]) -> list[str]:
    """Patterns for families (paths that differ in layer numbers only) of one spec, full names for the others."""
    families = defaultdict(list)
    for path in quantized:
        families[_pattern(path)].append(path)
    shared = {
        pattern for pattern, family in families.items() if len(family) > 1 and len({quantized[p] for p in family}) == 1
    }
    return sorted({f"re:{_pattern(p)}" if _pattern(p) in shared else p for p in paths})


def _pattern(path: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in path.split(".")) + "$"


def specs(config: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Spec | None]:
    """The spec of each linear module of a model, as compressed-tensors matches it; refuses by name what it cannot read.

    `ignore` wins; then exact names, `re:` patterns (re.match, alphabetically), the class Linear.
    """
    _check_config(config)
    paths = list(paths)
    targets: dict[str, Spec] = {}
    for name, group in config["config_groups"].items():
        spec = _read_group(name, group, config.get("format"))
        targets |= dict.fromkeys(group["targets"], spec)
    if unknown := [t for t in targets if t != LINEAR and not t.startswith("re:") and t not in set(paths)]:
        raise QlabError(f"targets {unknown} are neither linear modules of this model, `re:` patterns nor {LINEAR}")
    ignored, target = _matcher(config.get("ignore") or ()), _matcher(targets)
    return {p: None if ignored(p) or not (match := target(p)) else targets[match] for p in paths}


def _matcher(targets: Collection[str]) -> Callable[[str], str | None]:
    """module path -> the target that compressed-tensors gives precedence, or None."""
    names, patterns = frozenset(targets), sorted(t for t in targets if t.startswith("re:"))
    fallback = LINEAR if LINEAR in names else None

    def match(path: str) -> str | None:
        return path if path in names else next((t for t in patterns if re.match(t[3:], path)), fallback)

    return match


def _check_config(config: Mapping[str, Any]) -> None:
    for key, expected in (("quant_method", METHOD), ("quantization_status", "compressed")):
        if config.get(key) != expected:
            raise QlabError(f"quantization_config has {key} {config.get(key)!r}; qlab reads {expected!r}")
    sparsity = config.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":  # releases before 0.15 write {"format": "dense", ...}
        raise QlabError(f"quantization_config has sparsity_config {sparsity}; qlab reads dense weights only")
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if config.get(key):
            raise QlabError(f"quantization_config has {key} {config[key]}; qlab reads plain weight quantization only")


def _read_group(name: str, group: Any, default_format: str | None) -> Spec:
    if not isinstance(group, Mapping):
        raise QlabError(f"config group {name} is a preset name; write the scheme out as `targets` and `weights`")
    weights = group.get("weights") or {}
    known = {"format": group.get("format") or default_format, "type": weights.get("type", "int"),
             "dynamic": weights.get("dynamic", False)}  # fmt: skip
    expected = {"format": FORMAT, "type": "int", "dynamic": False}
    problems = [f"{k} {v!r} (qlab reads {expected[k]!r})" for k, v in known.items() if v != expected[k]]
    problems += [f"{k} {group[k]!r}" for k in ("input_activations", "output_activations") if group.get(k)]
    problems += [f"actorder {a!r}" for a in [weights.get("actorder")] if a not in (None, False, "weight", "static")]
    problems += [f"unknown key {k!r}" for k in [*(group.keys() - GROUP_KEYS), *(weights.keys() - WEIGHT_KEYS - PROVENANCE_KEYS)]]
    if problems:
        raise QlabError(f"config group {name} has {', '.join(problems)}; read it with the compressed-tensors package")
    return Int(weights.get("num_bits", 8), _tile(name, weights), weights.get("symmetric", True))
