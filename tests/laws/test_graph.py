"""A traced block is the block: same bits, same sites, same inputs; what cannot be read is refused
by name."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from blocks import Numbers, Spread, StateSpace
from families import FAMILIES, MIXTURES
from segments import (
    FromTheLeft,
    assert_same,
    calls,
    densified,
    hidden,
    model_of,
    of,
    relative,
    segment,
    tokens,
    untouched,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlab.algebra.graph import by_source, tensors_of
from qlab.algebra.interpret import inputs_of, interpret
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import parse_spec
from qlab.algebra.tracing.trace import trace
from qlab.errors import QlabError
from qlab.generation.twins import kinds_of
from qlab.methods.rtn import rtn
from qlab.model.paper import find_blocks
from qlab.model.recording import shapes_of

every_family = pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
LENGTHS = (5, 12, 29)


def form(args, kwargs):
    """What a trace depends on: how many tensors there are and which of their dimensions are 1."""
    return tuple(tuple(n == 1 for n in t.shape) for t in tensors_of(args, kwargs)), tuple(
        (k, v is None) for k, v in kwargs.items()
    )


def test_what_a_block_makes_itself_lies_where_its_inputs_do_and_not_where_it_was_traced():
    block, x = Spread("cat"), torch.randn(2, 5, 12)
    on_paper = trace(deepcopy(block).to("meta"), (x.to("meta"),), {})
    graph = replace(on_paper, params=dict(block.named_parameters()))
    assert torch.equal(interpret(graph, (x,), {}), block(x))


def test_plain_numbers_keep_their_values_on_paper_and_transposed_weights_are_linears():
    torch.manual_seed(0)
    block, x = Numbers(), torch.randn(2, 5, 12)
    on_paper = trace(deepcopy(block).to("meta"), (x.to("meta"),), {})
    graph = replace(on_paper, params={**dict(block.named_parameters()), "table": block.table})
    assert {(site.path, site.layout) for site in graph.sites} == {
        (f"turned.{i}", "o k") for i in range(5)
    }
    assert torch.equal(interpret(graph, (x,), {}), block(x))
    assert interpret(on_paper, (x.to("meta"),), {}).is_meta  # numbers go where the weights are


def test_filters_of_each_channel_and_factors_are_no_weights():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12)
    seg = of(StateSpace(), x)
    assert [site.path for site in seg.graph.sites] == ["out"]
    assert torch.equal(interpret(seg.graph, (x,), {}), seg.block(x))


def left_padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :3] = 0
    return mask


@every_family
def test_interpreting_a_trace_is_running_the_block_bit_for_bit(family):
    model, traced = model_of(family), {}
    runs = [
        calls(model, tokens(2, n, seed=n), mask)
        for n in LENGTHS
        for mask in (None, left_padded(2, n))
    ]
    runs.append(calls(model, tokens(3, 17)))
    found = find_blocks(model)[1]
    kinds = dict(zip(reversed(kinds_of(found)), reversed(found)))  # the first block of each
    for path in kinds.values():
        block = found[path]
        for args, kwargs in (run[path] for run in runs):
            key = path, form(args, kwargs)
            if key not in traced:
                traced[key] = trace(block, args, kwargs, path)
            assert_same(interpret(traced[key], args, kwargs), block(*args, **kwargs))
    assert len(traced) <= 3 * len(kinds)  # one program serves all lengths of a form


@every_family
def test_quantized_leaves_compute_what_their_dense_weights_do(family):
    seg = segment(family)
    graph, _ = seg.solve(rtn(parse_spec("int3-g16-asym")))
    assert all(isinstance(graph.params[s.weight], QTensor) != s.router for s in graph.sites)
    oracle = densified(seg, graph)
    for args, kwargs in seg.batches:
        out = hidden(interpret(graph, args, kwargs))
        assert relative(out, hidden(oracle(*args, **kwargs))) < 1e-6
        assert relative(out, hidden(seg.block(*args, **kwargs))) > 1e-3  # and not what it was


@every_family
def test_every_code_of_every_site_is_read(family):
    seg = segment(family)
    graph, _ = seg.solve(rtn(parse_spec("int4-channel")))
    before = hidden(interpret(graph, *seg.batches[0]))
    for site in (s for s in graph.sites if not s.router):
        q = graph.params[site.weight]
        planted = graph.update({site.weight: replace(q, codes=q.codes.roll(1, -2))})
        assert relative(hidden(interpret(planted, *seg.batches[0])), before) > 1e-4, site.path


def linears_of(block):
    """Every module that is a linear or a router, by its path."""
    return {
        name: m
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear | Conv1D) or "Router" in type(m).__name__
    }


def inputs_seen(seg, linears, args, kwargs):
    """What each of the modules is called with when the block runs."""
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
        for name, m in linears.items()
    ]
    seg.block(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return seen


@every_family
def test_sites_are_the_linear_modules_and_their_inputs_what_the_modules_get(family):
    seg = segment(family)
    args, kwargs = seg.batches[1]
    linears = linears_of(seg.block)
    seen = inputs_seen(seg, linears, args, kwargs)
    linear_sites = [site for site in seg.graph.sites if not site.route]
    stacked = {n for n, p in seg.block.named_parameters() if p.ndim == 3}
    assert {site.path for site in linear_sites} == set(linears)
    assert {site.weight for site in seg.graph.sites if site.route} == stacked
    inputs = inputs_of(seg.graph, by_source(seg.graph.sites), args, kwargs)
    for site in linear_sites:
        module, x = linears[site.path], inputs[site.source].x
        W = module.weight.mT if isinstance(module, Conv1D) else module.weight
        assert torch.equal(x.flatten(0, -2), seen[site.path].flatten(0, -2)), site.path
        assert torch.equal(seg.graph.weight_ok(site), W)
        assert (site.bias is None) == (getattr(module, "bias", None) is None)
    # Sites share a source exactly when they share an input. A view is the same input.
    groups = by_source(seg.graph.sites).values()
    shared = {frozenset(s.path for s in group if not s.route) for group in groups} - {frozenset()}
    same = {frozenset(b for b in seen if seen[b].data_ptr() == seen[a].data_ptr()) for a in seen}
    assert shared == same


@every_family
def test_interpreting_writes_to_nothing(family):
    seg = segment(family)
    args, kwargs = seg.batches[0]
    with untouched(seg.graph, args, list(tensors_of((), kwargs))):
        interpret(seg.graph, args, kwargs)
        inputs_of(seg.graph, by_source(seg.graph.sites), args, kwargs)


class Writes(nn.Module):
    """Changes a linear's output through views of it."""

    def __init__(self, k):
        super().__init__()
        self.one, self.two = nn.Linear(k, k), nn.Linear(k, k)

    def forward(self, x):
        y = self.one(x)
        y[..., :2] = 0
        y[..., 2:].mul_(3)
        return self.two(y)


@pytest.mark.parametrize("k, n", [(3, 2), (8, 5)])
def test_operations_in_place_reach_the_recorded_inputs(k, n):
    torch.manual_seed(k)
    block, x = Writes(k), torch.randn(n, k)
    seg = of(block, x)
    assert_same(interpret(seg.graph, (x,), {}), block(x))
    y = block.one(x)
    y[..., :2] = 0
    y[..., 2:] *= 3
    source = seg.graph.sites[1].source
    assert torch.equal(inputs_of(seg.graph, [source], (x,), {})[source].x, y)


def test_a_block_is_traced_as_it_runs_and_not_as_it_is_exported():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            exported = torch.compiler.is_exporting() or torch.compiler.is_compiling()
            return self.lin(x) * (2 if exported else 3)

    block, x = Two(), torch.randn(2, 3, 4)
    assert torch.equal(interpret(of(block, x).graph, (x,), {}), block(x))


def test_a_weight_that_stands_on_the_left_is_a_site_as_any_other():
    block, x = FromTheLeft(), torch.randn(2, 3, 4)
    seg = of(block, x)
    (site,) = seg.graph.sites
    assert (site.path, site.layout) == ("lin", "o k") and not seg.graph.code.unread
    assert torch.allclose(interpret(seg.graph, (x,), {}), block(x), atol=1e-6)
    assert torch.equal(inputs_of(seg.graph, [site.source], (x,), {})[site.source].x, torch.tanh(x))


class Convolves(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv1d(4, 4, 1)

    def forward(self, x):
        return self.mix(x.mT).mT


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.Linear(4, 4)

    def forward(self, x):
        return self.deep(torch.relu(self.deep(x)))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(x) if x.sum() > 0 else x


class Fails(nn.Module):
    def forward(self, x):
        raise ValueError("no")


class Derived(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.lin.weight * 2)


class Factored(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(x) * self.lin.weight[0]


class Masked(Factored):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(4, 4).tril())

    def forward(self, x):
        return nn.functional.linear(x, self.lin.weight * self.mask * torch.tensor(2.0))


@pytest.mark.parametrize(
    "block, leaf, words",
    [
        (Masked(), "lin.weight", ["(4, 4)", "mul"]),
        (Factored(), "lin.weight", ["(4, 4)", "select"]),
        (Convolves(), "mix.weight", ["(4, 4, 1)", "conv1d"]),
        (Derived(), "lin.weight", ["(4, 4)", "mul"]),
        (Twice(), "deep.weight", ["two operations", "linear"]),
    ],
)
def test_a_weight_that_cannot_be_read_is_no_site_and_runs_as_it_is(block, leaf, words):
    x = torch.randn(2, 3, 4)
    seg = of(block, x)
    assert not seg.graph.sites and seg.graph.code.unread.keys() == {leaf}
    assert all(word in seg.graph.code.unread[leaf] for word in words)
    assert torch.equal(interpret(seg.graph, (x,), {}), block(x))


@torch.no_grad()
def test_what_cannot_be_traced_runs_as_it_is_and_what_does_not_run_is_refused_by_name():
    block = Branches()
    on_paper = trace(deepcopy(block).to("meta"), (torch.zeros(2, 3, 4, device="meta"),), {}, "h.7")
    assert (
        not on_paper.sites
        and "Branches, which torch.export cannot trace" in on_paper.code.unread["lin.weight"]
    )
    for x in (torch.ones(5, 3, 4), -torch.ones(2, 7, 4)):
        assert torch.equal(
            interpret(replace(on_paper, params=dict(block.named_parameters())), (x,), {}), block(x)
        )
        assert shapes_of(on_paper.code, [x]) == [tuple(x.shape)]
    with pytest.raises(QlabError, match=r"h\.7 \(Fails\) cannot be traced by torch\.export: no"):
        trace(Fails(), (torch.zeros(2, 3, 4),), {}, "h.7")


def test_inputs_of_another_form_are_refused():
    seg = segment("llama")
    args, kwargs = calls(model_of("llama"), tokens(2, 12), left_padded(2, 12))["model.layers.0"]
    with pytest.raises(
        QlabError, match=r"model\.layers\.0 was traced with 4 input tensors and is called with 5"
    ):
        interpret(seg.graph, args, kwargs)


def test_a_rounded_weight_is_not_rounded_again():
    seg = segment("opt")
    graph, _ = seg.solve(rtn(parse_spec("int4-g16")))
    with pytest.raises(
        QlabError, match=r"model\.decoder\.layers\.0\.self_attn\.\w+ is quantized already"
    ):
        seg.solve(rtn(parse_spec("int4-g16")), graph)
