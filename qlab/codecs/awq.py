"""AWQ, version gemm: W[n, k] = scales[g, n] * (q - z) in 4 bits with unsigned q, z; the layout of
AutoAWQ.

    qweight int32 [K, N/8]   word c of a row holds columns 8c + (0, 2, 4, 6, 1, 3, 5, 7), from the
                             low nibble up
    qzeros  int32 [G, N/8]   zero points, the same way and as they are
    scales  float16 or bfloat16 [G, N]

Source: AutoAWQ's gemm.py. Versions gemv, gemv_fast, llm-awq (awq_gemv.py) and marlin order the same
numbers otherwise.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bits import signed, unsigned
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec
from qlab.codecs import checks, dynamic
from qlab.errors import QlabError

BITS, VERSION = (4,), "gemm"
PACKED = {
    VERSION: "int32",
    "gemv": "int32",
    "gemv_fast": "int16",
    "llm-awq": "int16",
}  # version that qlab reads -> its words
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TENSORS = ("qweight", "qzeros", "scales")
CHUNK = 1 << 17  # words at a time: they stay in a core's own cache


def refusal(spec: Spec, online: Collection = ()) -> str | None:
    """Why AWQ cannot hold such a weight, or None when it can."""
    return checks.refusal("AWQ", BITS, spec, online)


def misfit(spec: Spec, shape: torch.Size) -> str | None:
    """Why weights [..., o, k] of this shape do not fit, or None."""
    if shape[-2] % 8:
        return f"{shape[-2]} rows do not fill int32 words, as AWQ needs; write compressed-tensors"
    if shape[-1] % (spec.tile.cols or 1):
        return (
            f"groups of {spec.tile.cols} do not divide {shape[-1]} channels, as AWQ needs; write "
            "gptq"
        )
    return None


def encode(path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.qweight, path.qzeros, path.scales}; zero points of a symmetric leaf
    are 8."""
    checks.check_leaf(path, "AWQ", leaf, refusal(leaf.spec))
    if leaf.perm is not None:
        raise QlabError(
            f"{path}: its channels share groups in an order of their own (perm), which AWQ has no "
            "place for; write gptq_desc_act"
        )
    if reason := misfit(leaf.spec, leaf.shape):
        raise QlabError(f"{path}: {reason}")
    zeros = torch.zeros_like(leaf.scales, dtype=torch.int8) if leaf.zeros is None else leaf.zeros
    tensors = {"qweight": _pack(leaf.codes), "qzeros": _pack(zeros), "scales": leaf.scales.mT}
    return {f"{path}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors, and zero points
    other than 8 where the config says symmetric."""
    if reason := refusal(spec):
        raise QlabError(f"{path}: {reason}")
    assert isinstance(spec, Int)  # refused otherwise
    checks.check_names(path, "AWQ", tensors, TENSORS)
    words = checks.take(path, tensors, "qweight", (None, None), torch.int32)
    k, o = words.shape[0], 8 * words.shape[1]
    if spec.tile.cols and k % spec.tile.cols:
        raise QlabError(
            f"{path}.qweight {tuple(words.shape)} does not hold a weight of {spec}; the file or "
            "its config is wrong"
        )
    groups = k // (spec.tile.cols or k)
    scales = checks.take_spread(
        path, tensors, "scales", (groups, o), *checks.scale_dtypes(spec)
    ).mT.contiguous()
    zeros = _unpack(checks.take_spread(path, tensors, "qzeros", (groups, o // 8), torch.int32))
    if spec.symmetric and not bool((zeros == 0).all()):
        raise QlabError(
            f"{path}.qzeros is not 8 everywhere, as a symmetric file has it; its config must say "
            "zero_point true"
        )
    return QTensor(_unpack(words), scales, None if spec.symmetric else zeros, spec)


def _pack(codes_ok: Tensor) -> Tensor:
    """int8 [o, k] -> int32 [k, o/8]"""
    octets = unsigned(codes_ok, 4).view(-1, 8, codes_ok.shape[1])
    words = torch.zeros(octets.shape[0], octets.shape[2], dtype=torch.int32, device=codes_ok.device)
    some = max(1, CHUNK // octets.shape[2])
    for octet, word in zip(octets.split(some), words.split(some)):
        for nibble, row in enumerate(ORDER):
            word |= octet[:, row].to(torch.int32) << 4 * nibble
    return words.mT


def _unpack(words: Tensor) -> Tensor:
    """int32 [k, o/8] -> int8 [o, k]"""
    words = words.mT.contiguous()
    octets = torch.empty(words.shape[0], 8, words.shape[1], dtype=torch.uint8, device=words.device)
    some = max(1, CHUNK // words.shape[1])
    for octet, word in zip(octets.split(some), words.split(some)):
        for nibble, row in enumerate(ORDER):
            octet[:, row] = word >> 4 * nibble & 15
    return signed(octets.view(-1, words.shape[1]), 4)


def config(specs: Mapping[str, Spec | None]) -> dict[str, Any]:
    """quantization_config of a model whose linears are in `specs`; None is unquantized.

    `zero_point` is true for symmetric weights too, because engines have their fast kernels for it;
    `symmetric`, which they leave unread, says what the zero points are. AWQ has one spec for a
    model. Readers look for the names in `modules_to_not_convert` inside the names of modules, so
    that a name inside a quantized one's is refused.
    """
    for path, spec in specs.items():
        if spec and (reason := refusal(spec)):
            raise QlabError(f"{path}: {reason}")
    quantized = {path: spec for path, spec in specs.items() if isinstance(spec, Int)}
    if not quantized:
        raise QlabError(
            f"none of the {len(specs)} modules is quantized; write the model without a "
            "quantization_config"
        )
    first, spec = next(iter(quantized.items()))
    left = [path for path in specs if path not in quantized]
    for path, other in quantized.items():
        if (other.tile, other.symmetric) != (spec.tile, spec.symmetric):
            raise QlabError(
                f"AWQ has one spec for all modules, and {first} has {spec} where {path} has "
                f"{other}; write gptq"
            )
        if inside := [name for name in left if name in path]:
            raise QlabError(
                f"AWQ cannot leave {inside[0]} unquantized: readers look for parts of names and "
                f"would find it in {path} too; write compressed-tensors"
            )
    return {
        "bits": 4,
        "group_size": spec.tile.cols or -1,
        "modules_to_not_convert": left or None,
        "quant_method": "awq",
        "symmetric": spec.symmetric,
        "version": VERSION,
        "zero_point": True,
    }


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with a qweight among `names`; refuses by name what it cannot
    read."""
    version(config)
    modules, left = (
        checks.modules_with("qweight", names),
        config.get("modules_to_not_convert") or [],
    )
    if not isinstance(left, list) or not all(isinstance(name, str) for name in left):
        raise QlabError(
            f"quantization_config has modules_to_not_convert {left!r:.80}, no list of names"
        )
    for (
        path
    ) in modules:  # whole parts of names: some writers list `gate` beside a quantized gate_proj
        if inside := [name for name in left if f".{name}." in f".{path}."]:
            raise QlabError(
                f"{path} has codes in the files, and {inside[0]!r} in modules_to_not_convert says "
                "that it is not quantized; the file or its config is wrong"
            )
    return {path: _spec(path, dynamic.override(config, path)) for path in modules}


def _spec(path: str, found: Mapping[str, Any]) -> Spec:
    zero_point = found.get("zero_point", True)
    if type(zero_point) is not bool:
        raise QlabError(f"{path} has zero_point {zero_point!r}; it is true or false")
    return checks.read_spec(path, {**found, "sym": found.get("symmetric", not zero_point)}, BITS)


def version(config: Mapping[str, Any]) -> str:
    """The version of AWQ: which numbers the tensors mean. Refuses unknown ones, several at once,
    and words of another width.

    llm-awq is a backend to some writers, beside a version that says nothing then.
    """
    found = {
        str(config[key]).lower()
        for key in ("version", "format", "checkpoint_format")
        if config.get(key) is not None
    }
    if str(config.get("backend")).lower() == "llm-awq":
        found = {"llm-awq"}
    if unread := sorted(found - PACKED.keys()):
        raise QlabError(
            f"quantization_config has AWQ version {unread[0]}; qlab reads {', '.join(PACKED)}"
        )
    if len(found) > 1:
        raise QlabError(
            f"quantization_config has AWQ versions {' and '.join(sorted(found))}; it must name one"
        )
    name = found.pop() if found else VERSION
    if config.get("pack_dtype") not in (None, PACKED[name]):
        raise QlabError(
            f"quantization_config has pack_dtype {config['pack_dtype']!r}; AWQ {name} has "
            f"{PACKED[name]} words"
        )
    return name


def legacy_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config that a quant_config.json stands for: it names two keys otherwise."""
    renamed = {"w_bit": "bits", "q_group_size": "group_size"}
    return {"quant_method": "awq", **{renamed.get(key, key): value for key, value in raw.items()}}
