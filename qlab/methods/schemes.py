"""Schemes: which numbers a model is made of. A method says how weights become such numbers, so that
any method fills any scheme.

A scheme says what weights are rounded to, what inputs of linears and cached keys and values are
rounded to at run time, and which zeros weights have. Names are those of llm-compressor's presets
where it has one (compressed-tensors 0.20), and mean the same codes.

    W4A16_ASYM    4-bit integers with zero points, 16-bit inputs
    W8A8          8-bit integers, a scale per row; inputs too, a scale per token from each input
    W8A8_STATIC   the same with one scale per input, measured beforehand
    W4A16_2:4     two of every four neighbouring weights are 0
    KV_INT8_HEAD  keys and values alone, a stored scale per head
    W4A16-g64     groups of 64 in the place of 128
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from qlab.algebra.bind import Bind, uses_data
from qlab.algebra.spec import InputSpec, Int, Spec, Tile, parse_input_spec, parse_spec
from qlab.algebra.transform import Stage, Transform, chain
from qlab.algebra.views import OnWires, PlainCache
from qlab.algebra.wires import nearest
from qlab.errors import QlabError
from qlab.methods import PRUNERS
from qlab.methods.inputs import RANGES, Range, quantize_inputs
from qlab.methods.kv import CacheSpec, kv_cache, parse_cache_spec
from qlab.methods.magnitude import magnitude
from qlab.methods.names import method_named
from qlab.methods.sparsegpt import sparsegpt

Method = Callable[[Spec], Transform]
LARGE = torch.Size((8192, 8192))  # a weight whose scales are few


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Which numbers a model is made of.

    Args:
        name: As `qlab.scheme` takes it.
        weights: What weights are rounded to; None of a scheme of the cache alone.
        inputs: How inputs of linears are rounded at run time; None leaves them as they are.
        cache: How cached keys and values are rounded; None leaves them as they are.
        sparsity: Which weights are 0, such as "2:4"; None for no such rule.

    Example:
        >>> import qlab
        >>> w4a8 = qlab.scheme("W4A8-g64")
        >>> str(w4a8.weights), str(w4a8.inputs), w4a8.bits_per_weight
        ('int4-g64', 'int8-channel', 4.25)
        >>> recipe = qlab.chain(qlab.smoothquant(), w4a8.recipe("gptq"))
        >>> [stage.name for stage in recipe]
        ['smoothquant', 'absorb', 'gptq', 'quantize_inputs']
    """

    name: str
    weights: Spec | None = None
    inputs: InputSpec | None = None
    cache: CacheSpec | None = None
    sparsity: str | None = None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight of a large weight with 16-bit scales, zeros included."""
        if self.weights is None:
            return None
        return self.weights.bits_per_weight(LARGE, torch.bfloat16)

    @property
    def static(self) -> bool:
        """Whether a scale is measured on calibration data, of inputs or of the cache."""
        of_inputs = self.inputs is not None and self.inputs.static
        return of_inputs or (self.cache is not None and self.cache.static)

    def recipe(self, method: Method | str = "rtn", static: Range | str = "absmax") -> Transform:
        """All parts: `filled`, `on_inputs` and `on_cache`.

        Args:
            method: How weights become numbers of the scheme: a name such as "gptq" or
                "smoothquant+rtn", or a function of a spec. A scheme of the cache alone needs none.
            static: How scales that are stored are measured: a name in `qlab.RANGES`, or a Range.

        Returns:
            The transform.

        Raises:
            QlabError: The method prunes in another pattern than the scheme.
        """
        return chain(self.filled(method), self.on_inputs(static), self.on_cache(static))

    def filled(self, method: Method | str = "rtn") -> Transform:
        """Weights rounded by the method, and before that pruned where the scheme is sparse: by a
        mask of the method's own, else by SparseGPT, or by magnitude where it uses no data."""
        if self.weights is None:
            return ()
        fill = method_named(method) if isinstance(method, str) else method
        filled = fill(self.weights)
        if not any(stage.spec or isinstance(stage, Bind) for stage in filled):
            raise QlabError(
                f"the method of {self.name} rounds no weights; name one that does, such as rtn or "
                "gptq"
            )
        return self._pruned(filled)

    def on_inputs(self, static: Range | str = "absmax") -> Transform:
        """Inputs rounded at run time."""
        if self.inputs is None:
            return ()
        measured = range_named(static) if self.inputs.static else None
        return quantize_inputs(self.inputs.spec, measured)

    def on_cache(self, static: Range | str = "absmax") -> Transform:
        """Cached keys and values rounded. Blocks that hold no keys and values are refused."""
        return () if self.cache is None else plain_cache(self.cache, range_named(static))

    def _pruned(self, filled: Transform) -> Transform:
        if self.sparsity is None:
            return filled
        masks = [stage for stage in filled if stage.name in PRUNERS]
        others = [m for m in masks if not m.detail.startswith(f"pattern {self.sparsity}")]
        if others:
            raise QlabError(
                f"{self.name} keeps {self.sparsity} and {others[0].name} has the "
                f"{others[0].detail}; leave the mask to the scheme, or name a scheme without one"
            )
        if masks:
            return filled
        mask = sparsegpt if uses_data(filled) else magnitude
        turned = _turned(filled)
        return chain(filled[:turned], mask(self.sparsity), filled[turned:])

    def __str__(self) -> str:
        return self.name


def _turned(filled: Transform) -> int:
    """How many stages change the basis before weights are rounded: zeros come behind them."""
    rounds = next((i for i, stage in enumerate(filled) if stage.spec), 0)
    turning = [i for i in range(rounds) if _turns(filled[i])]
    return turning[-1] + 1 if turning else 0


def _turns(stage: Stage) -> bool:
    return isinstance(stage, Bind) or stage.view.keeps_function


def range_named(name: Range | str) -> Range:
    """How a stored scale is measured: one of RANGES by its name, or a Range as it is."""
    if isinstance(name, Range):
        return name
    if name.lower() not in RANGES:
        raise QlabError(f"{name!r:.40} measures no scale; qlab knows {', '.join(RANGES)}")
    return RANGES[name.lower()]


def plain_cache(spec: CacheSpec, static: Range) -> Transform:
    """`kv_cache` of models all of whose blocks cache keys and values as attention reads them."""
    (stage,) = kv_cache(spec, static)
    assert isinstance(stage.view, OnWires)  # as every insert has it
    return (replace(stage, view=PlainCache(stage.view.pattern, stage.view.left, spec.static)),)


def _scheme(
    name: str, weights: str, inputs: str | None = None, sparsity: str | None = None
) -> Scheme:
    return Scheme(
        name=name,
        weights=parse_spec(weights),
        inputs=parse_input_spec(inputs) if inputs else None,
        sparsity=sparsity,
    )


def _of_cache(numbers: str, covers: str) -> Scheme:
    """A cache with a scale for a tensor, a head, or each token of a head."""
    scale = "token-head" if covers == "token" else covers
    name = f"KV_{numbers}_{covers}".upper()
    return Scheme(name=name, cache=parse_cache_spec(f"{numbers}-{scale}"))


# One line for each scheme.
_ALL = (
    _scheme("W4A16", "int4-g128"),
    _scheme("W4A16_ASYM", "int4-g128-asym"),
    *(_scheme(f"W{bits}A16", f"int{bits}-g128") for bits in (2, 3, 5, 6, 8)),
    _scheme("W8A8", "int8-channel", "int8-token"),
    _scheme("W8A8_STATIC", "int8-channel", "int8-tensor static"),
    _scheme("FP8", "fp8-tensor", "fp8-tensor static"),
    _scheme("FP8_DYNAMIC", "fp8-channel", "fp8-token"),
    _scheme("FP8_BLOCK", "fp8-b128x128", "fp8-g128"),
    _scheme("W4A8", "int4-g128", "int8-token"),
    _scheme("W4AFP8", "int4-g128", "fp8-token"),
    _scheme("NVFP4", "nvfp4", "nvfp4 static"),
    _scheme("NVFP4A16", "nvfp4"),
    _scheme("MXFP4", "mxfp4", "mxfp4"),
    _scheme("MXFP4A16", "mxfp4"),
    _scheme("MXFP8", "mxfp8", "mxfp8"),
    _scheme("W4A4", "int4-g128", "int4-token"),
    _scheme("W4A16_2:4", "int4-g128", sparsity="2:4"),
    _scheme("W8A8_2:4", "int8-channel", "int8-token", "2:4"),
    _scheme("FP8_2:4", "fp8-tensor", "fp8-tensor static", "2:4"),
    *(
        _of_cache(numbers, covers)
        for numbers in ("fp8", "int8", "int4")
        for covers in ("tensor", "head", "token")
    ),
)
SCHEMES: Mapping[str, Scheme] = {each.name: each for each in _ALL}


def scheme(name: str) -> Scheme:
    """A scheme by its name: which numbers weights, inputs and cache are rounded to.

    Args:
        name: One of `qlab.schemes()`, in upper or lower case. Behind a scheme of integers in groups
            may stand another size of groups: "W4A16-g64".

    Returns:
        The scheme, whose `recipe` is a transform that composes with others.

    Raises:
        QlabError: The name is unknown, or a size of groups is given to a scheme that has none of
            its own; with the nearest names.

    Source:
        llm-compressor's presets (compressed-tensors 0.20, quantization/quant_scheme.py).

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.scheme("W8A8").recipe("rtn")]
        ['rtn', 'quantize_inputs']
        >>> qlab.scheme("W4A17")
        Traceback (most recent call last):
        qlab.errors.QlabError: the scheme 'W4A17' is unknown; the nearest are W4A16, ...
    """
    text = name.upper()
    if text in SCHEMES:
        return SCHEMES[text]
    base, _, group = text.partition("-G")
    is_size = group.isascii() and group.isdecimal() and 0 < len(group) < 10 and group[0] != "0"
    if base in SCHEMES and is_size:
        return _in_groups(SCHEMES[base], int(group))
    raise QlabError(
        f"the scheme {name[:40]!r} is unknown; {nearest(text, SCHEMES)} (`qlab schemes` lists all)"
    )


def _in_groups(base: Scheme, group: int) -> Scheme:
    """The scheme with groups of another size."""
    spec = base.weights
    if not isinstance(spec, Int) or spec.tile.cols is None:
        raise QlabError(
            f"{base.name}-g{group} gives a size to groups, and {base.name} has none of its own "
            f"({spec or base.cache}); write {base.name}"
        )
    return replace(base, name=f"{base.name}-g{group}", weights=replace(spec, tile=Tile(1, group)))
