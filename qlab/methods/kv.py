"""KV-cache and attention quantization: keys, values and queries are rounded where attention reads
them, behind rotary positions and before they are repeated for the queries that share them.

Rows are tokens and columns the channels of all heads. A scale covers a tensor or a head (static,
measured beforehand), or a token or a group of channels in it (dynamic). Sources: FP8 and INT8 KV
caches of vLLM and compressed-tensors; KIVI (Liu et al. 2024) for scales per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlab.algebra.insert import insert
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Spec, parse_spec
from qlab.algebra.tile import Tile
from qlab.algebra.transform import Transform
from qlab.algebra.wires import Wire
from qlab.errors import QlabError
from qlab.methods.inputs import Range, absmax, rounding, static_form


@dataclass(frozen=True)
class CacheSpec:
    """How cached keys and values are rounded. spec: its tiles lie over [tokens, channels of all
    heads]. per_head: each head has a scale of its own, of a spec whose tile is the whole tensor or
    a token."""

    spec: Spec
    per_head: bool = False

    @property
    def static(self) -> bool:
        """Whether scales are measured beforehand: one that covers all tokens has to be."""
        return self.spec.tile.rows is None

    def of_heads(self, heads: int, channels: int) -> Spec:
        """The spec for so many heads, which have so many channels together."""
        if not self.per_head:
            return self.spec
        return replace(self.spec, tile=Tile(self.spec.tile.rows, channels // heads))

    def __str__(self) -> str:
        text = str(self.spec)
        if not self.per_head:
            return text
        return text.replace("-tensor", "-head").replace("-channel", "-token-head")


def parse_cache_spec(text: str) -> CacheSpec:
    """The cache spec of a name: a spec's name, in which -token is another word for -channel, -head
    stands for a scale of every head, and -token-head for one of every head of a token. Examples:
    fp8-tensor, int8-head, int4-token, int8-token-head, int4-g32.
    """
    text = text.lower()
    of_all = text.replace("-token-head", "-token")
    spec = parse_spec(of_all.replace("-token", "-channel").replace("-head", "-tensor"))
    return cache_spec(spec, per_head="-head" in text)


def cache_spec(spec: Spec, per_head: bool = False) -> CacheSpec:
    """A cache spec that can be run; refuses blocks of several tokens and global scales."""
    if spec.outer or spec.tile.rows not in (None, 1):
        raise QlabError(
            f"keys and values cannot be {spec}; give a scale per tensor, head, token or group of "
            "channels, such as fp8-tensor, int8-head, int8-token or int4-g32"
        )
    return CacheSpec(spec, per_head)


def kv_cache(spec: CacheSpec, static: Range = absmax) -> Transform:
    """Round the keys and values that attention reads, as a quantized cache would hold them.

    The gradient is that of x -> x (straight-through). Blocks without an attention that the program
    shows stay as they are.

    Args:
        spec: The numbers, and what a scale covers: "fp8-tensor" and "int8-head" have static scales,
            "int8-token" and "int4-g32" dynamic ones.
        static: How static scales are measured: a name in RANGES, or a Range.

    Returns:
        A transform of one stage.

    Raises:
        QlabError: A scale would cover several tokens, or groups do not divide the channels of a
            head.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.kv_cache("int8-head")
        >>> stage.name, stage.detail, sorted(stage.needs)
        ('kv_cache', 'int8-head', ['minmax'])
    """
    return _rounded("kv_cache", "key|value", spec, static)


def attention_inputs(spec: CacheSpec, static: Range = absmax) -> Transform:
    """Round the queries, keys and values that attention reads.

    Args:
        spec: See `kv_cache`.
        static: See `kv_cache`.

    Returns:
        A transform of one stage.

    Raises:
        QlabError: See `kv_cache`.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.attention_inputs("int8-token")
        >>> stage.name, stage.detail, sorted(stage.needs)
        ('attention_inputs', 'int8-channel', [])
    """
    return _rounded("attention_inputs", "query|key|value", spec, static)


def _rounded(name: str, kinds: str, spec: CacheSpec, static: Range) -> Transform:
    def make(wire: Wire, stats: Mapping[str, Any]) -> QuantizeInput:
        refuse_split(wire, spec.spec)
        of_wire = spec.of_heads(wire.heads, wire.channels)
        return rounding(of_wire, static if spec.static else None, stats, wire.where)

    needs = static.needs if spec.static else frozenset()
    return insert(name, f"re:.*:({kinds})", make, needs, (_form(spec),), str(spec))


def _form(spec: CacheSpec) -> QuantizeInput:
    """A rounding as a codec is asked about it, of heads of one channel."""
    of_wire = spec.of_heads(1, 1)
    return static_form(of_wire) if spec.static else QuantizeInput(of_wire)


def refuse_split(wire: Wire, spec: Spec) -> None:
    """Refuse groups of channels that reach from one head into the next."""
    width, group = wire.channels // wire.heads, spec.tile.cols
    if group and width % group:
        raise QlabError(
            f"groups of {group} do not divide the {width} channels of a head of {wire.where}; "
            "choose a smaller group, or a scale per token"
        )
