"""GPTQ: W[n, k] = scales[g, n] * (q - z) with g = g_idx[k] and unsigned q, z; the layout of
AutoGPTQ and GPTQModel.

    qweight int32 [K*b/32, N]   codes, one dense bit stream along K
    qzeros  int32 [G, N*b/32]   zero points, dense along N; version 1 stores z - 1 and version 2
                                stores z
    scales  float16 or bfloat16 [G, N]
    g_idx   int32 [K]           the group of each input channel: k // group_size, unless channels
                                were reordered

Source: GPTQModel 7.6, whose version 1 is AutoGPTQ's.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bits import pack, pack_signed, signed, unpack, unpack_signed, unsigned
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Spec
from qlab.codecs import checks, dynamic
from qlab.errors import QlabError

BITS = (2, 3, 4, 8)
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
# bits -> a word with a 1 in every field. Fields of 3 bits straddle words: they have no such word.
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
# Keys of a config that change the weights in ways which this layout does not hold. All other keys
# are provenance or advice to kernels.
UNREAD = ("adapter", "rotation", "is_marlin_format")


@dataclass(frozen=True)
class Version:
    """A version of the format.

    name: the `checkpoint_format` of configs. offset: what the version subtracts from zero points
    before it stores them. reordered: whether configs say `desc_act`; readers ignore g_idx in files
    whose config does not.
    """

    name: str
    offset: int
    reordered: bool = False

    def __str__(self) -> str:
        return self.name + ("_desc_act" if self.reordered else "")


V1, V2 = Version("gptq", 1), Version("gptq_v2", 0)


def version(config: Mapping[str, Any]) -> Version:
    """The version that a quantization_config names by `checkpoint_format` or `format`; a config
    without these keys is of version 1."""
    formats = (config.get("checkpoint_format"), config.get("format"))
    names = {str(name).lower() for name in formats if name is not None} or {V1.name}
    known = {version.name: version for version in (V1, V2)}
    if len(names) > 1 or not names <= known.keys():
        raise QlabError(
            f"quantization_config has GPTQ format {' and '.join(sorted(names))}; "
            f"qlab reads {' or '.join(known)}"
        )
    desc_act = config.get("desc_act", False)
    if type(desc_act) is not bool:
        raise QlabError(f"quantization_config has desc_act {desc_act!r}; it is true or false")
    return replace(known[names.pop()], reordered=desc_act)


def refusal(spec: Spec, online: Collection = ()) -> str | None:
    """Why GPTQ cannot hold such a weight, or None when it can."""
    return checks.refusal("GPTQ", BITS, spec, online)


def misfit(spec: Spec, shape: torch.Size) -> str | None:
    """Why weights [..., o, k] of this shape do not fit, or None."""
    o, k = shape[-2:]
    if o * spec.bits % 32 or k * spec.bits % 32:
        return (
            f"{o} x {k} codes of {spec.bits} bits do not fill int32 words along both axes, as "
            "GPTQ needs; write compressed-tensors"
        )
    return None


def risk(version: Version, spec: Spec) -> str | None:
    """Why weights that are not yet rounded to this spec may not fit once they are, or None: a zero
    point may become the lowest code, which version 1 cannot store."""
    if version.offset and isinstance(spec, Int) and not spec.symmetric:
        return (
            "GPTQ version 1 stores z - 1 and so no zero point at the lowest code, which rounding "
            f"to {spec} may give; write {replace(V2, reordered=version.reordered)} (--codec)"
        )
    return None


def encode(version: Version, path: str, leaf: QTensor) -> dict[str, Tensor]:
    """QTensor [o, k] -> {path.qweight, path.qzeros, path.scales, path.g_idx}.

    Refuses shapes that do not fill whole words, a perm where the config does not say desc_act, and
    for version 1 a zero point at the lowest code: z - 1 would borrow from the neighbouring fields.
    """
    checks.check_leaf(path, "GPTQ", leaf, refusal(leaf.spec))
    reason = misfit(leaf.spec, leaf.shape)
    if reason:
        raise QlabError(f"{path}: {reason}")
    k, bits = leaf.shape[1], leaf.spec.bits
    inverse = slice(None) if leaf.perm is None else leaf.perm.argsort()
    in_order = _in_order(k, leaf.spec.tile.cols or k)
    g_idx = in_order[inverse]
    if not version.reordered and not torch.equal(g_idx, in_order):
        raise QlabError(
            f"{path}: its channels share groups in an order of their own (perm), which readers of "
            f"{version} drop; write {replace(version, reordered=True)}"
        )
    zeros = _unsigned_zeros(version, path, leaf)
    tensors = {
        "qweight": pack_signed(leaf.codes[:, inverse], bits).mT,
        "qzeros": pack((zeros - version.offset).mT, bits),
        "scales": leaf.scales.mT,
        "g_idx": g_idx,
    }
    return {f"{path}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def _unsigned_zeros(version: Version, path: str, leaf: QTensor) -> Tensor:
    """uint8 zero points [o, g], in the middle for a symmetric leaf; refuses those that the version
    cannot store."""
    bits = leaf.spec.bits
    if leaf.zeros is not None:
        zeros = unsigned(leaf.zeros, bits)
    else:
        zeros = torch.full_like(leaf.scales, 2 ** (bits - 1), dtype=torch.uint8)
    lowest = int((zeros == 0).sum()) if version.offset else 0
    if lowest:
        raise QlabError(
            f"{path}: {lowest} of {zeros.numel()} zero points are the lowest code, which GPTQ "
            "version 1 cannot store (it stores z - 1); "
            f"write {replace(V2, reordered=version.reordered)}"
        )
    return zeros


def _in_order(k: int, cols: int) -> Tensor:
    """g_idx where channels were not reordered: k // group_size."""
    return torch.arange(k, dtype=torch.int32) // cols


def decode(version: Version, path: str, tensors: Mapping[str, Tensor], spec: Spec) -> QTensor:
    """The inverse of encode, but for a perm: within each group it comes back in ascending order.

    Refuses missing, misshaped and unexpected tensors, groups of unequal sizes, and zero points that
    are not in the middle where the config says symmetric.
    """
    reason = refusal(spec)
    if reason:
        raise QlabError(f"{path}: {reason}")
    assert isinstance(spec, Int)  # refused otherwise
    bits = spec.bits
    checks.check_names(path, "GPTQ", tensors, TENSORS)
    words = checks.take(path, tensors, "qweight", (None, None), torch.int32)
    k, o = words.shape[0] * 32 // bits, words.shape[1]
    if words.shape[0] * 32 % bits or o * bits % 32:
        raise QlabError(
            f"{path}.qweight {tuple(words.shape)} does not hold a weight of {spec}; "
            "the file or its config is wrong"
        )
    cols = spec.tile.cols or k
    groups = -(-k // cols)  # the last one may not be full
    dtypes = checks.scale_dtypes(spec)
    scales = checks.take_spread(path, tensors, "scales", (groups, o), *dtypes).mT.contiguous()
    packed = checks.take_spread(path, tensors, "qzeros", (groups, o * bits // 32), torch.int32)
    zeros = _zeros(version, packed, bits, o)
    if spec.symmetric and not bool((zeros == 0).all()):
        raise QlabError(
            f"{path}.qzeros is not {2 ** (bits - 1)} everywhere, as a symmetric {version.name} "
            "file has it; its config names the wrong version, or sym must be false"
        )
    perm = _perm(version, path, tensors, k, cols)
    codes = unpack_signed(words.mT, bits, k)
    return QTensor(
        codes if perm is None else codes[:, perm],
        scales,
        None if spec.symmetric else zeros,
        spec,
        perm=perm,
    )


def _zeros(version: Version, packed: Tensor, bits: int, o: int) -> Tensor:
    """qzeros -> signed zero points [o, g].

    Some writers of version 1 subtracted 1 from every field by one subtraction from the word, and a
    field with z = 0 borrowed from the field above it. One addition to the word undoes that exactly.
    """
    if version.offset and bits in ONES:
        return unpack_signed(packed + ONES[bits], bits, o).mT.contiguous()
    fields = (unpack(packed, bits, o) + version.offset) & (2**bits - 1)
    return signed(fields, bits).mT.contiguous()


def _perm(
    version: Version, path: str, tensors: Mapping[str, Tensor], k: int, cols: int
) -> Tensor | None:
    """The permutation that puts channels of one group side by side, or None where they are."""
    if f"{path}.g_idx" not in tensors and not version.reordered:
        return None
    g_idx = checks.take(path, tensors, "g_idx", (k,), torch.int32)
    in_order = _in_order(k, cols)
    perm = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[perm], in_order):
        raise QlabError(
            f"{path}.g_idx does not give each of {-(-k // cols)} groups {cols} of {k} channels, "
            "but for what is left to the last one; qlab reads groups of one size"
        )
    return None if torch.equal(g_idx, in_order) else perm


def config(version: Version, specs: Mapping[str, Spec | None]) -> dict[str, Any]:
    """quantization_config of a model whose linears are in `specs`; None is unquantized.

    The top level holds the most common spec, and `dynamic` the other modules: one anchored pattern
    for a family (paths that differ in numbers only) whose members agree. Readers leave an lm_head
    unquantized unless `lm_head` is true. GPTQModel refuses version 1 with zero points unless it
    wrote the file itself.
    """
    checks.refuse_unheld(specs, refusal)
    checks.refuse_unquantized(specs)
    keys = {path: _keys(spec) for path, spec in specs.items() if isinstance(spec, Int)}
    [(common, _)] = Counter(keys.values()).most_common(1)
    heads = {path for path in specs if path.rpartition(".")[2] == "lm_head"}
    named = {path: keys.get(path) for path in specs if path in keys or path not in heads}
    return {
        **dict(common),
        "checkpoint_format": version.name,
        "desc_act": version.reordered,
        "dynamic": dynamic.rules(named, common) or None,
        "format": version.name,
        "lm_head": not heads.isdisjoint(keys),
        "meta": {"quantizer": ["qlab"]},
        "method": "gptq",
        "pack_dtype": "int32",
        "quant_method": "gptq",
    }


def _keys(spec: Int) -> dynamic.Keys:
    return ("bits", spec.bits), ("group_size", spec.tile.cols or -1), ("sym", spec.symmetric)


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with a qweight among `names`; refuses a config that qlab does not
    read."""
    return {
        path: _spec(path, dynamic.override(config, path))
        for path in checks.modules_with("qweight", names)
    }


def _spec(path: str, keys: Mapping[str, Any]) -> Spec:
    """The spec of a module, from the keys that hold for it."""
    for key in UNREAD:
        if keys.get(key):
            raise QlabError(
                f"{path} has {key} {keys[key]!r} in quantization_config; "
                "qlab reads plain packed weights only"
            )
    if keys.get("pack_dtype") not in (None, "int32"):
        raise QlabError(
            f"{path} has pack_dtype {keys['pack_dtype']!r} in quantization_config; "
            "qlab reads int32 words"
        )
    return checks.read_spec(path, keys, BITS)
