"""On-disk formats: pure bijections between quantized values and named tensors, one file per format."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.codecs import compressed_tensors
from qlab.errors import QlabError
from qlab.qtensor import QTensor
from qlab.spec import Spec

Specs = Mapping[str, Spec | None]  # every linear module of a model -> how its weight is stored; None is unquantized


@dataclass(frozen=True)
class Codec:
    """One format. Law: decode(path, encode(path, q), q.spec) == q, bit for bit; specs(config(s), names) == s.

    refusal(spec, online=()): why the format cannot hold such a weight, or None; ask before any work.
    encode(path, leaf): the tensors of module `path` for a leaf [o, k]. decode(path, tensors, spec): the inverse.
    config(specs): config.json's quantization_config. specs(config, names): the spec of every module that is quantized
    among the tensor `names` of a directory's files; what it cannot read is refused by name.
    """

    refusal: Callable[..., str | None]
    encode: Callable[[str, QTensor], dict[str, Tensor]]
    decode: Callable[[str, Mapping[str, Tensor], Spec], QTensor]
    config: Callable[[Specs], dict[str, Any]]
    specs: Callable[[Mapping[str, Any], Collection[str]], dict[str, Spec]]


CODECS: Mapping[str, Codec] = {  # what qlab writes, by the name that `--codec` takes
    "compressed-tensors": Codec(
        compressed_tensors.refusal,
        compressed_tensors.encode,
        compressed_tensors.decode,
        compressed_tensors.config,
        compressed_tensors.specs,
    ),
}

# quant_method of a quantization_config -> the codec that reads such a directory. A format whose variants differ in what
# the same tensors mean (GPTQ v1 and v2) looks at the rest of the config to choose.
READERS: Mapping[str, Callable[[Mapping[str, Any]], Codec]] = {
    "compressed-tensors": lambda config: CODECS["compressed-tensors"],
}


def storable(spec: Spec, codec: str, dtype: torch.dtype) -> Spec:
    """The spec with scales in the dtype of the weights where the codec stores such scales, else in float16; the spec as it is
    where it cannot store either."""
    if codec in CODECS and spec.scale_dtype is None and CODECS[codec].refusal(replace(spec, scale_dtype=dtype)):
        halves = replace(spec, scale_dtype=torch.float16)
        return halves if CODECS[codec].refusal(halves) is None else spec
    return spec


def reader(config: Mapping[str, Any]) -> Codec:
    """The codec for a directory's quantization_config; an unknown quant_method is refused by name."""
    method = str(config.get("quant_method"))
    if method not in READERS:
        raise QlabError(f"the model is quantized with {method!r}, which qlab does not read; it reads {', '.join(READERS)}")
    return READERS[method](config)
