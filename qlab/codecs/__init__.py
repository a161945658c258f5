"""On-disk formats: pure bijections between quantized values and named tensors, one file per format."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from qlab.codecs import compressed_tensors
from qlab.qtensor import QTensor
from qlab.spec import Spec

Specs = Mapping[str, Spec | None]  # every linear module of a model -> how its weight is stored; None is unquantized


@dataclass(frozen=True)
class Codec:
    """One format. Law: decode(path, encode(path, q), q.spec) == q, bit for bit; specs(config(s), s) == s.

    refusal(spec, online=()): why the format cannot hold such a weight, or None; ask before any work.
    encode(path, leaf): the tensors of module `path` for a leaf [o, k]. decode(path, tensors, spec): the inverse.
    config(specs): config.json's quantization_config. specs(config, paths): the inverse, for the linears of a model.
    """

    refusal: Callable[..., str | None]
    encode: Callable[[str, QTensor], dict[str, Tensor]]
    decode: Callable[[str, Mapping[str, Tensor], Spec], QTensor]
    config: Callable[[Specs], dict]
    specs: Callable[..., dict[str, Spec | None]]


CODECS: Mapping[str, Codec] = {
    "compressed-tensors": Codec(
        compressed_tensors.refusal,
        compressed_tensors.encode,
        compressed_tensors.decode,
        compressed_tensors.config,
        compressed_tensors.specs,
    ),
}
