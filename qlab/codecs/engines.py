"""What inference engines load, as data: for each engine the formats and grids it takes, the safest
first.

Read in vLLM 0.33.0, transformers 5.23.0 with compressed-tensors 0.20, LMDeploy (TurboMind)
1263d5cd8, and for SGLang in its reports alone: what nobody examined is not listed and therefore
refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from qlab.algebra.spec import Float, Int, Spec, Tile, parse_spec
from qlab.errors import QlabError

CHANNEL, TENSOR, BLOCK = Tile(1, None), Tile(None, None), Tile(128, 128)
MARLIN = (
    Tile(1, 32),
    Tile(1, 64),
    Tile(1, 128),
    CHANNEL,
)  # the groups that vLLM's int4 and int8 kernels have


@dataclass(frozen=True)
class Row:
    """Integer weights of these bits, tiles and kinds of zero point in the format of one codec.
    experts: also in mixtures."""

    codec: str
    bits: tuple[int, ...]
    tiles: tuple[Tile, ...]
    symmetric: tuple[bool, ...] = (True,)
    experts: bool = True


@dataclass(frozen=True)
class Floats:
    """Float weights of exactly these specs in the format of one codec."""

    codec: str
    specs: tuple[Spec, ...]
    experts: bool = True


@dataclass(frozen=True)
class Target:
    """rows: what the engine loads, the safest first. uniform: it reads one spec for all weights.
    joins: it makes one weight of those that share an input (q, k and v; gate and up), and one layer
    of a mixture's experts. whole_blocks: 2-D blocks divide the input."""

    rows: tuple[Row | Floats, ...]
    uniform: bool = False
    joins: bool = False
    whole_blocks: bool = False


def _floats(*names: str) -> Floats:
    return Floats("compressed-tensors", tuple(parse_spec(name) for name in names))


CT = "compressed-tensors"
TARGETS: Mapping[str, Target] = {
    "vllm": Target(
        (
            Row(CT, (4, 8), MARLIN),
            Row("awq", (4,), MARLIN, (False, True), experts=False),
            Row(CT, (4, 8), MARLIN, (False,), experts=False),  # in mixtures reported as rejected
            Row("gptq", (4, 8), MARLIN),
            Row(CT, (2, 3, 5, 6, 7), MARLIN, (True, False), experts=False),  # one kernel, for CUDA
            _floats("fp8-channel", "fp8-b128x128", "fp8-tensor", "nvfp4", "mxfp4", "mxfp8"),
        ),
        joins=True,
        whole_blocks=True,
    ),
    "lmdeploy": Target(
        (
            Row(CT, (4,), (Tile(1, 128), Tile(1, 32)), (True, False)),
            Row("awq", (4,), (Tile(1, 128),), (False, True)),
            Row("gptq", (4,), (Tile(1, 128),)),
        ),
        uniform=True,
    ),
    "transformers": Target(
        (
            Row(
                CT, (4, 8, 2, 3, 5, 6, 7, 1), (*MARLIN, Tile(1, 16), Tile(1, 256), TENSOR)
            ),  # zero points stay packed: a shape mismatch
            Row("awq", (4,), MARLIN, (False, True)),
            Row("gptq", (2, 3, 4, 8), MARLIN),
            Row(
                "gptq_v2", (2, 3, 4, 8), MARLIN, (False,)
            ),  # GPTQModel refuses version 1 with zero points of another's making
            _floats("fp8-channel", "fp8-b128x128", "fp8-tensor", "nvfp4", "mxfp4", "mxfp8"),
        )
    ),
    "sglang": Target((Row(CT, (4, 8), MARLIN),)),
}


def target_named(name: str) -> Target:
    """The engine's limits; an unknown engine is refused by name."""
    if name not in TARGETS:
        raise QlabError(
            f"the target {name!r} is unknown; qlab knows the limits of {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def safest_codec(name: str, spec: Spec) -> str:
    """The first codec from whose files the engine loads such weights; where there is none, the
    first of all, so that the refusal that follows names the nearest thing."""
    rows = target_named(name).rows
    return next((row.codec for row in rows if _takes(row, spec, False)), rows[0].codec)


def refusal(
    name: str, codec: str, spec: Spec, experts: bool = False, k: int | None = None
) -> str | None:
    """Why the engine does not load such a weight from this codec's files, with the nearest spec
    that it loads, or None."""
    rows, cols = target_named(name).rows, spec.tile.cols
    if any(row.codec == codec and _takes(row, spec, experts) for row in rows):
        uneven = (
            TARGETS[name].whole_blocks
            and spec.tile.rows not in (None, 1)
            and k
            and cols
            and k % cols
        )
        if not uneven:
            return None
        others = (found for found in _nearest(rows, spec, experts, k) if found[1].tile != spec.tile)
        _, other, held = min(others, key=lambda found: found[0])
        return (
            f"{name} loads {spec} weights where {cols} divides their input channels, of which "
            f"there are {k}; the nearest it loads is {other} with the codec {held}"
        )
    elsewhere = list(dict.fromkeys(row.codec for row in rows if _takes(row, spec, experts)))
    what = f"{spec} {'expert ' * experts}weights in {codec} files"
    if elsewhere:
        return f"{name} loads no {what}; the codec {elsewhere[0]} holds them for it"
    near = min(_nearest(rows, spec, experts, k), default=None, key=lambda found: found[0])
    return f"{name} loads no {what}" + (
        f"; the nearest it loads is {near[1]} with the codec {near[2]}" if near else ""
    )


def uniformity(name: str, specs: Mapping[str, Spec]) -> str | None:
    """Why the engine cannot read weights of several specs, or None."""
    distinct = sorted({str(spec) for spec in specs.values()})
    if target_named(name).uniform and len(distinct) > 1:
        return f"{name} reads one spec for all weights, not {', '.join(distinct)}"
    return None


def division(name: str, specs: Mapping[str, Spec | None]) -> str | None:
    """Why the engine cannot make one weight, or one layer of experts, of the weights of these specs
    (None: unquantized), or None."""
    if not target_named(name).joins or len(set(specs.values())) < 2:
        return None
    distinct = sorted({str(spec or "unquantized") for spec in specs.values()})
    return f"{name} joins these weights and reads one spec for them, not {', '.join(distinct)}"


def _takes(row: Row | Floats, spec: Spec, experts: bool) -> bool:
    if experts and not row.experts:
        return False
    if isinstance(row, Floats):
        return any(_plain(spec) == _plain(known) for known in row.specs)
    whole = isinstance(spec, Int) and spec.zero_dtype == torch.int8
    return (
        whole
        and spec.bits in row.bits
        and spec.tile in row.tiles
        and spec.symmetric in row.symmetric
    )


def _plain(spec: Spec) -> Spec:
    """Without the dtype of scales where the spec leaves it open."""
    return (
        replace(spec, scale_dtype=None)
        if spec.scale_dtype is None or spec.scale_dtype.itemsize > 1
        else spec
    )


def _nearest(
    rows: tuple[Row | Floats, ...], spec: Spec, experts: bool, k: int | None
) -> Iterator[tuple[float, Spec, str]]:
    """Specs that the engine loads, with their codecs and how far they are from this one; groups
    divide `k`."""
    for row in rows:
        if experts and not row.experts:
            continue
        if isinstance(row, Floats):
            yield from (
                (abs(known.bits - spec.bits) + 100 * isinstance(spec, Int), known, row.codec)
                for known in row.specs
            )
            continue
        for tile in row.tiles:
            if k is None or tile.cols is None or k % tile.cols == 0:
                bits = min(row.bits, key=lambda b: (abs(b - spec.bits), -b))
                symmetric = (
                    spec.symmetric if spec.symmetric in row.symmetric else not spec.symmetric
                )
                far = (
                    abs(bits - spec.bits)
                    + 2 * (symmetric != spec.symmetric)
                    + 100 * isinstance(spec, Float)
                )
                yield (
                    far + abs(math.log2((tile.cols or 1024) / (spec.tile.cols or 1024))),
                    Int(bits, tile, symmetric),
                    row.codec,
                )
