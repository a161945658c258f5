"""The target that held-out tokens bear out: never worse on them than the weight itself."""

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from segments import assert_same, batches_of, hidden, normal, relative, segment
from test_gptaq import drifted, drifting

from qlab.algebra.graph import lone_weight
from qlab.algebra.interpret import interpret
from qlab.algebra.leaf import dense
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import HELD_OUT, STATS, STRETCH, Drifting
from qlab.algebra.transform import chain, each_cell
from qlab.driver.observe import Reference
from qlab.driver.solve import solve_in_order
from qlab.errors import QlabError
from qlab.methods import METHODS, PRUNERS
from qlab.methods.gptaq import aim_at_reference
from qlab.methods.gptq import gptq
from qlab.methods.loaq import aim_in_stream
from qlab.methods.qronos import aim_held_out, choose, correction, followed, rest

SPEC = parse_spec("int4-g16")
SHAPES = st.tuples(st.integers(1, 8), st.integers(2, 12), st.integers(0, 99))
ROWS = 2 * HELD_OUT * STRETCH
MASKED = [("llama", "sparsegpt"), ("gpt2", "magnitude"), ("qwen3_moe", "wanda")]
NAMES = ("second_moment", "drift", "held_out")


def seen_of(x, other, first=0):
    keys = torch.arange(len(x)) + first
    observation = Observation(x, keys, reference_nk=other)
    return {name: STATS[name].lift(observation) for name in NAMES}


def held_out_rows(n):
    return (torch.arange(n) // STRETCH) % HELD_OUT == HELD_OUT - 1


def aimed(W_ok, x, other, **options):
    graph, [stage] = lone_weight("m", W_ok), aim_held_out(**options)
    stats = {("m", name): state for name, state in seen_of(x, other).items()}
    graph, _ = stage.apply(graph, stats)
    return graph.weight_ok(graph.sites[0]), graph.notes.get("m", {})


@given(SHAPES, st.sampled_from([(0.01,), (0.01, 1.0)]))
def test_what_is_chosen_is_never_worse_on_the_tokens_that_were_held_out(shape, damps):
    o, k, seed = shape
    W, (x, other) = normal(o, k, seed=seed + 3), drifting(k, seed, ROWS)
    seen = seen_of(x, other)
    total = Drifting(seen["second_moment"], seen["drift"])
    fitted = rest(total, seen["held_out"])
    aim = choose(W, fitted, seen["held_out"], damps)
    held = held_out_rows(len(x))
    x_h, goal = x[held].double(), other[held].double() @ W.double().T
    C = correction(W, fitted, aim.damp).double()

    def error(strength):
        return float((x_h @ (W.double() + strength * C).T - goal).square().sum())

    assert 0 <= aim.strength <= 1 and error(aim.strength) <= error(0) * (1 + 1e-6)
    size = float((x_h @ W.double().T).square().sum())
    assert aim.gain == pytest.approx((error(0) - error(aim.strength)) / size, rel=1e-2, abs=1e-5)
    tried = [error(a / 20) for a in range(21)]
    assert error(aim.strength) <= min(tried) + 1e-5 * size


@given(SHAPES)
def test_the_rest_is_what_was_not_held_out(shape):
    _, k, seed = shape
    x, other = drifting(k, seed, ROWS)
    seen, held = seen_of(x, other), held_out_rows(ROWS)
    fitted = rest(Drifting(seen["second_moment"], seen["drift"]), seen["held_out"])
    kept = seen_of(x[~held], other[~held])
    assert fitted.moment.tokens == int((~held).sum())
    for a, b in zip(fitted, (kept["second_moment"], kept["drift"])):
        assert torch.allclose(a.sum_kk, b.sum_kk, rtol=1e-3, atol=1e-2)


def test_nothing_is_fitted_to_what_rounding_leaves_of_sums():
    """A held-out token, rotated over all channels, outweighs the others by 1e10."""
    k = 48
    x = normal(HELD_OUT * STRETCH, k, seed=5)
    x[-1] = 1e5 * normal(k, seed=6).sign()
    seen = Observation(x, torch.arange(len(x)), None, x + 0.1 * normal(*x.shape, seed=7))
    total = Drifting(STATS["second_moment"].lift(seen), STATS["drift"].lift(seen))
    held_out = STATS["held_out"].lift(seen)
    fitted = rest(total, held_out)
    assert torch.linalg.eigvalsh(fitted.moment.mean_kk.double()).min() <= 0
    aim = choose(normal(8, k, seed=8), fitted, held_out, (0.01, 0.1, 1.0))
    assert (aim.strength, aim.gain) == (0.0, 0.0)
    broken = fitted.moment._replace(sum_kk=fitted.moment.sum_kk * torch.inf)
    with pytest.raises(QlabError, match="beyond float32"):
        choose(normal(8, k, seed=8), Drifting(broken, fitted.drift), held_out, (0.01,))


def test_drift_that_is_noise_moves_nothing_much_and_drift_that_is_linear_is_undone():
    k = 48
    W, x = normal(16, k, seed=1), normal(4 * STRETCH, k, seed=2)
    noise = x + normal(len(x), k, seed=3)
    moved, note = aimed(W, x, noise)
    assert note["aim_strength"] < 0.2 and relative(moved, W) < 0.1
    linear = x @ (torch.eye(k) + 0.1 * normal(k, k, seed=4))
    moved, note = aimed(W, x, linear)
    assert note["aim_strength"] > 0.9 and note["aim_damp"] == 0.01
    assert relative(x @ moved.T, linear @ W.T) < 0.05


@given(SHAPES)
def test_without_drift_or_tokens_to_hold_out_the_weight_keeps_its_bits(shape):
    o, k, seed = shape
    W, (x, other) = normal(o, k, seed=seed), drifting(k, seed, ROWS)
    assert torch.equal(aimed(W, x, None)[0], W) and torch.equal(aimed(W, x, x)[0], W)
    few = STRETCH // 2
    assert torch.equal(aimed(W, x[:few], other[:few])[0], W)


@given(SHAPES, st.integers(1, 3))
def test_the_held_out_tokens_do_not_depend_on_batches(shape, parts):
    _, k, seed = shape
    x, other = drifting(k, seed, ROWS)
    stat, cut = STATS["held_out"], parts * ROWS // 4
    whole = seen_of(x, other)["held_out"]
    halves = seen_of(x[:cut], other[:cut]), seen_of(x[cut:], other[cut:], cut)
    joined = stat.combine(halves[1]["held_out"], halves[0]["held_out"])
    m = normal(k, seed=seed).abs() + 0.5
    moved, again = stat.transport(whole, m), seen_of(x * m, other * m)["held_out"]
    for a, b in (*zip(whole, joined), *zip(moved, again)):
        assert a.tokens == b.tokens
        assert torch.allclose(a.sum_kk, b.sum_kk, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_a_block_whose_inputs_drift_ends_nearer_to_the_reference(family, monkeypatch):
    monkeypatch.setattr("qlab.algebra.stats.STRETCH", 4)
    seg, reference = segment(family), segment(family).graph
    exact = [hidden(interpret(reference, *batch)) for batch in seg.batches]
    _, (plain,) = solve_in_order(reference, gptq(SPEC), drifted(seg))
    recipe = chain(aim_held_out(), gptq(SPEC))
    graph, (aimed_at, _) = solve_in_order(
        reference, recipe, drifted(seg), reference=Reference(reference, batches_of(seg))
    )
    errors = [
        sum(relative(hidden(out), y) for out, y in zip(stream, exact))
        for stream in (plain, aimed_at)
    ]
    assert errors[1] < errors[0]
    by_path = {site.path: site for site in graph.sites}
    for path, note in graph.notes.items():
        site = by_path[path]
        assert ("aim_strength" in note) == (not site.route and not site.router)


@given(SHAPES)
def test_a_leaf_that_follows_its_target_on_a_support_is_never_further_from_it(shape):
    o, k, seed = shape
    T, step, x = (normal(n, k, seed=seed + i) for i, n in enumerate((o, o, 3 * k)))
    support = normal(o, k, seed=seed) > 0
    L, moment = T * support + 0.1 * normal(o, k, seed=seed + 5) * support, moment_of(x)
    new = followed(L, T + step, step * support, moment)
    before, after = (((T + step - leaf) @ x.T).square().sum(1) for leaf in (L, new))
    assert not new[~support].any() and (after <= before * (1 + 1e-4) + 1e-4).all()


def moment_of(x):
    return STATS["second_moment"].lift(Observation(x, torch.arange(len(x))))


@pytest.mark.parametrize("aim", [aim_held_out, aim_in_stream, aim_at_reference])
@pytest.mark.parametrize("family, pruner", [*MASKED])
def test_behind_a_mask_the_target_moves_and_its_zeros_stay(family, pruner, aim, monkeypatch):
    monkeypatch.setattr("qlab.algebra.stats.STRETCH", 4)
    cells = {}

    def look(weight):
        cells[weight.name, weight.expert] = weight.cell
        return weight.cell

    graph = in_order(family, chain(PRUNERS[pruner]("2:4"), aim(), each_cell("look", look)))
    sites, moved = {graph.where(site): site for site in graph.sites}, 0
    for (name, expert), cell in cells.items():
        assert (~cell.support).any() and not cell.leaf[~cell.support].any()
        W = segment(family).graph.weight_ok(sites[name], expert)
        elsewhere = not torch.equal(cell.target, W)
        assert not elsewhere or expert is None
        moved += elsewhere
    assert moved


@pytest.mark.parametrize("aim", [aim_held_out, aim_in_stream, aim_at_reference])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_behind_a_mask_an_aim_brings_the_block_nearer_to_the_reference(family, aim, monkeypatch):
    """Also where SparseGPT made up for its zeros, which the leaf that follows keeps."""
    monkeypatch.setattr("qlab.algebra.stats.STRETCH", 4)
    seg, mask = segment(family), PRUNERS["sparsegpt"]("2:4")
    exact = [hidden(interpret(seg.graph, *batch)) for batch in seg.batches]
    errors = []
    for recipe in (mask, chain(mask, aim())):
        reference = Reference(seg.graph, batches_of(seg))
        _, (left, *_) = solve_in_order(seg.graph, recipe, drifted(seg), reference=reference)
        errors.append(sum(relative(hidden(out), y) for out, y in zip(left, exact)))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("method", ["qronos-refined", "loaq-refined", "gptaq"])
@pytest.mark.parametrize("family, pruner", [*MASKED])
def test_zeros_outlive_an_aim_and_its_solver(family, pruner, method, monkeypatch):
    monkeypatch.setattr("qlab.algebra.stats.STRETCH", 4)
    mask = PRUNERS[pruner]("2:4")
    graph = in_order(family, chain(mask, METHODS[method](SPEC)))
    for site in graph.sites:
        if not site.router:
            experts = [None] if site.route is None else range(len(graph.support_ok(site)))
            for e in experts:
                zeros = ~graph.support_ok(site, e)
                assert zeros.any() and not dense(graph.leaf_ok(site, e))[zeros].any()


def in_order(family, recipe):
    """A block whose inputs drift, solved."""
    seg = segment(family)
    reference = Reference(seg.graph, batches_of(seg))
    return solve_in_order(seg.graph, recipe, drifted(seg), reference=reference)[0]


def test_on_the_reference_s_own_activations_it_changes_nothing():
    seg = segment("llama")
    assert_same(seg.solve(chain(aim_held_out(), gptq(SPEC)))[0], seg.solve(gptq(SPEC))[0])


def test_bad_settings_are_refused():
    with pytest.raises(QlabError, match="damps is empty"):
        aim_held_out(())
    with pytest.raises(QlabError, match="damp is 3"):
        aim_held_out((0.1, 3))
