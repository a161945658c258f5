"""What inference engines load, as data: for each engine the formats and grids that it takes, the
safest first.

Sources: the loaders of vLLM 0.33.0, transformers 5.23.0 with compressed-tensors 0.20, LMDeploy
0.18.0 (both of its engines) and SGLang 0.5.23. A combination that nobody examined is not listed,
and is therefore refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from qlab.algebra.spec import Float, InputSpec, Int, Spec, Tile, parse_input_spec, parse_spec
from qlab.codecs import architectures
from qlab.codecs.around import Rows
from qlab.errors import QlabError

CHANNEL, TENSOR, BLOCK = Tile(1, None), Tile(None, None), Tile(128, 128)
# What one scale covers in vLLM's int4 and int8 kernels.
MARLIN = (Tile(1, 32), Tile(1, 64), Tile(1, 128), CHANNEL)


@dataclass(frozen=True)
class Row:
    """Integer weights that an engine loads from the files of one codec, by bits, by what one scale
    covers, and by symmetry. experts: also in mixtures. linears: also outside of them."""

    codec: str
    bits: tuple[int, ...]
    tiles: tuple[Tile, ...]
    symmetric: tuple[bool, ...] = (True,)
    experts: bool = True
    linears: bool = True


@dataclass(frozen=True)
class Floats:
    """Float weights that an engine loads from the files of one codec: exactly these specs."""

    codec: str
    specs: tuple[Spec, ...]
    experts: bool = True


@dataclass(frozen=True)
class Beside:
    """Inputs that an engine rounds at run time, beside weights of these specs. widths, tiles: of
    symmetric integers. floats: the names of other specs. inputs: the names of the input specs."""

    inputs: tuple[str, ...]
    widths: tuple[int, ...] = ()
    tiles: tuple[Tile, ...] = ()
    floats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """What an engine loads.

    rows: the weights, the safest first. uniform: whether all weights of a model must have one spec.
    joins: whether the engine makes one weight of those that share an input (q, k and v; gate and
    up), and one layer of a mixture's experts. whole_blocks: whether 2-D blocks must divide the
    input channels. turns: the places (`codecs.around`) at which it multiplies with matrices at run
    time. caches: how it rounds keys and values, as (type, bits, what a static scale covers).
    rounds: the inputs that it rounds, all of them in compressed-tensors' files; None for every one
    that the format holds. builds: the architectures of config.json that it builds; empty where they
    were not listed.
    """

    rows: tuple[Row | Floats, ...]
    uniform: bool = False
    joins: bool = False
    whole_blocks: bool = False
    turns: tuple[str, ...] = ()
    caches: tuple[tuple[str, int, str], ...] = ()
    rounds: tuple[Beside, ...] | None = ()
    builds: tuple[str, ...] = ()


def _floats(*names: str) -> Floats:
    return Floats("compressed-tensors", tuple(parse_spec(name) for name in names))


CT = "compressed-tensors"
CACHES = {"tensor": "fp8-tensor", "attn_head": "fp8-head"}  # what a scale covers -> the cache
FP8 = ("fp8-token", "fp8-tensor", "fp8-tensor static")
VLLM_ROUNDS = (
    Beside(("int8-token", "int8-tensor static"), (8,), (CHANNEL, TENSOR)),
    # from packed codes, by a kernel for CUDA
    Beside(("int8-token", "int4-token"), (2, 3, 4, 5, 6, 7), MARLIN),
    Beside(("fp8-token",), (4,), (Tile(1, 128),)),  # on compute capability 9.0 alone
    Beside(FP8, floats=("fp8-tensor", "fp8-channel")),
    Beside(("fp8-g128",), floats=("fp8-b128x128",)),
    Beside(("nvfp4 static",), floats=("nvfp4",)),
    Beside(("mxfp4", "fp8-g128"), floats=("mxfp4",)),
    Beside(("mxfp8",), floats=("mxfp8",)),
)
# It reads group_0 of compressed-tensors alone, and refuses groups of 64.
TURBOMIND = Target(
    (
        Row(CT, (4,), (Tile(1, 128), Tile(1, 32)), (True, False)),
        Row("awq", (4,), (Tile(1, 128),), (False, True)),
        Row("gptq", (4,), (Tile(1, 128),)),
    ),
    uniform=True,
    builds=architectures.TURBOMIND,
)
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
        turns=("input", "output"),
        caches=(("float", 8, "tensor"), ("float", 8, "attn_head")),
        rounds=VLLM_ROUNDS,
    ),
    "lmdeploy": TURBOMIND,  # the engine that it takes where nobody names one
    "lmdeploy-turbomind": TURBOMIND,
    "lmdeploy-pytorch": Target(
        (
            Row("awq", (4,), (Tile(1, 128),), (False, True), experts=False),
            Row(CT, (4,), (Tile(1, 32),), linears=False),
        ),
        uniform=True,
        builds=architectures.PYTORCH,
    ),
    "transformers": Target(
        (
            # Symmetric only: transformers does not unpack zero points, and their shapes mismatch.
            Row(CT, (4, 8, 2, 3, 5, 6, 7, 1), (*MARLIN, Tile(1, 16), Tile(1, 256), TENSOR)),
            Row("awq", (4,), MARLIN, (False, True)),
            Row("gptq", (2, 3, 4, 8), MARLIN),
            # GPTQModel refuses zero points of version 1 unless it wrote the file itself.
            Row("gptq_v2", (2, 3, 4, 8), MARLIN, (False,)),
            _floats("fp8-channel", "fp8-b128x128", "fp8-tensor", "nvfp4", "mxfp4", "mxfp8"),
        ),
        rounds=None,  # by compressed-tensors itself
    ),
    "sglang": Target(
        (
            Row(CT, (4, 8), MARLIN),
            Row(CT, (4, 8), MARLIN, (False,), experts=False),
        ),
        caches=(("float", 8, "tensor"),),  # others it leaves out with a line in its log
    ),
}


def target_named(name: str) -> Target:
    """The limits of an engine; refuses an unknown one."""
    if name not in TARGETS:
        raise QlabError(
            f"the target {name!r} is unknown; qlab knows the limits of {', '.join(TARGETS)}"
        )
    return TARGETS[name]


def refusal_of_architectures(name: str, named: object) -> str | None:
    """Why the engine does not build a model of which config.json says these `architectures`, or
    None. One that says none is not known to be refused."""
    built = target_named(name).builds
    if not built or not isinstance(named, list) or not named or named[0] in built:
        return None
    others = [other for other, target in TARGETS.items() if named[0] in target.builds]
    hint = f"{others[0]} does" if others else "choose another engine"
    return f"{name} builds no {named[0]}; {hint}"


def safest_codec(name: str, spec: Spec) -> str:
    """The first codec from whose files the engine loads such weights. If there is none, the
    engine's first codec, so that the refusal that follows names the nearest spec."""
    rows = target_named(name).rows
    return next((row.codec for row in rows if _takes(row, spec, False)), rows[0].codec)


def refusal(
    name: str, codec: str, spec: Spec, experts: bool = False, k: int | None = None
) -> str | None:
    """Why the engine does not load such a weight from this codec's files, with the nearest spec
    that it loads, or None. k: its input channels, where they are known."""
    rows = target_named(name).rows
    codecs = [row.codec for row in rows if _takes(row, spec, experts)]
    if codec in codecs:
        return _refusal_of_blocks(name, spec, experts, k)
    loads_no = f"{name} loads no {spec} {'expert ' * experts}weights in {codec} files"
    if codecs:
        return f"{loads_no}; the codec {codecs[0]} holds them for it"
    nearest = min(_loaded(rows, spec, experts, k), default=None, key=_distance)
    if nearest is None:
        return loads_no
    return f"{loads_no}; the nearest it loads is {nearest.spec} with the codec {nearest.codec}"


def refusal_of_inputs(
    name: str, spec: Spec, inputs: InputSpec, experts: bool = False
) -> str | None:
    """Why the engine does not round the inputs of such weights so at run time, or None. Stored
    scales of the inputs of experts are NVFP4's alone: vLLM's int8 experts take none, and its fp8
    experts take them beside weights with one scale for a tensor."""
    rounds = target_named(name).rounds
    if rounds is None:
        return None
    if experts and inputs.static and not inputs.spec.outer:
        return (
            f"{name} rounds inputs of experts by a stored scale in NVFP4 alone, and not to "
            f"{inputs}; use {inputs.spec} without static, or leave experts out"
        )
    taken = [text for beside in rounds if _is_beside(beside, spec) for text in beside.inputs]
    if inputs in [parse_input_spec(text) for text in taken]:
        return None
    others = f"{', '.join(taken)}, or 16-bit inputs" if taken else "16-bit inputs alone"
    return f"{name} rounds no inputs to {inputs} beside {spec} weights; it takes {others}"


def _is_beside(beside: Beside, spec: Spec) -> bool:
    if isinstance(spec, Float):
        return any(_plain(spec) == _plain(parse_spec(text)) for text in beside.floats)
    return spec.symmetric and spec.bits in beside.widths and spec.tile in beside.tiles


def _refusal_of_blocks(name: str, spec: Spec, experts: bool, k: int | None) -> str | None:
    """Why the engine does not load 2-D blocks that do not divide the input channels, or None."""
    target, cols = TARGETS[name], spec.tile.cols
    in_blocks = spec.tile.rows not in (None, 1)
    if not (target.whole_blocks and in_blocks and k and cols and k % cols):
        return None
    loaded = _loaded(target.rows, spec, experts, k)
    nearest = min((near for near in loaded if near.spec.tile != spec.tile), key=_distance)
    return (
        f"{name} loads {spec} weights where {cols} divides their input channels, of which there "
        f"are {k}; the nearest it loads is {nearest.spec} with the codec {nearest.codec}"
    )


def uniformity(name: str, specs: Mapping[str, Spec]) -> str | None:
    """Why the engine cannot read weights of several specs, or None."""
    distinct = sorted({str(spec) for spec in specs.values()})
    if target_named(name).uniform and len(distinct) > 1:
        return f"{name} reads one spec for all weights, not {', '.join(distinct)}"
    return None


def refusal_at_run_time(name: str, rows: Rows) -> str | None:
    """Why the engine does not do what happens at run time at modules (`codecs.around`), or None."""
    target = target_named(name)
    at = [(place, step) for places in rows.values() for place in places for step in places[place]]
    turned = sorted({place for place, step in at if "rotated" in step}.difference(target.turns))
    if turned:
        return f"{name} turns no {turned[0]} at run time; choose a target that does, or none"
    for args in (step["rounded"] for _, step in at if "rounded" in step):
        kind = (args["type"], args["num_bits"], args["strategy"])
        if args["dynamic"] or kind not in target.caches:
            names = " or ".join(CACHES[strategy] for _, _, strategy in target.caches)
            return (
                f"{name} caches keys and values as {names or 'they are'} alone; choose "
                f"{'one of these' if names else 'another target'}, or leave the cache out"
            )
    if any("rounded" in step for place, step in at if place == "query"):
        return f"{name} rounds no queries; use kv_cache, or leave attention_inputs out"
    return None


def division(name: str, specs: Mapping[str, Spec | None]) -> str | None:
    """Why the engine cannot join weights of these specs (None: unquantized) into one weight, or
    into one layer of experts, or None."""
    if not target_named(name).joins or len(set(specs.values())) < 2:
        return None
    distinct = sorted({str(spec or "unquantized") for spec in specs.values()})
    return f"{name} joins these weights and reads one spec for them, not {', '.join(distinct)}"


def _is_for(row: Row | Floats, experts: bool) -> bool:
    """Whether a row is of experts, or of other weights."""
    return row.experts if experts else isinstance(row, Floats) or row.linears


def _takes(row: Row | Floats, spec: Spec, experts: bool) -> bool:
    if not _is_for(row, experts):
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
    """The spec without a dtype of scales, unless that is part of the grid."""
    if spec.scale_dtype is not None and spec.scale_dtype.itemsize == 1:
        return spec
    return replace(spec, scale_dtype=None)


@dataclass(frozen=True)
class _Loaded:
    """A spec that an engine loads from a codec's files, and its distance from the wanted spec."""

    spec: Spec
    codec: str
    distance: float


def _distance(loaded: _Loaded) -> float:
    return loaded.distance


def _loaded(
    rows: tuple[Row | Floats, ...], spec: Spec, experts: bool, k: int | None
) -> Iterator[_Loaded]:
    """What the engine loads for weights of k input channels, with the distance from `spec`."""
    for row in rows:
        if not _is_for(row, experts):
            continue
        if isinstance(row, Floats):
            for known in row.specs:
                distance = abs(known.bits - spec.bits) + 100 * isinstance(spec, Int)
                yield _Loaded(known, row.codec, distance)
            continue
        for tile in row.tiles:
            if k is None or tile.cols is None or k % tile.cols == 0:
                yield _nearest_of(row, tile, spec)


def _nearest_of(row: Row, tile: Tile, spec: Spec) -> _Loaded:
    """The spec of a row with this tile that is nearest to `spec`; of two equally near widths the
    larger one."""
    bits = min(row.bits, key=lambda width: (abs(width - spec.bits), -width))
    symmetric = spec.symmetric if spec.symmetric in row.symmetric else not spec.symmetric
    distance = abs(bits - spec.bits)
    distance += 2 * (symmetric != spec.symmetric)
    distance += 100 * isinstance(spec, Float)
    groups = abs(math.log2((tile.cols or 1024) / (spec.tile.cols or 1024)))
    return _Loaded(Int(bits, tile, symmetric), row.codec, distance + groups)
