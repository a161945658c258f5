"""R1: which residual streams may turn is read off the program, and turning them keeps the
function."""

import pytest
import torch
from families import FAMILIES, MIXTURES, OTHERS, WRITTEN_OUT
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import refused
from segments import batches_of, hidden, normal, of, relative, run_checked, segment

import qlab
from qlab.algebra.frame import in_frame, keeping_ones
from qlab.algebra.groups import Nothing
from qlab.algebra.interpret import interpret
from qlab.algebra.residual import Frame, Orthogonal, residual
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec
from qlab.driver.lossless import refuse_changed
from qlab.methods.hadamard import random_hadamard, random_orthogonal

# a norm behind a weight scales channels before the sum
STANDS = {"gemma2": "mul", "gemma3_text": "mul", "olmo2": "mul"}
TURNING = [
    family for family in (*FAMILIES, *MIXTURES, *OTHERS, *WRITTEN_OUT) if family not in STANDS
]
# layer norms subtract a mean, which R has to keep
CENTRED = {"opt", "gpt_neox", "gpt2", "falcon", "cohere", "bloom", "xglm"}


@pytest.mark.parametrize("family", TURNING)
def test_a_block_in_another_basis_computes_the_same(family):
    seg = segment(family)
    graph, _ = run_checked(seg, qlab.rotate_residual())
    for batch in seg.batches[:2]:
        out, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
        assert relative(out, before) < 1e-4
    assert graph.inserts.keys() == {"enter", "leave"}
    group = residual(seg.graph.code)
    assert group.centred == (family in CENTRED)
    gains = {gain.weight: gain.offset for gain in group.readers.values() if gain is not None}
    assert gains
    assert all((graph.params[name] + offset == 1).all() for name, offset in gains.items())


@pytest.mark.parametrize("family", STANDS)
def test_what_does_not_turn_is_refused_by_the_operation(family):
    seg = segment(family)
    group = residual(seg.graph.code)
    assert isinstance(group, Nothing) and STANDS[family] in group.reason
    refused(lambda: run_checked(seg, qlab.rotate_residual()), seg.graph.path, group.reason)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "mixtral"])
def test_in_its_frame_it_is_f_of_h_r(family):
    """f'(h R) = f(h) R, of an R that is no Hadamard matrix, and of another one not f(h) R'."""
    seg = segment(family)
    group = residual(seg.graph.code)
    assert isinstance(group, Orthogonal) and group.size == 64
    Q = torch.linalg.qr(normal(64, 64, seed=0))[0]
    R = keeping_ones(Q) if group.centred else Q
    turned = in_frame(group.apply(seg.graph, R))
    assert not turned.inserts
    (h, *rest), kwargs = seg.batches[0]
    out = hidden(interpret(turned, (h @ R, *rest), kwargs))
    before = hidden(interpret(seg.graph, *seg.batches[0]))
    assert relative(out, before @ R) < 1e-5
    assert relative(out, before @ Q.T) > 0.1


class Norm(torch.nn.Module):
    """An RMS norm whose gain is stored less 1, as gemma's."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(0.3 * normal(12, seed=2))

    def forward(self, x):
        size = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * size * (1.0 + self.weight)


class Ends(torch.nn.Module):
    """A norm and a linear beside the stream; what leaves is of choice."""

    def __init__(self, leaving):
        super().__init__()
        self.leaving, self.norm, self.one = leaving, Norm(), torch.nn.Linear(12, 12)

    def forward(self, x):
        y = x + self.one(self.norm(x))
        return self.leaving(y, self.norm)


@pytest.mark.parametrize(
    ("leaving", "turns"),
    [
        (lambda y, norm: y, True),
        (lambda y, norm: norm(y), False),
        (lambda y, norm: (y, norm(y)), False),
    ],
)
def test_the_stream_alone_leaves_in_its_basis(leaving, turns):
    group = residual(of(Ends(leaving), normal(2, 5, 12, seed=0)).graph.code)
    assert isinstance(group, Orthogonal if turns else Nothing)


def test_a_gain_that_is_stored_less_a_constant_counts_with_it():
    x = normal(2, 7, 12, seed=1)
    seg = of(Ends(lambda y, norm: y), x)
    group = residual(seg.graph.code)
    assert {gain.offset for gain in group.readers.values()} == {1.0}
    turned = group.apply(seg.graph, torch.linalg.qr(normal(12, 12, seed=0))[0])
    assert not turned.params["norm.weight"].any()
    out, before = (hidden(interpret(graph, (x,), {})) for graph in (turned, seg.graph))
    assert relative(out, before) < 1e-5


def test_the_seed_decides():
    seg = segment("llama")
    matrix = lambda seed: run_checked(seg, qlab.rotate_residual(seed))[0].inserts["enter"][0].M_nn
    assert torch.equal(matrix(1), matrix(1)) and not torch.equal(matrix(1), matrix(2))


def test_layer_norms_need_an_r_that_keeps_the_mean():
    """Without that the check of the claim refuses it."""
    seg = segment("opt")
    group, (stage,) = residual(seg.graph.code), qlab.rotate_residual()
    Q = random_orthogonal(64, torch.Generator().manual_seed(0))
    wrong = group.apply(seg.graph, Q)
    refused(
        lambda: refuse_changed(stage, seg.graph, wrong, None, batches_of(seg)), "rotate_residual"
    )


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_a_matrix_that_keeps_the_ones_is_orthogonal_and_near_the_one_before(power, seed, haar):
    n = 2**power
    draw = random_orthogonal if haar else random_hadamard
    Q = draw(n, torch.Generator().manual_seed(seed))
    R = keeping_ones(Q)
    ones = torch.ones(n)
    assert relative(ones @ R, ones) < 1e-5 and relative(R @ ones, ones) < 1e-5
    assert (R @ R.T - torch.eye(n)).abs().max() < 1e-5
    assert torch.linalg.matrix_rank(R - Q, atol=1e-4) <= 1
    assert torch.equal(keeping_ones(R), R) or relative(keeping_ones(R), R) < 1e-4


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_weights_that_read_outliers_become_incoherent(family):
    seg = segment(family)
    site = seg.graph.code.sites[0]
    W = seg.graph.params[site.weight].clone()
    W[:, [3, 50]] *= 30
    graph = seg.graph.update({site.weight: W})
    rotated, _ = run_checked(seg, qlab.rotate_residual(), graph=graph)
    largest = lambda g: float(g.weight_ok(site).abs().max() / g.weight_ok(site).std())
    assert largest(rotated) < 0.5 * largest(graph)


def test_all_four_rotations_and_a_rounding_come_together():
    seg, int8 = segment("llama"), parse_spec("int8-g16")
    rotations = qlab.chain(qlab.rotate_residual(), qlab.quarot(), qlab.rotate_scores())
    graph, _ = run_checked(seg, qlab.chain(rotations, qlab.rtn(int8)))
    out, before = (hidden(interpret(g, *seg.batches[0])) for g in (graph, seg.graph))
    assert 0 < relative(out, before) < 0.03


def test_a_bias_without_a_gain_is_refused():
    seg = segment("opt")
    gain = next(iter(residual(seg.graph.code).readers.values()))
    weight = seg.graph.params[gain.weight].clone()
    weight[5] = 0
    graph = seg.graph.update({gain.weight: weight})
    refused(lambda: run_checked(seg, qlab.rotate_residual(), graph=graph), gain.weight, gain.bias)


def test_what_stands_at_the_ends_is_refused():
    seg, (stage,) = segment("llama"), qlab.rotate_residual()
    inserted = seg.graph.inserting("leave", torch.abs)
    refused(lambda: apply(stage, inserted, {}), ":leave", "first in the recipe")
    turned, _ = apply(stage, seg.graph, {})
    assert all(isinstance(op, Frame) for ops in turned.inserts.values() for op in ops)
    refused(lambda: in_frame(turned.inserting("leave", torch.abs)), ":leave", "another wire")


def test_a_rule_for_a_part_of_a_block_is_refused():
    part = qlab.at("*mlp*", qlab.rotate_residual())
    refused(lambda: run_checked(segment("llama"), part), "self_attn.q_proj", "whole model")
