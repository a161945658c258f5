"""Pruning: patterns hold, kept weights stay where the paper keeps them, and what SparseGPT makes up
for is worth it."""

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from segments import correlated, moment, normal, segment

from qlab.algebra.interpret import interpret
from qlab.algebra.leaf import dense
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain
from qlab.errors import QlabError
from qlab.methods import PRUNERS
from qlab.methods.gptq import gptq
from qlab.methods.magnitude import magnitude
from qlab.methods.obs import damped
from qlab.methods.pattern import Pattern, parse_pattern
from qlab.methods.rtn import rtn
from qlab.methods.sparsegpt import pruned, sparsegpt
from qlab.methods.wanda import wanda

SPEC = parse_spec("int4-g16")
SEEDS = st.integers(0, 999)
PATTERNS = ("2:4", "4:8", "1:4", 0.5, 0.25)


def leaves(graph):
    """(site, expert, leaf [o, k]) of all weights but routers."""
    for site in graph.sites:
        for e in [None] if site.route is None else range(graph.params[site.weight].shape[0]):
            if not site.router:
                yield site, e, graph.leaf_ok(site, e)


def assert_holds(pattern, zeros):
    """The zeros [o, k] of a weight are those of a pattern."""
    kind = parse_pattern(pattern)
    if kind.of:
        in_groups = (~zeros).unflatten(-1, (-1, kind.of)).sum(-1)
        assert (in_groups == kind.keep).all()
    else:
        assert float(zeros.float().mean()) == pytest.approx(kind.zeros, abs=1 / zeros.shape[-1])


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_patterns_hold_and_survive_rounding(name, family):
    seg = segment(family)
    for pattern in ("2:4", 0.5):
        mask = PRUNERS[name](pattern)
        bare = seg.solve(mask)[0]
        for method in (rtn, gptq):
            rounded = seg.solve(chain(mask, method(SPEC)))[0]
            for (site, _, W), (_, _, q) in zip(leaves(bare), leaves(rounded)):
                assert_holds(pattern, W == 0)
                assert not dense(q)[W == 0].any()
                assert bare.notes[site.path]["zeros"] == pytest.approx(0.5, abs=0.02)
        out = interpret(bare, *seg.batches[0])
        assert torch.isfinite(out if isinstance(out, torch.Tensor) else out[0]).all()


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_kept_weights_are_untouched(name, pattern):
    seg = segment("gpt2")
    graph = seg.solve(PRUNERS[name](pattern))[0]
    for site, e, W in leaves(graph):
        assert_holds(pattern, W == 0)
        kept = W != 0
        assert torch.equal(W[kept], seg.graph.weight_ok(site, e)[kept])


def test_magnitude_drops_the_smallest_of_a_layer_and_wanda_of_a_row():
    seg = segment("llama")
    by_size, by_score = (seg.solve(p(0.5))[0] for p in (magnitude, wanda))
    for (site, e, W), (_, _, V) in zip(leaves(by_size), leaves(by_score)):
        before = seg.graph.weight_ok(site, e)
        assert before[W == 0].abs().max() <= before[W != 0].abs().min()
        size_k = seg.stats[site.source, "second_moment"].mean_square_k.sqrt()
        score = before.abs() * size_k
        dropped = score.masked_fill(V != 0, 0).amax(1)
        assert (dropped <= score.masked_fill(V == 0, torch.inf).amin(1)).all()
        assert ((V == 0).sum(1) == V.shape[1] // 2).all()


@given(SEEDS, st.sampled_from(PATTERNS), st.floats(0.01, 100))
def test_on_white_inputs_sparsegpt_is_magnitude_pruning(seed, pattern, c):
    W, kind = normal(6, 32, seed=seed), parse_pattern(pattern)
    W_pruned, kept, _ = pruned(W, c * torch.eye(32), kind, damp=0.01)
    assert torch.equal(W_pruned, W * kept)
    assert torch.equal(kept, kind.kept_overall(W.abs()))


@given(SEEDS, st.sampled_from(["2:4", "4:8", 0.5]))
def test_sparsegpt_is_the_textbook_elimination(seed, pattern):
    """Choose zeros of a group on weights as they are, set them, repair the rest by H^-1, and go
    on."""
    W, kind = normal(5, 16, seed=seed).double(), parse_pattern(pattern)
    H = moment(correlated(80, 16, seed)).mean_kk.double()
    inverse = torch.linalg.inv(damped(H, 0.01))
    V, kept = W.clone(), torch.ones_like(W, dtype=torch.bool)
    size = kind.of or 16
    for start in range(0, 16, size):
        at_once = range(start, start + size)
        curvature, step = [], inverse.clone()
        for j in at_once:
            curvature.append(1 / step[j, j])
            step = step - step[:, j : j + 1] * step[j] / step[j, j]
        group = slice(start, start + size)
        kept[:, group] = kind.kept_overall(V[:, group] ** 2 * torch.stack(curvature))
        for j in at_once:
            error = V[:, j] * ~kept[:, j] / inverse[j, j]
            V[:, j:] -= error[:, None] * inverse[j, j:]
            V[:, j] *= kept[:, j]
            inverse = inverse - inverse[:, j : j + 1] * inverse[j] / inverse[j, j]
    W_pruned, support, used = pruned(W, H, kind, damp=0.01)
    assert torch.equal(support, kept) and used == 0.01
    assert torch.allclose(W_pruned, V * kept, atol=1e-8)


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_making_up_for_zeros_lowers_the_output_error(pattern):
    """SparseGPT below Wanda below magnitude, and jointly with codes below one after the other."""
    seg = segment("llama")
    recipes = {
        "magnitude": magnitude(pattern),
        "wanda": wanda(pattern),
        "sparsegpt": sparsegpt(pattern),
        "then": chain(sparsegpt(pattern), rtn(SPEC)),
        "jointly": chain(sparsegpt(pattern), gptq(SPEC)),
    }
    site = next(s for s in seg.graph.sites if s.path == "mlp.up_proj")
    H, W = seg.stats[site.source, "second_moment"], seg.graph.weight_ok(site)
    J = {}
    for name, recipe in recipes.items():
        graph = seg.solve(at("*.up_proj", recipe))[0]
        J[name] = H.output_error(dense(graph.params[site.weight], torch.float32) - W)
    assert J["sparsegpt"] < 0.9 * J["wanda"] and J["wanda"] <= J["magnitude"]
    assert J["jointly"] < 0.98 * J["then"]


def test_a_second_mask_narrows_the_first():
    seg = segment("llama")
    for name, prune in PRUNERS.items():
        once, twice = (seg.solve(t)[0] for t in (wanda("4:8"), chain(wanda("4:8"), prune("2:8"))))
        for (_, _, W), (_, _, V) in zip(leaves(once), leaves(twice)):
            assert not V[W == 0].any(), name
            assert_holds("2:8", V == 0)


@pytest.mark.parametrize(
    "pattern", ["4:2", "0:4", "4:4", "2:4:8", "half", "", 0.0, 1.0, -0.5, 1, 2, None, True, "nan"]
)
@pytest.mark.parametrize("name", PRUNERS)
def test_what_is_no_pattern_is_refused(name, pattern):
    with pytest.raises(QlabError, match=r"the pattern .* keeps no part of the weights; give N:M"):
        PRUNERS[name](pattern)


def test_patterns_that_do_not_fit_a_weight_are_refused_by_site():
    for name, prune in PRUNERS.items():
        with pytest.raises(QlabError, match=r"q_proj: the 64 input channels are no multiple of 7"):
            segment("llama").solve(prune("3:7"))
        assert name
    with pytest.raises(QlabError, match="damp is 2"):
        sparsegpt("2:4", damp=2)
    assert str(parse_pattern(" 2:4")) == "2:4" and str(parse_pattern("0.5")) == "0.5"
    assert parse_pattern(Pattern(keep=2, of=4)) == parse_pattern("2:4")
