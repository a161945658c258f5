"""Blocks of the tiny models as values, what they are called with, and how values are compared and
watched."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from families import MIXTURES, tiny
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.algebra.block import BLOCK_IO, SAMPLES
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import inputs_of
from qlab.algebra.qtensor import dense
from qlab.algebra.running import apply, keys_of
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import STATS, Moment, stat_of
from qlab.algebra.tracing.taken_apart import take_apart
from qlab.algebra.tracing.trace import trace
from qlab.driver.learning import BlockSamples
from qlab.driver.lossless import refuse_changed
from qlab.driver.solve import solve
from qlab.model.calls import Call
from qlab.model.paper import find_blocks, run_experts_here


@dataclass(frozen=True, eq=False)
class Segment:
    """One block, its value, and the (args, kwargs) that it is called with, per batch."""

    block: nn.Module
    graph: ModuleGraph
    batches: tuple

    def observe(self, graph, keys, order=None):
        """The statistics of `wanted` over the batches, in this order of them."""
        stats = {SAMPLES: samples_of(self)} if SAMPLES in keys else {}
        keys = set(keys) - {SAMPLES}
        for i in order or range(len(self.batches)):
            inputs = inputs_of(graph, sorted({s for s, _ in keys}), *self.batches[i])
            for source, name in keys:
                x_nk = inputs[source].x.flatten(0, -2)
                tokens = inputs[source].tokens
                ends = inputs[source].ends
                tokens = torch.arange(len(x_nk)) if tokens is None else tokens
                stat = stat_of(name, experts=ends is not None)
                state = stat.lift(Observation(x_nk, 1000 * i + tokens, ends))
                stats[source, name] = (
                    stat.combine(stats[source, name], state) if (source, name) in stats else state
                )
        return stats

    @cached_property
    def stats(self):
        """Every statistic of every source of the block as it is."""
        return self.all_stats(self.graph)

    def stats_for(self, transform):
        """Those, and what the stages ask for beside them."""
        asked = {key for stage in transform for key in keys_of(stage, self.graph)}
        own = {(of, need) for of, need in asked - self.stats.keys() if need != BLOCK_IO}
        return {**self.stats, **(self.observe(self.graph, own) if own else {})}

    def all_stats(self, graph):
        keys = {(s.source, name) for s in graph.sites for name in STATS}
        return self.observe(graph, keys | {SAMPLES})

    def solve(self, transform, graph=None):
        return solve(graph or self.graph, transform, self.observe)


def tokens(batch, length, seed=0):
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def calls(model, ids, mask=None):
    """Block path -> (args, kwargs) of its call inside the model."""
    seen, (_, blocks) = {}, find_blocks(model)
    hooks = [
        block.register_forward_pre_hook(
            lambda m, a, k, path=path: seen.update({path: (a, dict(k))}), with_kwargs=True
        )
        for path, block in blocks.items()
    ]
    try:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@lru_cache
def model_of(family):
    model = tiny(family)
    run_experts_here(model)
    return model


@lru_cache
def segment(family, index=None):
    """Block `index` (default: the first, or the first with experts) of a family's tiny model with
    three batches of 24 tokens."""
    index = int(family in MIXTURES) if index is None else index
    with torch.no_grad():
        model = model_of(family)
        path, block = list(find_blocks(model)[1].items())[index]
        batches = tuple(calls(model, tokens(2, 12, seed))[path] for seed in range(3))
        return Segment(block, trace(block, *batches[0], path), batches)


def batches_of(seg):
    """The segment's calls as the driver makes them."""

    def one(args, kwargs):
        leaves, form = take_apart((args, kwargs))
        where = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        state = (leaves[where],)
        return Call(
            leaves=(*leaves[:where], None, *leaves[where + 1 :]),
            form=form,
            holes={where: 0},
            entering=state,
        ), state

    return lambda: iter([one(*batch) for batch in seg.batches])


def run_checked(seg, transform, stats=None, graph=None):
    """All stages, each with its claim checked on a batch."""
    graph, stats = graph or seg.graph, dict(stats or {})
    for stage in transform:
        before = graph
        graph, stats = apply(stage, graph, stats)
        refuse_changed(stage, before, graph, None, batches_of(seg))
    return graph, stats


def samples_of(seg):
    """The segment's batches as what goes through one block, a batch for a window."""
    return BlockSamples(seg.graph, [list(batches_of(seg)())])


def of(block, *args, path="block"):
    """A segment of a block written in a test."""
    block = block.eval()
    return Segment(block, trace(block, args, {}, path), ((args, {}),))


def hidden(out):
    """The hidden states among a block's outputs."""
    return out if isinstance(out, Tensor) else out[0]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def tensors(tree):
    """Every tensor inside graphs, leaves, statistics and online operations, in a fixed order."""
    if isinstance(tree, ModuleGraph):
        tree = (
            dict(sorted(tree.params.items())),
            [[vars(op) for op in ops] for _, ops in sorted(tree.online.items())],
        )
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree, key=str)]
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def assert_same(a, b):
    """Bit for bit the same tensors, dtypes and all."""
    ours, theirs = tensors(a), tensors(b)
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs):
        assert x.dtype == y.dtype and torch.equal(x, y)


@contextmanager
def untouched(*trees):
    """No tensor in these values is written to: `_version` and bits stay."""
    before = [(t, t._version, t.clone()) for tree in trees for t in tensors(tree)]
    yield
    for tensor, version, bits in before:
        assert tensor._version == version and torch.equal(tensor, bits)


def densified(seg, graph):
    """A copy of the segment's own module with the graph's leaves loaded as dense weights."""
    block = copy.deepcopy(seg.block)
    layouts = {s.weight: s.layout for s in graph.code.sites}
    for name, leaf in graph.params.items():
        if name in dict(block.named_parameters()):
            W = dense(leaf, torch.float32)
            turned = not isinstance(leaf, Tensor) and layouts[name].endswith("k o")
            block.get_parameter(name).data = W.mT if turned else W
    return block


def reversed_sites(graph):
    return replace(graph, code=replace(graph.code, sites=graph.code.sites[::-1]))


def moment(x_nk):
    """The second moment of these rows."""
    return Moment(x_nk.T @ x_nk, len(x_nk))


def correlated(n, k, seed):
    """Rows [n, k] whose channels are strongly correlated and of different size, as activations
    are."""
    g = torch.Generator().manual_seed(seed)
    mix = (
        torch.eye(k)
        + 0.7 * torch.randn(k, k, generator=g) / k**0.5
        + torch.randn(k, 1, generator=g)
    )
    return torch.randn(n, k, generator=g) @ mix * torch.rand(k, generator=g).add(0.2)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class FromTheLeft(nn.Module):
    """Its weight stands on the left of a product."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 6)

    def forward(self, x):
        return (self.lin.weight @ torch.tanh(x).mT).mT
