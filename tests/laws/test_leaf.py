"""Leaves: what a program computes does not depend on the form in which it holds a weight, in every
layout and for experts."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from segments import hidden, normal, segment, tensors
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.grid import encode, minmax
from qlab.algebra.interpret import interpret
from qlab.algebra.leaf import LowRank, Sum, bits, dense, is_leaf, proper
from qlab.algebra.qtensor import QTensor
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import Stage, chain, each_weight
from qlab.driver.report import site_rows
from qlab.driver.writing import refuse_unwritten
from qlab.errors import QlabError
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")
LAYOUTS = pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])


@dataclass(frozen=True)
class Palette:
    """A leaf of one's own: numbers c of a palette, W[..., o, k] = numbers[..., c[..., o, k]]."""

    numbers: Tensor
    which: Tensor

    @property
    def shape(self):
        return self.which.shape

    def dense(self, dtype=None):
        picked = self.numbers.gather(-1, self.which.flatten(-2)).view(self.shape)
        return picked if dtype is None else picked.to(dtype)

    def bits(self):
        return bits(self.numbers) + math.log2(self.numbers.shape[-1]) * self.which.numel()


pytree.register_pytree_node(
    Palette, lambda p: ([p.numbers, p.which], None), lambda parts, _: Palette(*parts)
)


def palette(W_ok, size=16):
    numbers = torch.linspace(float(W_ok.min()), float(W_ok.max()), size)
    return Palette(numbers, (W_ok[..., None] - numbers).abs().argmin(-1))


def low_rank(W_ok, rank=4):
    U, S, V = torch.svd_lowrank(W_ok, rank, niter=4)
    return LowRank(U * S, V.mT.contiguous())


def compensated(W_ok, spec):
    q = encode(minmax, W_ok, spec)
    return Sum((q, low_rank(W_ok - dense(q, torch.float32))))


FORMS = {"palette": palette, "low_rank": low_rank, "sum": lambda W: compensated(W, SPEC)}


@LAYOUTS
@pytest.mark.parametrize("form", FORMS)
def test_a_leaf_computes_and_is_measured_as_its_dense_weight(family, form):
    torch.manual_seed(0)
    seg, spec = segment(family), SPEC if form == "sum" else None
    needs = frozenset({"second_moment"})

    def fn(W_ok, stats, spec):
        torch.manual_seed(1)
        return FORMS[form](W_ok), {"tried": 1}

    def as_dense(W_ok, stats, spec):
        torch.manual_seed(1)
        return dense(FORMS[form](W_ok), torch.float32), {"tried": 1}

    graph, _ = seg.solve(each_weight("mine", fn, spec, needs))
    plain, _ = seg.solve(each_weight("mine", as_dense, None, needs))
    out, expected = (hidden(interpret(g, *seg.batches[0])) for g in (graph, plain))
    assert torch.allclose(out, expected, atol=1e-5)
    assert not torch.allclose(out, hidden(interpret(seg.graph, *seg.batches[0])), atol=1e-4)
    for site in (s for s in graph.sites if not s.router):
        assert is_leaf(graph.params[site.weight])
        assert not isinstance(graph.params[site.weight], Tensor)
        note, other = graph.notes[site.path], plain.notes[site.path]
        assert note["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert note["weight_error"] == pytest.approx(other["weight_error"], rel=1e-4)
    rows = site_rows(graph)
    for site in (s for s in graph.sites if not s.router):
        row, leaf = rows[graph.where(site)], graph.params[site.weight]
        assert row["bits_per_weight"] == pytest.approx(leaf.bits() / leaf.shape.numel())
        assert ("spec" in row and str(SPEC) in str(row["spec"])) == (form == "sum")


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral"])
def test_gradients_reach_the_floating_point_parts(family):
    seg = segment(family)
    graph, _ = seg.solve(each_weight("mine", lambda W, s, spec: (compensated(W, spec), {}), SPEC))
    leaves = {
        site.weight: pytree.tree_map_only(
            Tensor,
            lambda t: t.clone().requires_grad_() if t.is_floating_point() else t,
            graph.params[site.weight],
        )
        for site in graph.sites
        if not site.router
    }
    with torch.enable_grad():
        out = hidden(interpret(graph.update(leaves), *seg.batches[0]))
        out.square().sum().backward()
    for leaf in leaves.values():
        codes, beside = leaf.parts
        assert codes.scales.grad.any() and beside.A_rk.grad.any() and beside.B_or.grad.any()


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_a_low_rank_and_a_sum_are_what_they_say(o, k, r, seed):
    B, A, W = normal(2, o, r, seed=seed), normal(2, r, k, seed=seed + 1), normal(2, o, k, seed=seed)
    thin = LowRank(B, A)
    assert thin.shape == (2, o, k) and torch.equal(thin.dense(), B @ A)
    assert thin.bits() == 32 * 2 * r * (o + k)
    both = Sum((W, thin))
    assert torch.allclose(both.dense(torch.float64), W.double() + B.double() @ A.double())
    assert both.bits() == 32 * W.numel() + thin.bits() and proper(both) is W
    again = pytree.tree_map_only(Tensor, torch.clone, both)
    assert isinstance(again, Sum) and torch.equal(again.dense(), both.dense())


@given(st.sampled_from(["int4-g16", "int3-g16-asym", "int8-channel", "nvfp4"]))
def test_codes_count_their_bits(text):
    spec = parse_spec(text)
    q = encode(minmax, normal(8, 32, seed=0), spec)
    assert q.bits() == pytest.approx(spec.bits_per_weight(q.shape, torch.float32) * 8 * 32)
    assert torch.equal(q.dense(torch.float64), dense(q, torch.float64))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: LowRank(torch.ones(3, 2), torch.ones(3, 4)), r"B \(3, 2\) and A \(3, 4\) .*rank"),
        (lambda: LowRank(torch.ones(2, 3, 2), torch.ones(2, 4)), "no product"),
        (lambda: Sum(()), "no part"),
        (lambda: Sum((torch.ones(2, 2), torch.ones(2, 3))), r"\(2, 2\) and \(2, 3\); give leaves"),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, words):
    with pytest.raises(QlabError, match=words):
        make()


def refused(seg, transform, words):
    with pytest.raises(QlabError, match=words):
        seg.solve(transform)


def test_a_sum_is_bound_by_its_first_part():
    seg, other = segment("llama"), parse_spec("int3-g16")
    mine = lambda fn, spec: each_weight("mine", lambda W, stats, spec: (fn(W), {}), spec)
    coarse = lambda W: compensated(W, other)
    refused(seg, mine(coarse, SPEC), r"q_proj: mine made int3-g16 and is to round to int4-g16")
    refused(seg, mine(coarse, None), r"q_proj: mine made int3-g16 and is to round nothing")
    refused(seg, mine(low_rank, SPEC), r"q_proj: mine made plain numbers and is to round to int4")
    nan = lambda W: Sum((encode(minmax, W, SPEC), LowRank(W[:, :1] * torch.nan, W[:1])))
    refused(seg, mine(nan, SPEC), r"q_proj: mine made a weight that holds NaN or Inf")


def test_experts_of_unlike_forms_are_refused_by_site():
    ranks = iter(range(1, 99))
    mine = each_weight("mine", lambda W, s, spec: (low_rank(W, next(ranks)), {}), None)
    refused(segment("mixtral"), mine, r"experts.*: of what mine made expert 1 is unlike expert 0")


def test_no_format_holds_other_leaves_and_no_array_method_rounds_them():
    seg = segment("llama")
    thin = each_weight("thin", lambda W, stats, spec: (low_rank(W), {}), None)
    graph, _ = seg.solve(thin)
    with pytest.raises(QlabError, match=r"q_proj\.weight a LowRank, which no format holds"):
        refuse_unwritten(None, seg.graph, graph)
    refused(seg, chain(thin, rtn(SPEC)), r"q_proj is quantized already")


def test_a_type_that_pytrees_do_not_know_is_no_leaf():
    class Bare:
        shape = torch.Size([128, 64])

        def dense(self, dtype=None):
            return torch.zeros(self.shape)

        def bits(self):
            return 0.0

    seg, bare = segment("llama"), Bare()
    assert not is_leaf(bare) and not is_leaf(None) and is_leaf(torch.ones(2))
    put = Stage("mine", frozenset(), lambda g, s: (g.update({"mlp.up_proj.weight": bare}), s))
    with pytest.raises(QlabError, match=r"up_proj\.weight a Bare, which no file holds"):
        apply(put, seg.graph, {})
    assert isinstance(proper(replace(Sum((encode(minmax, torch.ones(2, 16), SPEC),)))), QTensor)
    assert tensors([Sum((torch.ones(1, 1), LowRank(torch.ones(1, 1), torch.ones(1, 1))))])
