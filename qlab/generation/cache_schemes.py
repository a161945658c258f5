"""A rounded cache for a model whose directory says nothing of one (`--kv-cache`).

    int8   8-bit integers with zero points, a scale for each head of a token
    fp8    8-bit floats (e4m3), the same
    int4   4-bit integers with zero points, a scale for each 32 channels of a head of a token (for
           the head where 32 do not divide it), of numbers that are turned, keys centred, and ranges
           clipped:
               q M^-T R, k M R - c, v S, and the output times S^T
    k8v4   keys as int8, values as int4
    KV_... schemes of `qlab.schemes()` as they are, scales that are stored measured beforehand;
           cache specs too, such as int8-head or int4-g32

R and S are Hadamard matrices of random signs, M is what makes rounded keys cost scores least
(`qlab.generation.balance`), and c is the mean of keys. Of the ranges of all keys the share is used
that loses least, and so of those of all values: one share for all blocks, so that these stay of
equal structure (`rotate_scores`, `centre_keys`, `kv_clipped`). Without rounding nothing of that
changes the function. Keys whose attention caps its scores or has sinks beside them are not centred.
Scales are fp16 of the first four (8 bits of bf16 would cost a quarter of a step of int8), and fp32
of KV_... as elsewhere.

Of a model that ranks run together, every rank measures on the heads of all of them, and rounds its
own as that says (`qlab.lowering.around.divided`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qlab.algebra.cached import refuse_latent
from qlab.algebra.graph import Op
from qlab.algebra.online import MatMul, QuantizeClipped, QuantizeInput, Subtract
from qlab.algebra.random import generator
from qlab.algebra.scores import seen_shifts
from qlab.algebra.spec import Spec
from qlab.algebra.tile import Tile
from qlab.algebra.wires import Wire, full_name, nearest, wires
from qlab.driver.sites import trace_all
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.generation.balance import balance
from qlab.generation.cache import probed, shapes_of
from qlab.lowering.around.attended import attend, attentions
from qlab.lowering.around.attention import use_grouped_attention
from qlab.lowering.around.coded_heads import refusal
from qlab.lowering.around.ranks import of_all
from qlab.methods.hadamard import random_hadamard
from qlab.methods.inputs import absmax, rounding, static_form
from qlab.methods.kv import CacheSpec, parse_cache_spec
from qlab.methods.kv_clipped import SHARES, error
from qlab.methods.schemes import SCHEMES
from qlab.model.skeleton import Skeleton
from qlab.process.shown import some

SEED = 0  # of the signs


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How keys or values are cached. is_turned: whether they are turned, keys centred, and ranges
    clipped before. group: channels of a head that have a scale of their own, where they divide
    it."""

    spec: CacheSpec
    is_turned: bool = False
    group: int | None = None

    def of(self, wire: Wire) -> Spec:
        """The spec for keys or values of a wire."""
        spec = self.spec.of_heads(wire.heads, wire.channels)
        if self.group is None or (wire.channels // wire.heads) % self.group:
            return spec
        return replace(spec, tile=Tile(1, self.group))


@dataclass(frozen=True, kw_only=True)
class CacheScheme:
    """name: as `cache_scheme` takes it. keys, values: how they are cached."""

    name: str
    keys: Kept
    values: Kept

    @property
    def uses_data(self) -> bool:
        """Whether something is measured beforehand."""
        return any(kept.is_turned or kept.spec.static for kept in (self.keys, self.values))


def _halves(text: str) -> CacheSpec:
    """With scales of fp16."""
    spec = parse_cache_spec(text)
    return replace(spec, spec=replace(spec.spec, scale_dtype=torch.float16))


INT8, FP8 = Kept(spec=_halves("int8-token-head-asym")), Kept(spec=_halves("fp8-token-head"))
INT4 = Kept(spec=_halves("int4-token-head-asym"), is_turned=True, group=32)
SHORT = {
    "int8": CacheScheme(name="int8", keys=INT8, values=INT8),
    "fp8": CacheScheme(name="fp8", keys=FP8, values=FP8),
    "int4": CacheScheme(name="int4", keys=INT4, values=INT4),
    "k8v4": CacheScheme(name="k8v4", keys=INT8, values=INT4),
}


def cache_scheme(name: str) -> CacheScheme:
    """A scheme by its name, in upper or lower case, or as a cache spec. QlabError for another, with
    the nearest."""
    of_cache = {key: each.cache for key, each in SCHEMES.items() if each.cache and not each.weights}
    if name.lower() in SHORT:
        return SHORT[name.lower()]
    cache = parse_cache_spec(name) if "-" in name else of_cache.get(name.upper())
    if cache is None:
        near = nearest(name.upper(), [*map(str.upper, SHORT), *of_cache])
        raise QlabError(
            f"the cache scheme {name[:40]!r} is unknown; {near} (there are {', '.join(SHORT)} and "
            "the KV_... of `qlab schemes`)"
        )
    return CacheScheme(name=name, keys=Kept(spec=cache), values=Kept(spec=cache))


def put_cache(
    model: PreTrainedModel, checkpoint: Checkpoint, scheme: CacheScheme, ids: Sequence[int]
) -> None:
    """Let the attentions of a model read keys and values as a cache of the scheme gives them back.

    Args:
        model: of the checkpoint, in evaluation mode.
        ids: tokens on which means, ranges and scales are measured.

    Raises:
        QlabError: a directory that says how its cache is rounded, a model that caches something
            else than keys and values of each layer, an attention that transformers runs in code of
            its own, or no tokens for what has to be measured.
    """
    said = [extra.says for extra in checkpoint.extras if extra.attended]
    if said:
        raise QlabError(
            f"{checkpoint.path}: {'; '.join(said)}, and the pages of its cache are so; leave "
            f"--kv-cache {scheme.name} away"
        )
    places = _places(model, checkpoint, scheme)
    if model.device.type == "cpu":
        use_grouped_attention(model)
    turns = {name: _turns(name, place, scheme) for name, place in places.items()}
    seen: dict[str, Tensor] = {}
    if scheme.uses_data:
        _refuse_no_tokens(ids, scheme)
        attend(model, turns, model.device)
        seen = _seen(model, places, ids)
        if scheme.keys.is_turned:
            turns |= {name: turns[name] | _balanced(name, places[name], seen) for name in turns}
    centred: dict[str, tuple[Op, ...]] = {}
    for name, place in places.items():
        if scheme.keys.is_turned and place.may_centre:
            c_k = seen[f"{name}:key"].mean(0)
            centred[name] = (Subtract(c_k),)
            seen[f"{name}:key"] -= c_k
    keys = _roundings(
        {f"{name}:key": place.key for name, place in places.items()}, scheme.keys, seen
    )
    values = _roundings(
        {f"{name}:value": place.value for name, place in places.items()}, scheme.values, seen
    )
    attended = {
        name: {
            **turns[name],
            "key": (*turns[name]["key"], *centred.get(name, ()), keys[f"{name}:key"]),
            "value": (*turns[name]["value"], values[f"{name}:value"]),
        }
        for name in places
    }
    attend(model, attended, model.device)


def _refuse_no_tokens(ids: Sequence[int], scheme: CacheScheme) -> None:
    if not ids:
        raise QlabError(
            f"{scheme.name} is measured on a passage, of which the tokenizer makes no tokens; give "
            "a --kv-cache that measures nothing, such as int8"
        )


# ------------------------------------------------------------------ where
@dataclass(frozen=True, kw_only=True)
class Place:
    """The keys and values of an attention. may_centre: whether the softmax alone sees what is added
    to all scores of a query."""

    key: Wire
    value: Wire
    may_centre: bool


def _places(
    model: PreTrainedModel, checkpoint: Checkpoint, scheme: CacheScheme
) -> dict[str, Place]:
    """The attentions of a model by their names, as its programs show them."""
    skeleton = Skeleton(checkpoint, torch.float32, "cpu")
    _refuse_shared(model, tuple(f"{path}." for path in skeleton.blocks), scheme)
    codes = trace_all(skeleton, None)
    refuse_latent(codes, scheme.name)
    places: dict[str, Place] = {}
    for path, code in codes.items():
        there, seen = wires(code), seen_shifts(code)
        owners = [wire.owner for wire in there.values() if wire.kind == "key"]
        if not owners:
            raise QlabError(
                f"{path} caches a state and no keys and values, so {scheme.name} is no scheme of "
                "its cache; leave --kv-cache away"
            )
        for owner in owners:
            key, value = there[f"{owner}:key"], there[f"{owner}:value"]
            place = Place(key=key, value=value, may_centre=key.name not in seen)
            places[full_name(path, key.name).rpartition(":")[0]] = place
    _refuse_unreached(model, places, scheme)
    _refuse_misfits(places, scheme)
    return places


def _refuse_shared(model: PreTrainedModel, inside: tuple[str, ...], scheme: CacheScheme) -> None:
    """Refuse attentions of blocks that have no keys and values of their own in a cache."""
    shapes = shapes_of(probed(model))
    for name in attentions(model):
        layer = getattr(model.get_submodule(name), "layer_idx", None)
        if name.startswith(inside) and shapes and layer not in shapes:
            raise QlabError(
                f"{name} reads keys and values of another layer, which get there as they came, so "
                f"{scheme.name} is no scheme of its cache; leave --kv-cache away"
            )


def _refuse_unreached(
    model: PreTrainedModel, places: Mapping[str, Place], scheme: CacheScheme
) -> None:
    reached = attentions(model) if model._can_set_attn_implementation() else ()
    own = [name for name in places if name not in reached]
    if own:
        raise QlabError(
            f"{some(own)} runs its attention in code of its own, in front of which qlab puts "
            f"nothing, so {scheme.name} is no scheme of its cache; leave --kv-cache away"
        )


def _refuse_misfits(places: Mapping[str, Place], scheme: CacheScheme) -> None:
    for name, place in places.items():
        for wire, kept in ((place.key, scheme.keys), (place.value, scheme.values)):
            spec = kept.of(wire)
            rounded = static_form(spec) if kept.spec.static else QuantizeInput(spec)
            reason = refusal(rounded, wire.channels // wire.heads)
            if reason:
                raise QlabError(f"{name}: {reason}; choose another --kv-cache than {scheme.name}")


# ------------------------------------------------------------------ what
def _turns(name: str, place: Place, scheme: CacheScheme) -> dict[str, tuple[Op, ...]]:
    """The matrices at an attention, which change nothing together."""
    turns: dict[str, tuple[Op, ...]] = {"key": (), "value": ()}
    if scheme.keys.is_turned:
        R = _drawn(name, place.key)
        turns |= {"query": (MatMul(R),), "key": (MatMul(R),)}
    if scheme.values.is_turned:
        S = _drawn(f"{name}:value", place.value)
        turns |= {"value": (MatMul(S),), "output": (MatMul(S.mT.contiguous()),)}
    return turns


def _balanced(name: str, place: Place, seen: dict[str, Tensor]) -> dict[str, tuple[Op, ...]]:
    """The matrices of queries and keys that make rounded keys cost scores least. Turns the keys of
    the attention that were seen."""
    R, k_nk = _drawn(name, place.key), seen[f"{name}:key"]
    moved = k_nk - k_nk.mean(0) if place.may_centre else k_nk
    M, inverse = balance(*(x.view(-1, len(R)) for x in (moved, seen.pop(f"{name}:query"))))
    first, turned = R.to(M.device), MatMul(M @ R.to(M.device))
    seen[f"{name}:key"] = turned(k_nk)
    return {"query": (MatMul(first @ inverse @ first),), "key": (MatMul(first @ turned.M_nn),)}


def _drawn(name: str, wire: Wire) -> Tensor:
    return random_hadamard(wire.channels // wire.heads, generator(SEED, name))


def _roundings(there: Mapping[str, Wire], kept: Kept, seen: Mapping[str, Tensor]) -> dict[str, Op]:
    """The rounding of every wire by its name. seen: what is rounded there."""
    specs = {where: kept.of(wire) for where, wire in there.items()}
    if kept.is_turned:
        share = min(SHARES, key=lambda share: _loss(specs, share, seen))
        return {where: QuantizeClipped(spec, share) for where, spec in specs.items()}
    if not kept.spec.static:
        return {where: QuantizeInput(spec) for where, spec in specs.items()}
    ranges = {where: {"minmax": (seen[where].amin(0), seen[where].amax(0))} for where in there}
    return {w: rounding(spec, absmax, ranges[w], w) for w, spec in specs.items()}


def _loss(specs: Mapping[str, Spec], share: float, seen: Mapping[str, Tensor]) -> float:
    """The sum over wires of |round(x) - x|^2 / |x|^2."""
    return sum(
        error(QuantizeClipped(spec, share), seen[where])
        / max(float(seen[where].square().sum()), torch.finfo(torch.float32).tiny)
        for where, spec in specs.items()
    )


@torch.no_grad()
def _seen(
    model: PreTrainedModel, places: Mapping[str, Place], ids: Sequence[int]
) -> dict[str, Tensor]:
    """What attentions read of tokens as it is before rounding [n, h * d] in fp32, by the names of
    wires: keys, values, and what else is turned."""
    seen: dict[str, Tensor] = {}

    def note(where: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple, x_bhnd: Tensor) -> None:
            seen[where] = x_bhnd.transpose(1, 2).flatten(2).flatten(0, 1).float()

        return hook

    reads: dict[str, Any] = {name: model.get_submodule(f"{name}.reads") for name in places}
    hooks = [
        module.get_submodule(kind).register_forward_hook(note(f"{name}:{kind}"))
        for name, module in reads.items()
        for kind in module
    ]
    try:
        model(torch.tensor([[*ids]], dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {where: _of_all_heads(model, where, x_nk) for where, x_nk in seen.items()}


def _of_all_heads(model: PreTrainedModel, where: str, x_nk: Tensor) -> Tensor:
    """What was seen at a wire, of the heads of all ranks."""
    module: Any = model.get_submodule(where.rpartition(":")[0])
    ranks = getattr(module, "ranks", None)
    return x_nk if ranks is None else of_all(x_nk, ranks.passes, [x_nk.shape[1]] * ranks.world)
