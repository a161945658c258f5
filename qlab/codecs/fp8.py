"""`quant_method: fp8`, read only: blocks of 128x128 as DeepSeek-V3 has them, and scales per tensor
or row, as transformers and vLLM read them. W = weight * scale, also where the scale is called
inverse:

    weight            e4m3 [o, k]
    weight_scale_inv  [ceil(o/r), ceil(k/c)] for blocks of r x c
    weight_scale_inv or weight_scale  [] or [1] per tensor, [o] or [o, 1] per row

Scales are fp32, bfloat16, float16 or powers of two (e8m0, or the bytes of its exponents).

The product rounds its inputs to e4m3 as well. With "activation_scheme" dynamic, every c channels of
a token have a scale (the whole token, where weights have no blocks); with static, one
activation_scale or input_scale per tensor is stored.
Sources: DeepSeek-V3's inference code, transformers 5.23 (FineGrainedFP8).
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import FLOATS, Float, InputSpec, Spec, Tile
from qlab.codecs.checks import bare
from qlab.errors import QlabError

INVERSE, PLAIN = "weight_scale_inv", "weight_scale"
INPUTS = ("activation_scale", "input_scale")
POWERS = (torch.float8_e8m0fnu, torch.uint8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, *POWERS)
KEYS = {
    "quant_method",
    "activation_scheme",
    "weight_block_size",
    "modules_to_not_convert",
    "ignored_layers",
    "modules_to_convert",
    "fmt",
    "scale_fmt",
    "dequantize",
    "expert_dtype",
}
BLOCK, WHOLE = [128, 128], Tile(None, None)


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with scales among `names`; refuses a config that qlab does not
    read."""
    spec = _spec(config, names)
    inverse = [name for name in names if name.endswith("_scale_inv")]
    fused = sorted(name for name in inverse if not name.endswith(f".{INVERSE}"))
    if fused:
        raise QlabError(
            f"{fused[0]} scales fused experts, which qlab reads one by one (experts.0.gate_proj); "
            "split them"
        )
    per_row = Float(*FLOATS["fp8"], Tile(1, None))
    modules: dict[str, Spec] = {}
    for name in names:
        path, _, kind = name.rpartition(".")
        if kind in (INVERSE, PLAIN):
            modules[path] = per_row if spec.tile == WHOLE and _per_row(name, names) else spec
    return modules


def _per_row(name: str, names: Any) -> bool:
    """Whether a tensor holds several scales; False where the headers of files are not at hand."""
    return isinstance(names, Mapping) and torch.Size(names[name].shape).numel() > 1


def inputs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, InputSpec]:
    """How the inputs of every module with scales are rounded at run time."""
    static = _scheme(config) == "static"
    rounded_inputs = {}
    for path, spec in specs(config, names).items():
        tile = WHOLE if static else Tile(1, spec.tile.cols)
        rounded_inputs[path] = InputSpec(Float(*FLOATS["fp8"], tile), static)
    return rounded_inputs


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The weight of module `path` with fp32 or half scales; refuses missing, misshaped and damaged
    tensors."""
    weight = tensors.get(f"{path}.weight")
    is_matrix = weight is not None and weight.ndim == 2 and 0 not in weight.shape
    if weight is None or not is_matrix or weight.dtype != torch.float8_e4m3fn:
        raise QlabError(
            f"{path}.weight is {_described(weight)}, expected a matrix of torch.float8_e4m3fn; "
            "the file is damaged or its quantization_config is wrong"
        )
    grid = spec.tile.scales_shape(weight.shape)
    given = [name for name in (INVERSE, PLAIN) if f"{path}.{name}" in tensors]
    if len(given) != 1:
        raise QlabError(
            f"{path} has {' and '.join(given) or 'no scales'}; "
            f"qlab expects one of {INVERSE} and {PLAIN}"
        )
    scales = _scales(f"{path}.{given[0]}", tensors[f"{path}.{given[0]}"], grid)
    if not weight.float().isfinite().all():
        raise QlabError(f"{path}.weight holds NaN; the file is damaged")
    return QTensor(weight, scales, None, spec)


def decode_input(path: str, tensors: Mapping[str, Tensor], spec: InputSpec) -> QuantizeInput:
    """The operation on the module's input."""
    given = [name for name in INPUTS if f"{path}.{name}" in tensors]
    if len(given) != spec.static:
        raise QlabError(
            f"{path} has {' and '.join(given) or 'no scale for its inputs'} where these are "
            f"{spec}; check the file's quantization_config"
        )
    if not spec.static:
        return QuantizeInput(spec.spec)
    scales = _scales(f"{path}.{given[0]}", tensors[f"{path}.{given[0]}"], (1, 1))
    return QuantizeInput(spec.spec, scales)


def _scales(name: str, stored: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Scales [a, g] as floats. Files hold exponents of two as bytes, and may leave out axes of size
    1."""
    if stored.dtype not in DTYPES or bare(stored.shape) != bare(grid):
        raise QlabError(
            f"{name} is {_described(stored)}, expected torch.float32 {grid}; "
            "the file is damaged or its quantization_config is wrong"
        )
    scales = stored.view(torch.float8_e8m0fnu).float() if stored.dtype in POWERS else stored
    if not (scales.isfinite() & (scales > 0)).all():
        raise QlabError(f"{name} holds NaN, Inf or no positive number; the file is damaged")
    return scales.reshape(grid)


def _described(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _scheme(config: Mapping[str, Any]) -> str:
    """Whether scales of inputs are "dynamic" or "static"."""
    return str(config.get("activation_scheme", "dynamic")).lower()


def _spec(config: Mapping[str, Any], names: Collection[str]) -> Float:
    """The spec that the config states for all weights."""
    # Files with blocks call their scales inverse, and the configs of older ones leave the size out.
    default = BLOCK if any(name.endswith(f".{INVERSE}") for name in names) else None
    return Float(*FLOATS["fp8"], tile_of(config, default))


def tile_of(config: Mapping[str, Any], default: list[int] | None) -> Tile:
    """What a scale covers by the config. default: its weight_block_size where it names none."""
    _check_config(config)
    block = config.get("weight_block_size", default)
    if block is None:
        return WHOLE
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(type(size) is int and 1 < size <= 1 << 20 for size in sizes):
        raise QlabError(
            f"quantization_config has weight_block_size {block!r}; it is [rows, columns] or null"
        )
    return Tile(*block)


def _check_config(config: Mapping[str, Any]) -> None:
    """Refuse keys and values that qlab does not read."""
    unknown = sorted(map(str, config.keys() - KEYS))
    if unknown:
        raise QlabError(
            f"quantization_config has unknown key {unknown[0]!r}; "
            f"of fp8 qlab knows {', '.join(sorted(KEYS))}"
        )
    allowed = {"fmt": ("e4m3",), "scale_fmt": ("float", "ue8m0"), "expert_dtype": ("fp8",)}
    for key, values in allowed.items():
        if config.get(key) not in (None, *values):
            raise QlabError(
                f"quantization_config has {key} {config[key]!r}; qlab reads {' or '.join(values)}"
            )
    if _scheme(config) not in ("dynamic", "static"):
        raise QlabError(
            f"quantization_config has activation_scheme {config['activation_scheme']!r}; "
            "qlab reads dynamic and static"
        )
    if config.get("modules_to_convert"):
        raise QlabError(
            f"quantization_config has modules_to_convert {config['modules_to_convert']}; "
            "qlab reads linears only"
        )
