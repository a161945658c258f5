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
from qlab.codecs import auto_round, awq, awq_gemv, compressed_tensors, fp8, gptq, hqq, torchao
from qlab.codecs.cache_scales import unsaid
from qlab.codecs.extra import Extra
from qlab.errors import QlabError

Specs = Mapping[
    str, Spec | None
]  # every linear module of a model -> how its weight is stored; None is unquantized


@dataclass(frozen=True)
class Codec:
    """One format. Law: decode(path, encode(path, q), q.spec) == q, bit for bit; specs(config(s),
    names) == s.

    refusal(spec, online=()): why the format cannot hold such a weight, or None; ask before any
    work.
    encode(path, leaf): the tensors of module `path` for a leaf [o, k]. decode(path, tensors, spec):
    the inverse. config(specs): config.json's quantization_config. specs(config, names): the spec of
    every module that is quantized among the tensor `names` of a directory's files; what it cannot
    read is refused by name. A spec of None is a dense weight in a layout of the format's own.

    misfit(spec, shape): why weights of this shape [..., o, k] do not fit, or None; also before any
    work.
    risk(spec): why weights that are still to be rounded may not fit once they are, or None: before
    any work that rounds, which would end in an error of `encode`. Codes that are there already are
    only asked by `encode`, since most of them may fit.

    Formats that round inputs at run time take those operations as a further argument of `encode`
    (online) and how they round as one of `config` (inputs: path -> InputSpec), and read both:
    inputs(config, names) like specs, decode_input(path, tensors, spec) the operation.
    extras(config, names): what else a directory's config says; a format holds its own extras word
    for word, and no others. transposed: whether readers look for codes in linears that hold W as
    [k, o], too. embeddings: whether they look for codes in embeddings, whose names are a further
    argument of `config`.
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

CODECS: Mapping[str, Codec] = {  # what qlab writes, by the name that `--codec` takes
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
    ),
    **{
        str(version): _gptq(version) for version in GPTQ_VERSIONS
    },  # gptq, gptq_v2, and either with _desc_act
    "awq": Codec(
        refusal=awq.refusal,
        encode=awq.encode,
        decode=awq.decode,
        config=awq.config,
        specs=awq.specs,
        misfit=awq.misfit,
    ),
}


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


# quant_method of a quantization_config -> the codec that reads such a directory. A format whose
# variants differ in what the same tensors mean (GPTQ v1 and v2) looks at the rest of the config to
# choose.
READERS: Mapping[str, Callable[[Mapping[str, Any]], Codec]] = {
    "compressed-tensors": lambda config: CODECS["compressed-tensors"],
    "fp8": lambda config: replace(
        _read_only("fp8", fp8), inputs=fp8.inputs, decode_input=fp8.decode_input
    ),
    "gptq": lambda config: CODECS[str(gptq.version(config))],
    "awq": _awq,
    "auto-round": lambda config: replace(CODECS[auto_round.layout(config)], specs=auto_round.specs),
    "hqq": lambda config: _read_only("HQQ", hqq),
    "torchao": lambda config: _read_only("torchao's tensors", torchao),
}

# A file beside a config.json without a quantization_config -> what such a config would say; older
# writers made these.
LEGACY_CONFIGS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "quantize_config.json": lambda raw: {"quant_method": "gptq", **raw},
    "quant_config.json": awq.legacy_config,
}


def storable(spec: Spec, codec: str, dtype: torch.dtype) -> Spec:
    """The spec with scales in the dtype of the weights where the codec stores such scales, else in
    float16; the spec as it is where it cannot store either."""
    if (
        codec in CODECS
        and spec.scale_dtype is None
        and CODECS[codec].refusal(replace(spec, scale_dtype=dtype))
    ):
        halves = replace(spec, scale_dtype=torch.float16)
        return halves if CODECS[codec].refusal(halves) is None else spec
    return spec


def refusal_of_transposed(codec: str) -> str | None:
    """Why the format has no place for linears that hold W as [k, o] (gpt2's), or None."""
    if CODECS[codec].transposed:
        return None
    return (
        f"{codec} holds nn.Linear weights, and its readers skip other modules without a word; the "
        "codec gptq holds these"
    )


def reader(config: Mapping[str, Any]) -> Codec:
    """The codec for a directory's quantization_config; an unknown quant_method is refused by
    name."""
    method = str(config.get("quant_method"))
    if method not in READERS:
        raise QlabError(
            f"the model is quantized with {method!r}, which qlab does not read; it reads "
            f"{', '.join(READERS)}"
        )
    return READERS[method](config)
