"""On-disk formats: pure bijections between quantized values and named tensors, one file per
format."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.qtensor import Leaf
from qlab.algebra.spec import InputSpec, Spec
from qlab.codecs import (
    auto_round,
    awq,
    awq_gemv,
    compressed_tensors,
    fp8,
    gguf_blocks,
    gptq,
    hqq,
    torchao,
)
from qlab.codecs.around import Around
from qlab.codecs.cache_scales import unsaid
from qlab.codecs.extra import Extra
from qlab.errors import QlabError

# Every linear module of a model -> the spec of its weight in the files; None is unquantized.
Specs = Mapping[str, Spec | None]


@dataclass(frozen=True)
class Codec:
    """One format. Laws: decode(path, encode(path, q), q.spec) == q, bit for bit;
    specs(config(s), names) == s.

    Tensors:
        encode(path, leaf): the tensors of module `path` for a leaf [o, k].
        decode(path, tensors, spec): the inverse. A spec of None means a dense weight in a layout of
            the format's own.
    Configuration:
        config(specs): config.json's quantization_config.
        specs(config, names): the spec of every quantized module among the tensors `names` of a
            directory's files; refuses a config that qlab does not read.
        extras(config, names): what else a config says. A format holds its own extras word for word,
            and no extras of other formats.
    Limits, each a reason or None, to be asked before any work:
        refusal(spec, online=()): why the format cannot hold such a weight.
        misfit(spec, shape): why weights of this shape [..., o, k] do not fit.
        risk(spec): why weights that are not yet rounded may not fit once they are. It is not asked
            of codes that exist: most of those may fit, and `encode` refuses the others.
    Rounding of inputs at run time, in formats that hold it: `encode` takes the operations as
        `online`, `config` takes path -> InputSpec as `inputs`.
        inputs(config, names): reads the latter, as `specs` does for weights.
        decode_input(path, tensors, spec): the operation on the input of a module.
    around: what else happens at modules at run time, in formats that hold any of it.
    dense: config.json's quantization_config where no weight is quantized and something happens at
        run time, in formats that hold dense weights. A model without either has none.
    Other modules than nn.Linear:
        transposed: whether readers look for codes in linears that hold W as [k, o], too.
        embeddings: whether they look for codes in embeddings; `config` takes the names of these as
            `embeddings`.
    file: whether the format is one file for a whole model, which is made of a directory. Its
        tensors stand for themselves, and its configuration says nothing.
    """

    refusal: Callable[..., str | None]
    encode: Callable[..., dict[str, Tensor]]
    decode: Callable[[str, Mapping[str, Tensor], Any], Leaf]
    config: Callable[..., dict[str, Any]]
    specs: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, Spec | None]]
    inputs: Callable[[Mapping[str, Any], Collection[str]], Mapping[str, InputSpec]] = (
        lambda config, names: {}
    )
    decode_input: Callable[[str, Mapping[str, Tensor], InputSpec], Op] | None = None
    misfit: Callable[[Spec, torch.Size], str | None] = lambda spec, shape: None
    extras: Callable[[Mapping[str, Any], Collection[str]], tuple[Extra, ...]] = unsaid
    risk: Callable[[Spec], str | None] = lambda spec: None
    transposed: bool = False
    embeddings: bool = False
    around: Around | None = None
    dense: Mapping[str, Any] | None = None
    file: bool = False


def quantization_of(
    codec: Codec,
    specs: Specs,
    *inputs: Mapping[str, InputSpec | None],
    around: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """config.json's quantization_config of a model, None where it needs none.

    specs: of every module. inputs: how inputs are rounded, where some are. around: what
    `Codec.around` says beside.
    """
    if any(specs.values()) or codec.dense is None:
        said = codec.config(specs, *inputs)
    elif around:
        said = dict(codec.dense)
    else:
        return None
    return joined(said, around or {})


def joined(said: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says more: keys of their own, and further entries of objects."""
    whole = dict(said)
    for key, value in more.items():
        both = isinstance(value, Mapping) and isinstance(whole.get(key), Mapping)
        whole[key] = {**whole[key], **value} if both else value
    return whole


def _gptq(version: gptq.Version) -> Codec:
    return Codec(
        refusal=gptq.refusal,
        encode=partial(gptq.encode, version),
        decode=partial(gptq.decode, version),
        config=partial(gptq.config, version),
        specs=gptq.specs,
        misfit=gptq.misfit,
        risk=partial(gptq.risk, version),
        transposed=True,
    )


GPTQ_VERSIONS = [
    replace(version, reordered=reordered)
    for version in (gptq.V1, gptq.V2)
    for reordered in (False, True)
]

# The formats that qlab writes, by the name that `--codec` takes.
CODECS: Mapping[str, Codec] = {
    "compressed-tensors": Codec(
        refusal=compressed_tensors.refusal,
        encode=compressed_tensors.encode,
        decode=compressed_tensors.decode,
        config=compressed_tensors.config,
        specs=compressed_tensors.specs,
        inputs=compressed_tensors.inputs,
        decode_input=compressed_tensors.decode_input,
        extras=compressed_tensors.extras,
        embeddings=True,
        around=compressed_tensors.around,
        dense=compressed_tensors.DENSE,
    ),
    # gptq, gptq_v2, and each of them with _desc_act
    **{str(version): _gptq(version) for version in GPTQ_VERSIONS},
    "awq": Codec(
        refusal=awq.refusal,
        encode=awq.encode,
        decode=awq.decode,
        config=awq.config,
        specs=awq.specs,
        misfit=awq.misfit,
    ),
    "gguf": Codec(
        refusal=gguf_blocks.refusal,
        encode=gguf_blocks.encode,
        decode=gguf_blocks.decode,
        config=lambda specs: {},
        specs=lambda config, names: {},
        misfit=gguf_blocks.misfit,
        file=True,
    ),
}


def codec_named(name: str) -> Codec:
    """The codec of that name; refuses unknown names."""
    if name not in CODECS:
        raise QlabError(f"the codec {name!r} is unknown; qlab writes {', '.join(CODECS)}")
    return CODECS[name]


def codec_of_directories(name: str) -> Codec:
    """The codec of that name, whose format is a directory; refuses unknown names, and formats that
    are one file."""
    codec = codec_named(name)
    if codec.file:
        raise QlabError(
            f"{name} is one file, which is made of a quantized directory: write compressed-tensors "
            f"with its numbers, and then `qlab convert DIR --codec {name} --out FILE`"
        )
    return codec


def _read_only(name: str, codec: Any) -> Codec:
    """The codec of a module that reads a format and does not write it."""
    reason = f"qlab reads {name} and does not write it; use compressed-tensors"

    def refuse(*args: Any) -> Any:
        raise QlabError(reason)

    return Codec(
        refusal=lambda spec, online=(): reason,
        encode=refuse,
        decode=codec.decode,
        config=refuse,
        specs=codec.specs,
    )


def _awq(config: Mapping[str, Any]) -> Codec:
    version = awq.version(config)
    if version == awq.VERSION:
        return CODECS["awq"]
    return replace(_read_only(f"AWQ {version}", awq), decode=partial(awq_gemv.decode, version))


# quant_method of a quantization_config -> a function from that config to the codec that reads such
# a directory: variants of a format may give the same tensors other meanings (GPTQ v1 and v2).
READERS: Mapping[str, Callable[[Mapping[str, Any]], Codec]] = {
    "compressed-tensors": lambda config: CODECS["compressed-tensors"],
    "fp8": lambda config: replace(
        _read_only("fp8", fp8), inputs=fp8.inputs, decode_input=fp8.decode_input
    ),
    "gptq": lambda config: CODECS[str(gptq.version(config))],
    "awq": _awq,
    "auto-round": lambda config: replace(CODECS[auto_round.layout(config)], specs=auto_round.specs),
    "hqq": lambda config: _read_only("HQQ", hqq),
    "torchao": lambda config: replace(
        _read_only("torchao's tensors", torchao),
        inputs=torchao.inputs,
        decode_input=torchao.decode_input,
    ),
}

# Older writers put the configuration into a file beside config.json. Its name -> a function from
# its content to the quantization_config that it stands for.
LEGACY_CONFIGS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "quantize_config.json": lambda raw: {"quant_method": "gptq", **raw},
    "quant_config.json": awq.legacy_config,
}


def storable(spec: Spec, codec: str, dtype: torch.dtype) -> Spec:
    """The spec with float16 scales, where the codec stores these and no scales in the dtype of the
    weights; else the spec as it is."""
    if codec not in CODECS or spec.scale_dtype is not None:
        return spec
    refusal = CODECS[codec].refusal
    halves = replace(spec, scale_dtype=torch.float16)
    needs_halves = refusal(replace(spec, scale_dtype=dtype)) and refusal(halves) is None
    return halves if needs_halves else spec


def refusal_of_transposed(codec: str) -> str | None:
    """Why the format has no place for linears that hold W as [k, o] (gpt2's), or None."""
    if CODECS[codec].transposed:
        return None
    return (
        f"{codec} holds nn.Linear weights, and its readers skip other modules without a word; "
        "the codec gptq holds these"
    )


def reader(config: Mapping[str, Any]) -> Codec:
    """The codec for a directory's quantization_config; an unknown quant_method is refused by
    name."""
    method = str(config.get("quant_method"))
    if method not in READERS:
        raise QlabError(
            f"the model is quantized with {method!r}, which qlab does not read; "
            f"it reads {', '.join(READERS)}"
        )
    return READERS[method](config)
