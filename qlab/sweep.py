"""Quantizing is a scan over segments: load one, observe what the next stage needs, apply the stage, push the carry on."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.graph import ModuleGraph, inputs_of, interpret
from qlab.skeleton import Call, Skeleton
from qlab.stats import Observation, Stats, stat_of
from qlab.transform import Transform, apply, select

BATCH_TOKENS = 2048
Batch = tuple[Call, Tensor]  # what a block is called with, and its hidden states [b, l, d]
Batches = Callable[[], Iterator[Batch]]


def in_batches(ids: Tensor, batch_tokens: int = BATCH_TOKENS) -> list[Tensor]:
    """Token windows [n, l] as batches of about `batch_tokens` tokens."""
    return list(ids.split(max(1, batch_tokens // ids.shape[1])))


def solve(graph: ModuleGraph, transform: Transform, observe: Callable[[ModuleGraph, set], Stats]) -> tuple[ModuleGraph, Stats]:
    """All stages on one segment; statistics that a stage needs and nobody has yet are observed just before it."""
    stats: Stats = {}
    for stage in transform:
        wanted = {(s.source, need) for s in select(stage, graph).sites for need in stage.needs}
        if missing := wanted - stats.keys():
            stats = {**stats, **observe(graph, missing)}
        graph, stats = apply(stage, graph, stats)
    return graph, stats


def observe(graph: ModuleGraph, wanted: set[tuple[str, str]], batches: Iterator[Batch], everywhere: bool = False) -> Stats:
    """The statistics `wanted` {(source, name)} of a segment's inputs over all batches; experts' are of their own tokens,
    or, with `everywhere`, of all tokens.

    Refuses NaN and Inf in activations, naming the sites they reach.
    """
    sources = sorted({source for source, _ in wanted})
    routes = {site.source: site.route for site in graph.code.sites}
    stats: dict[tuple[str, str], Any] = {}
    seen = 0
    for call, hidden in batches:
        count = hidden.shape[0] * hidden.shape[1]
        keys = torch.arange(seen, seen + count)
        seen += count
        inputs = inputs_of(graph, sources, *call.inputs(hidden), everywhere)
        for source in sources:
            x_nk, own = inputs[source].flatten(0, -2), (keys.to(inputs[source].device),)
            if route := routes[source]:
                own = own[0][inputs[route][1]], inputs[route][2]
            if not x_nk.sum().isfinite() and not torch.isfinite(x_nk).all():  # the sum is the cheaper question
                _refuse_nonfinite(graph, source, x_nk.dtype)
            for name in sorted(n for s, n in wanted if s == source):
                stat, key = stat_of(name, experts=route is not None), (source, name)
                state = stat.lift(Observation(x_nk, *own))
                stats[key] = stat.combine(stats[key], state) if key in stats else state
    return stats


def _refuse_nonfinite(graph: ModuleGraph, source: str, dtype: torch.dtype) -> None:
    """Name what is to blame: the segment's own leaves where they hold NaN or Inf, else the sites that NaN or Inf reaches."""
    if bad := [n for n, leaf in graph.params.items() if isinstance(leaf, Tensor) and not torch.isfinite(leaf).all()]:
        raise QlabError(f"{', '.join(f'{graph.path}.{n}' for n in bad)} holds NaN or Inf; repair the checkpoint")
    at = ", ".join(graph.where(s) for s in graph.code.sites if s.source == source)
    raise QlabError(f"the activations that reach {at} hold NaN or Inf; check the model in this dtype ({dtype})")


def push(graph: ModuleGraph, batches: Iterator[Batch]) -> Iterator[Tensor]:
    """The hidden states that leave the segment, batch by batch."""
    for call, hidden in batches:
        out = interpret(graph, *call.inputs(hidden))
        yield out if isinstance(out, Tensor) else next(t for t in out if isinstance(t, Tensor) and t.shape == hidden.shape)


def record(skeleton: Skeleton, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[dict[str, Call]]]:
    """The hidden states that enter the first block, and every block's calls, for each batch of tokens.

    Calls of later batches share the tensors that equal those of the first one (rotary tables, masks).
    """
    hidden: list[Tensor] = []
    calls: list[dict[str, Call]] = []
    for tokens in batches:
        h, call = skeleton.record(tokens)
        hidden.append(h)
        calls.append({path: _shared(c, calls[0][path] if calls else None) for path, c in call.items()})
    return hidden, calls


def _shared(call: Call, earlier: Call | None) -> Call:
    if earlier is None or len(earlier.leaves) != len(call.leaves):
        return call
    leaves = tuple(
        old if isinstance(new, Tensor) and isinstance(old, Tensor) and new.shape == old.shape and torch.equal(new, old) else new
        for new, old in zip(call.leaves, earlier.leaves)
    )
    return Call(leaves, call.spec, call.hidden)
