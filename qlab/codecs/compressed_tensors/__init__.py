"""compressed-tensors: one configuration, and several layouts of tensors. Source: compressed-tensors
0.20.

Layouts: `packed.py` holds integers as bit streams, `plain.py` one code per byte (int-, float- and
naive-quantized, MXFP8), `narrow.py` 4- and 6-bit floats, `sparse.py` 2:4 weights (read only),
`activations.py` the scales of inputs. Configuration: `scheme.py` says how a number grid is written
down, `config.py` which module has which grid. What else happens at run time is read by `cache.py`,
`attentions.py` and `transforms.py`, and written by `at_run_time.py` with `attended.py` and
`rotations.py`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.spec import Spec
from qlab.codecs.around import Around
from qlab.codecs.cache_scales import unsaid
from qlab.codecs.compressed_tensors import at_run_time, narrow, packed, plain, sparse
from qlab.codecs.compressed_tensors.activations import decode_input, encode_input
from qlab.codecs.compressed_tensors.attentions import attentions
from qlab.codecs.compressed_tensors.cache import cache
from qlab.codecs.compressed_tensors.config import DENSE, config, inputs, specs
from qlab.codecs.compressed_tensors.scheme import format_of, refusal
from qlab.codecs.compressed_tensors.tensors import whole_groups
from qlab.codecs.compressed_tensors.transforms import transforms
from qlab.codecs.extra import Extra
from qlab.errors import QlabError

__all__ = [
    "DENSE",
    "around",
    "config",
    "decode",
    "decode_input",
    "encode",
    "extras",
    "inputs",
    "refusal",
    "specs",
]

around = Around(at_run_time.refusal, at_run_time.encode, at_run_time.config)

LAYOUTS = {
    "pack-quantized": packed,
    "int-quantized": plain,
    "float-quantized": plain,
    "naive-quantized": plain,
    "mxfp8-quantized": plain,
    "mxfp4-pack-quantized": narrow,
    "mxfp6-pack-quantized": narrow,
    "nvfp4-pack-quantized": narrow,
}


def encode(path: str, leaf: QTensor, online: Sequence[Op] = ()) -> dict[str, Tensor]:
    """QTensor [o, k] -> the tensors of module `path`, in the layout for its spec and that of its
    inputs.

    online: what happens to the module's input at run time, of which a QuantizeInput lies beside the
    weight.
    """
    reason = refusal(leaf.spec, online)
    if reason:
        raise QlabError(f"{path}: {reason}")
    if len(leaf.shape) != 2:
        raise QlabError(
            f"{path}: compressed-tensors holds one [o, k] weight per module, not "
            f"{tuple(leaf.shape)}; split it"
        )
    if leaf.perm is not None:
        raise QlabError(
            f"{path}: compressed-tensors cannot express the leaf's `perm`; use a codec with g_idx"
        )
    if not whole_groups(leaf.spec, leaf.shape):
        raise QlabError(
            f"{path}: groups of {leaf.spec.tile.cols} do not divide its {leaf.shape[-1]} "
            "channels, as compressed-tensors needs; write gptq"
        )
    rounding = next((op for op in online if isinstance(op, QuantizeInput)), None)
    layout = LAYOUTS[format_of(leaf.spec, rounding.input_spec if rounding else None)]
    tensors = layout.encode(path, leaf)
    return tensors | (encode_input(path, rounding) if rounding else {})


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec | None) -> Leaf:
    """The inverse of encode; refuses missing, misshaped and unexpected tensors of the module.

    A spec of None means a dense weight in the 2:4 layout. Codes may be in that layout too.
    """
    if spec is None:
        return sparse.decode(path, tensors, spec)
    if f"{path}.compressed" in tensors:
        codes = sparse.decode(path, tensors, spec)
        others = sparse.others(path, tensors)
        return plain.decode(path, others | {f"{path}.weight": codes}, spec)
    reason = refusal(spec)
    if reason:
        raise QlabError(f"{path}: {reason}")
    if f"{path}.weight_packed" not in tensors and f"{path}.weight" in tensors:
        return plain.decode(path, tensors, spec)
    return LAYOUTS[format_of(spec)].decode(path, tensors, spec)


def extras(config: Mapping[str, Any], names: Collection[str]) -> tuple[Extra, ...]:
    """What the config says beside weights and inputs."""
    cached, attended = cache(config, names), attentions(config, names)
    extras = [extra for extra in (cached, transforms(config, names), *attended) if extra]
    if cached is None:
        said = {tensor for extra in attended for tensor in extra.tensors}
        extras += unsaid(config, set(names) - said)
    return tuple(extras)
