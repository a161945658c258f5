"""Quantizers are tuples of pure stages (graph, stats) -> (graph, stats); chaining them is tuple concatenation."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.certificate import largest_step
from qlab.errors import QlabError
from qlab.experts import per_row
from qlab.graph import ModuleGraph, Site, by_origin, by_source
from qlab.qtensor import Leaf, QTensor, dense, shared_outer
from qlab.scope import Scope
from qlab.spec import Spec, with_scale_dtype
from qlab.stats import Moment, Stats, transport

Apply = Callable[[ModuleGraph, Stats], tuple[ModuleGraph, Stats]]


@dataclass(frozen=True)
class Stage:
    """One pure step. needs: statistics it reads. spec: the grid it rounds to (None: it rounds nothing).

    detail: its settings in words. scope: the sites it may touch.
    """

    name: str
    needs: frozenset[str]
    apply: Apply
    spec: Spec | None = None
    detail: str = ""
    scope: Scope = field(default_factory=Scope)
    reparametrizes: bool = False  # it moves inputs, so the sites of one input belong together
    sitewise: bool = False  # what it does to a site depends on the weights and statistics of that site's input only
    lossless: bool = False  # it keeps the function whatever it finds, so it may wait until every site is solved
    uncovered: bool = False  # the last stage of `rules`: any site in its scope is an error

    def wants(self, site: Site) -> frozenset[str]:
        """The statistics that it reads of this site's input: no drift of experts, whose rows have no pairs in the reference."""
        return self.needs - {"drift"} if site.route else self.needs

    def touches(self, name: str, site: Site) -> bool:
        """Whether it may change a site of this full name. A router is never rounded, and needs no rule."""
        unrounded = site.router and (self.spec is not None or self.uncovered)
        return site.outside == self.scope.outside and name in self.scope and not unrounded


Transform = tuple[Stage, ...]


def chain(*transforms: Transform) -> Transform:
    """One after the other. chain() is the identity and chain is associative."""
    return sum(transforms, ())


def at(pattern: str, transform: Transform) -> Transform:
    """The transform restricted to the sites whose full name matches the pattern."""
    return tuple(replace(s, scope=replace(s.scope, include=(pattern, *s.scope.include))) for s in transform)


def outside(transform: Transform) -> Transform:
    """The transform on linears around the blocks (a vision tower, a projector, the head), which other stages leave alone.

    Every stage works on one weight at a time and without data, since nothing runs there; others are refused by name.
    """
    for stage in transform:
        if stage.needs or not stage.sitewise:
            reason = f"observes {', '.join(sorted(stage.needs))}" if stage.needs else "changes more than weights"
            raise QlabError(f"the stage {stage.name!r} {reason}, and weights around the blocks are rounded one by one without data; "
                            "use rtn or hqq for them")
    return tuple(replace(stage, scope=replace(stage.scope, outside=True)) for stage in transform)


def keep() -> Transform:
    """Leave the sites as they are: what a rule says of layers that stay unquantized."""
    return (Stage("keep", frozenset(), lambda graph, stats: (graph, stats), sitewise=True),)


def rules(table: Mapping[str, Transform]) -> Transform:
    """The first matching pattern decides. A pattern without a site, and a site without a pattern, are errors."""
    stages: list[Stage] = []
    earlier: tuple[str, ...] = ()
    for pattern, transform in table.items():
        for stage in at(pattern, transform or keep()):
            stages.append(replace(stage, scope=replace(stage.scope, exclude=stage.scope.exclude + earlier)))
        earlier = (*earlier, pattern)
    last = Stage("rules", frozenset(), lambda g, s: (g, s), scope=Scope(exclude=earlier), uncovered=True, sitewise=True)
    return (*stages, last)


def select(stage: Stage, graph: ModuleGraph) -> ModuleGraph:
    """The graph with only the stage's sites selected, out of those that are selected already."""
    return replace(graph, selected=frozenset(s.path for s in graph.sites if stage.touches(graph.where(s), s)))


def apply(stage: Stage, graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
    """Run one stage on the selected sites of its scope; the result has the same sites selected as the graph had."""
    chosen = select(stage, graph)
    if stage.uncovered and chosen.sites:
        raise QlabError(f"no rule covers {', '.join(map(graph.where, chosen.sites))}; add a pattern, with keep() to leave them")
    new, stats = stage.apply(chosen, stats)
    return replace(new, selected=graph.selected), stats


# ------------------------------------------------------------------ authoring
WeightFn = Callable[[Tensor, Mapping[str, Any], Spec], tuple[Leaf, Mapping[str, Any]]]


def each_weight(name: str, fn: WeightFn, spec: Spec, needs: frozenset[str] = frozenset(), detail: str = "") -> Transform:
    """A lossy stage: every selected weight W_ok (fp32) becomes fn(W_ok, its statistics, spec) -> (leaf, notes).

    The spec that fn gets has its scale dtype settled. detail: the stage's own settings, for plans and provenance.

    Beside the statistics, fn finds "outer": the global scale where the spec has one (NVFP4), else None. It is one for all
    selected weights of a source, since engines fuse those (q, k and v; gate and up).

    Notes go into the report, with the relative weight error |W - W'| / |W|, the largest error in steps and, where the second
    moment is at hand, the relative calibration loss tr(D H D^T) / tr(W H W^T), D = W' - W.
    """

    def solve(graph: ModuleGraph, site: Site, seen: Mapping[str, Any], expert: int | None = None) -> _Solved:
        W_ok = graph.weight_ok(site, expert)
        if not torch.isfinite(W_ok).all():
            raise QlabError(f"{graph.where(site)}.weight holds NaN or Inf; repair the checkpoint or keep() this site")
        try:
            leaf, note = fn(W_ok, seen, with_scale_dtype(spec, graph.dtype))
        except QlabError as error:
            raise QlabError(f"{graph.where(site)}{'' if expert is None else f', expert {expert}'}: {error}") from error
        try:
            json.dumps(note, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise QlabError(f"{graph.where(site)}: {name} notes what no report holds ({error}); note numbers and texts") from error
        if leaf.shape != W_ok.shape:
            raise QlabError(f"{graph.where(site)}: {name} made a weight {tuple(leaf.shape)} of one {tuple(W_ok.shape)}")
        _refuse_nonfinite(leaf, f"{graph.where(site)}: {name} made")
        return _Solved(leaf, note, _errors(W_ok, leaf, seen.get("second_moment")))

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        leaves, notes = {}, dict(graph.notes)
        outers = _outers(graph, spec)
        for site in graph.sites:
            assert site.weight is not None  # weight_ok refuses it otherwise
            seen = {need: stats[site.source, need] for need in needs}
            outer = outers.get(site.path)
            if site.route is None:
                solved = [solve(graph, site, {**seen, "outer": outer})]
                leaf = solved[0].leaf
            else:
                experts = range(graph.params[site.weight].shape[0])
                # a state may be observed when it is asked for, and is held no longer than its expert takes
                solved = [solve(graph, site, {**{n: state.states[e] for n, state in seen.items()},
                                              "outer": None if outer is None else outer[e]}, e) for e in experts]  # fmt: skip
                leaf = _stacked([s.leaf for s in solved])
            leaves[site.weight] = leaf if isinstance(leaf, QTensor) or site.layout.endswith("o k") else leaf.mT.contiguous()
            notes[site.path] = {**notes.get(site.path, {}), **_notes([s.errors for s in solved]), **_merged([s.note for s in solved])}
        return replace(graph.update(leaves), notes=notes), stats

    return (Stage(name, needs, run, spec, detail, sitewise=True),)


def _refuse_nonfinite(leaf: Leaf, said: str) -> None:
    if isinstance(leaf, Tensor):
        if not torch.isfinite(leaf).all():
            raise QlabError(f"{said} a weight that holds NaN or Inf")
    elif not torch.isfinite(leaf.scales.float()).all():
        raise QlabError(f"{said} scales that {leaf.scales.dtype} does not hold (NaN or Inf); choose another scale dtype")


def _outers(graph: ModuleGraph, spec: Spec) -> dict[str, Tensor]:
    """Site path -> the outer scale that it shares with the sites of its source; empty where the spec has none."""
    if not spec.outer:
        return {}
    groups: dict[Any, list[Site]] = {}
    for site in (s for s in graph.sites if s.path not in graph.outers):
        groups.setdefault((site.source, graph.weight_ok(site).shape[:-2]), []).append(site)
    shared = [(sites, shared_outer(map(graph.weight_ok, sites), spec)) for sites in groups.values()]
    return {**graph.outers, **{site.path: outer for sites, outer in shared for site in sites if outer is not None}}


@dataclass(frozen=True)
class _Errors:
    """|D|, |W| and the largest error in steps; of the second moment, if it was seen: tr(D H D^T), tr(W H W^T), tokens and channels."""

    D: float
    W: float
    steps: float = 0.0
    D_H: float = 0.0
    W_H: float = 0.0
    tokens: int | None = None
    channels: int = 0


@dataclass(frozen=True)
class _Solved:
    leaf: Leaf
    note: Mapping[str, Any]
    errors: _Errors


def _stacked(leaves: Sequence[Leaf]) -> Leaf:
    """Leaves [o, k] of all experts as one [e, o, k]."""
    return pytree.tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *leaves)


def _errors(W_ok: Tensor, leaf: Leaf, moment: Moment | None) -> _Errors:
    D_ok = dense(leaf, torch.float32) - W_ok
    norms = float(D_ok.norm()), float(W_ok.norm()), largest_step(leaf, D_ok) if isinstance(leaf, QTensor) and leaf.perm is None else 0.0
    if moment is None:
        return _Errors(*norms)
    return _Errors(*norms, moment.output_error(D_ok), moment.output_error(W_ok), moment.tokens, len(moment.sum_kk))


def _notes(parts: Sequence[_Errors]) -> dict[str, Any]:
    """The errors of one site, over all of its experts if it has some, each weighted by its tokens."""
    notes: dict[str, Any] = {"weight_error": math.hypot(*(p.D for p in parts)) / max(math.hypot(*(p.W for p in parts)), 1e-30)}
    notes["largest_step"] = max(p.steps for p in parts)
    counts = [p.tokens for p in parts if p.tokens is not None]
    if counts:
        notes["tokens"] = sum(counts)
        share = [tokens / max(notes["tokens"], 1) for tokens in counts]
        D_H, W_H = (sum(q * s for q, s in zip(values, share)) for values in ((p.D_H for p in parts), (p.W_H for p in parts)))
        notes["loss"] = D_H / max(W_H, 1e-30)
    if counts and len(parts) > 1:
        # with fewer tokens than input channels an expert's second moment is singular
        few = [e for e, p in enumerate(parts) if p.tokens is not None and p.tokens < p.channels]
        notes |= {"expert_tokens": counts, "experts_with_few_tokens": few}
    return notes


def _merged(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a method says of its experts: one value where all agree, else a list."""
    values = {key: [note[key] for note in notes] for key in notes[0]}
    return {key: found[0] if all(v == found[0] for v in found) else found for key, found in values.items()}


@dataclass(frozen=True)
class Multiply:
    """The online operation x -> x * m, m [k], or of experts' rows m [e, 1, k]."""

    m_k: Tensor

    @property
    def per_expert(self) -> bool:
        return self.m_k.ndim == 3

    def __call__(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        m = self.m_k.to(x.dtype)
        return x * (m if ends is None else per_row(m[:, 0], ends, len(x)))


@dataclass(frozen=True)
class Rotate:
    """The online operation x -> x @ M, M [k, k]."""

    M_kk: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.M_kk.to(x.dtype)


def reparametrize(
    graph: ModuleGraph, stats: Stats, origin: str, M: Tensor, M_inv: Tensor
) -> tuple[ModuleGraph, Stats]:
    """x -> x @ M at the inputs of all sites of an origin, W -> W @ M_inv^T, statistics transported: the function stays.

    M and M_inv are vectors [k] (diagonals), matrices [k, k], or diagonals [e, 1, k] of experts that feed themselves.
    Every site of the origin must be selected, since they share its channels.
    """
    sharing = by_origin(graph.code.sites)[origin]
    outside = [graph.where(s) for s in sharing if s not in graph.sites]
    if outside:
        raise QlabError(f"{', '.join(outside)} shares its input with {', '.join(map(graph.where, graph.sites))}; a "
                        "reparametrization needs one rule for all of them")
    leaves, online = {}, dict(graph.online)
    for site in sharing:
        W_ok = graph.weight_ok(site)
        moved = W_ok * M_inv if M_inv.ndim != 2 else (W_ok.double() @ M_inv.T.double()).float()
        assert site.weight is not None
        leaves[site.weight] = moved.mT if site.layout.endswith("k o") else moved
        online[site.path] = (*online.get(site.path, ()), Rotate(M) if M.ndim == 2 else Multiply(M))
    for source in by_source(sharing):
        stats = transport(stats, source, M)
    return replace(graph.update(leaves), online=online), stats
