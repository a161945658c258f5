"""AWQ, version gemm: W[n, k] = scales[g, n] * (q - z) in 4 bits with unsigned q, z; the layout of
AutoAWQ.

    qweight int32 [K, N/8]   word c of a row holds columns 8c + (0, 2, 4, 6, 1, 3, 5, 7), from the
                             low nibble up
    qzeros  int32 [G, N/8]   zero points, the same way and as they are
    scales  float16 or bfloat16 [G, N]

Source: AutoAWQ's gemm.py. The versions gemv, gemv_fast and llm-awq store the same numbers in other
orders (awq_gemv.py); marlin does too, and qlab does not read it.
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
# version that qlab reads -> the dtype of its words
PACKED = {VERSION: "int32", "gemv": "int32", "gemv_fast": "int16", "llm-awq": "int16"}
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
TENSORS = ("qweight", "qzeros", "scales")
CHUNK = 1 << 17  # Words that are packed at a time: they fit into a core's cache.


def refusal(spec: Spec, online: Collection = ()) -> str | None:
    """Why AWQ cannot hold such a weight, or None when it can."""
    return checks.refusal("AWQ", BITS, spec, online)


def misfit(spec: Spec, shape: torch.Size) -> str | None:
    """Why weights [..., o, k] of this shape do not fit, or None."""
    if shape[-2] % 8:
        return f"{shape[-2]} rows do not fill int32 words, as AWQ needs; write compressed-tensors"
    if shape[-1] % (spec.tile.cols or 1):
        return (
            f"groups of {spec.tile.cols} do not divide {shape[-1]} channels, as AWQ needs; "
            "write gptq"
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
    reason = misfit(leaf.spec, leaf.shape)
    if reason:
        raise QlabError(f"{path}: {reason}")
    zeros = torch.zeros_like(leaf.scales, dtype=torch.int8) if leaf.zeros is None else leaf.zeros
    tensors = {"qweight": _pack(leaf.codes), "qzeros": _pack(zeros), "scales": leaf.scales.mT}
    return {f"{path}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors, and zero points
    other than 8 where the config says symmetric."""
    reason = refusal(spec)
    if reason:
        raise QlabError(f"{path}: {reason}")
    assert isinstance(spec, Int)  # refused otherwise
    checks.check_names(path, "AWQ", tensors, TENSORS)
    words = checks.take(path, tensors, "qweight", (None, None), torch.int32)
    k, o = words.shape[0], 8 * words.shape[1]
    if spec.tile.cols and k % spec.tile.cols:
        raise QlabError(
            f"{path}.qweight {tuple(words.shape)} does not hold a weight of {spec}; "
            "the file or its config is wrong"
        )
    groups = k // (spec.tile.cols or k)
    dtypes = checks.scale_dtypes(spec)
    scales = checks.take_spread(path, tensors, "scales", (groups, o), *dtypes).mT.contiguous()
    packed = checks.take_spread(path, tensors, "qzeros", (groups, o // 8), torch.int32)
    zeros = _unpack(packed)
    if spec.symmetric and not bool((zeros == 0).all()):
        raise QlabError(
            f"{path}.qzeros is not 8 everywhere, as a symmetric file has it; "
            "its config must say zero_point true"
        )
    return QTensor(_unpack(words), scales, None if spec.symmetric else zeros, spec)


def _pack(codes_ok: Tensor) -> Tensor:
    """int8 [o, k] -> int32 [k, o/8]"""
    octets = unsigned(codes_ok, 4).view(-1, 8, codes_ok.shape[1])
    words = torch.zeros(octets.shape[0], octets.shape[2], dtype=torch.int32, device=codes_ok.device)
    rows_at_a_time = max(1, CHUNK // octets.shape[2])
    for octet, word in zip(octets.split(rows_at_a_time), words.split(rows_at_a_time)):
        for nibble, row in enumerate(ORDER):
            word |= octet[:, row].to(torch.int32) << 4 * nibble
    return words.mT


def _unpack(words: Tensor) -> Tensor:
    """int32 [k, o/8] -> int8 [o, k]"""
    words = words.mT.contiguous()
    octets = torch.empty(words.shape[0], 8, words.shape[1], dtype=torch.uint8, device=words.device)
    rows_at_a_time = max(1, CHUNK // words.shape[1])
    for octet, word in zip(octets.split(rows_at_a_time), words.split(rows_at_a_time)):
        for nibble, row in enumerate(ORDER):
            octet[:, row] = word >> 4 * nibble & 15
    return signed(octets.view(-1, words.shape[1]), 4)


def config(specs: Mapping[str, Spec | None]) -> dict[str, Any]:
    """quantization_config of a model whose linears are in `specs`; None is unquantized.

    `zero_point` is true for symmetric weights too, because the fast kernels of engines need it;
    `symmetric`, which engines do not read, tells qlab the truth. AWQ has one spec for all modules.
    Readers skip a module if any name in `modules_to_not_convert` is part of its name: such a name
    inside the name of a quantized module is refused.
    """
    checks.refuse_unheld(specs, refusal)
    checks.refuse_unquantized(specs)
    quantized = {path: spec for path, spec in specs.items() if isinstance(spec, Int)}
    unquantized = [path for path in specs if path not in quantized]
    first, spec = next(iter(quantized.items()))
    for path, other in quantized.items():
        if (other.tile, other.symmetric) != (spec.tile, spec.symmetric):
            raise QlabError(
                f"AWQ has one spec for all modules, and {first} has {spec} where {path} has "
                f"{other}; write gptq"
            )
        names_inside = [name for name in unquantized if name in path]
        if names_inside:
            raise QlabError(
                f"AWQ cannot leave {names_inside[0]} unquantized: readers look for parts of names "
                f"and would find it in {path} too; write compressed-tensors"
            )
    return {
        "bits": 4,
        "group_size": spec.tile.cols or -1,
        "modules_to_not_convert": unquantized or None,
        "quant_method": "awq",
        "symmetric": spec.symmetric,
        "version": VERSION,
        "zero_point": True,
    }


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with a qweight among `names`; refuses a config that qlab does not
    read, or that calls such a module unquantized."""
    version(config)
    modules = checks.modules_with("qweight", names)
    unquantized = config.get("modules_to_not_convert") or []
    if not isinstance(unquantized, list) or not all(isinstance(name, str) for name in unquantized):
        raise QlabError(
            f"quantization_config has modules_to_not_convert {unquantized!r:.80}, no list of names"
        )
    for path in modules:
        # Only whole parts of a name count: some writers list `gate` beside a quantized gate_proj.
        names_inside = [name for name in unquantized if f".{name}." in f".{path}."]
        if names_inside:
            raise QlabError(
                f"{path} has codes in the files, and {names_inside[0]!r} in "
                "modules_to_not_convert says that it is not quantized; "
                "the file or its config is wrong"
            )
    return {path: _spec(path, dynamic.override(config, path)) for path in modules}


def _spec(path: str, keys: Mapping[str, Any]) -> Spec:
    """The spec of a module, from the keys that hold for it."""
    zero_point = keys.get("zero_point", True)
    if type(zero_point) is not bool:
        raise QlabError(f"{path} has zero_point {zero_point!r}; it is true or false")
    return checks.read_spec(path, {**keys, "sym": keys.get("symmetric", not zero_point)}, BITS)


def version(config: Mapping[str, Any]) -> str:
    """The version of AWQ that a quantization_config names; it decides what the tensors mean.

    Some writers call llm-awq a backend; their `version` then means nothing. Refuses unknown
    versions, several at once, and words of another width.
    """
    keys = ("version", "format", "checkpoint_format")
    versions = {str(config[key]).lower() for key in keys if config.get(key) is not None}
    if str(config.get("backend")).lower() == "llm-awq":
        versions = {"llm-awq"}
    unread = sorted(versions - PACKED.keys())
    if unread:
        raise QlabError(
            f"quantization_config has AWQ version {unread[0]}; qlab reads {', '.join(PACKED)}"
        )
    if len(versions) > 1:
        raise QlabError(
            f"quantization_config has AWQ versions {' and '.join(sorted(versions))}; "
            "it must name one"
        )
    name = versions.pop() if versions else VERSION
    if config.get("pack_dtype") not in (None, PACKED[name]):
        raise QlabError(
            f"quantization_config has pack_dtype {config['pack_dtype']!r}; "
            f"AWQ {name} has {PACKED[name]} words"
        )
    return name


def legacy_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization_config that a quant_config.json stands for; two of its keys have other
    names."""
    renamed = {"w_bit": "bits", "q_group_size": "group_size"}
    return {"quant_method": "awq", **{renamed.get(key, key): value for key, value in raw.items()}}
