"""Cells: what a step puts lies on the grid and the support that the cell has, a mask survives every
later step, and what a step aims at is what later ones are measured against."""

from dataclasses import replace

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from methods import LAW_METHODS
from segments import normal, segment, untouched

from qlab.algebra.cell import Cell, Feasible, zero_codes
from qlab.algebra.grid import encode, minmax
from qlab.algebra.leaf import LowRank, Sum, dense, proper
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import Stage, at, chain, each_cell, each_weight
from qlab.errors import QlabError
from qlab.methods.gptq import gptq
from qlab.methods.grid import weighted
from qlab.methods.hqq import hqq
from qlab.methods.obs import damped
from qlab.methods.quantease import descend_codes
from qlab.methods.rtn import rtn

SPEC, ASYM = parse_spec("int4-g16"), parse_spec("int3-g16-asym")
HESSIAN = frozenset({"second_moment"})
# rounding steps, by the specs they take
ROUNDING = sorted(m for m in LAW_METHODS if any(stage.spec for stage in LAW_METHODS[m](SPEC)))
# A rotation has no zeros where its weight had some.
TURNED = sorted(
    method
    for method in ROUNDING
    if any("rotate" in s.name or s.name == "incoherence" for s in LAW_METHODS[method](SPEC))
)
FAMILIES = ("llama", "gpt2", "qwen3_moe")


def refused(seg, transform, words):
    with pytest.raises(QlabError, match=words) as error:
        seg.solve(transform)
    assert "\n" not in str(error.value)


def larger_half(weight):
    """The larger two of every four weights of the target."""
    rank = weight.cell.target.abs().unflatten(-1, (-1, 4)).argsort(-1).argsort(-1)
    return weight.cell.narrow(support=(rank >= 2).flatten(-2))


MASK = each_cell("mask", larger_half)


def weights(graph):
    """(site, expert, leaf [o, k], target [o, k], support [o, k]) of all weights but routers."""
    for site in graph.sites:
        if site.router:
            continue
        experts = [None] if site.route is None else range(graph.params[site.weight].shape[0])
        for e in experts:
            yield (
                site,
                e,
                graph.leaf_ok(site, e),
                graph.target_ok(site, e),
                graph.support_ok(site, e),
            )


def cell_of(W_ok, spec=None, support=None):
    return Cell(target=W_ok, leaf=W_ok, feasible=Feasible(spec, support), name="proj", step="mine")


# ------------------------------------------------------------------ a mask survives
BOTH = {"llama": (SPEC, ASYM), "gpt2": (SPEC,), "qwen3_moe": (ASYM,)}


@pytest.mark.parametrize("method", [m for m in ROUNDING if m not in (*TURNED, "gptaq")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_survives_every_later_step(method, family):
    seg = segment(family)
    for spec in BOTH[family]:
        graph, _ = seg.solve(chain(MASK, LAW_METHODS[method](spec)))
        for site, _, leaf, _, support in weights(graph):
            W = dense(proper(leaf), torch.float32)
            assert support is not None and not W[~support].any() and W[support].any()
            assert (support.unflatten(-1, (-1, 4)).sum(-1) == 2).all()
            assert graph.notes[site.path]["zeros"] == pytest.approx(0.5)


@pytest.mark.parametrize("method", TURNED)
def test_a_rotation_of_a_mask_is_refused_by_name(method):
    refused(
        segment("llama"),
        chain(MASK, LAW_METHODS[method](SPEC)),
        r"proj: (rotate\w*|incoherence) moves \d+ weights that a step before it set to 0",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_on_a_mask_is_no_worse_than_to_nearest_on_it(family):
    """And better where anything can make up for the zeros, which nearest does not."""
    seg = segment(family)
    masked = seg.solve(MASK)[0]
    solved = seg.solve(chain(MASK, gptq(SPEC)))[0]
    nearest = seg.solve(chain(MASK, rtn(SPEC, weighted)))[0]
    stats = seg.all_stats(masked)  # what both were solved on
    totals = [0.0, 0.0]
    for (site, e, ours, _, support), (_, _, theirs, _, _) in zip(weights(solved), weights(nearest)):
        state = stats[site.source, "second_moment"]
        moment = state if e is None else state.states[e]
        W = seg.graph.weight_ok(site, e)
        J = [moment.output_error(dense(q, torch.float32) - W) for q in (ours, theirs)]
        assert J[0] <= J[1] * (1 + 1e-5)
        totals = [total + j for total, j in zip(totals, J)]
        assert torch.equal(masked.support_ok(site, e), support)
    assert totals[0] < 0.9 * totals[1]


def test_zeros_that_any_step_sets_are_one_mechanism():
    """An array function, a raw stage and a cell's support give one mask and one target."""
    seg = segment("llama")
    prune = lambda W: W * larger_half_of(W)
    by_array = each_weight("mine", lambda W, stats, spec: (prune(W), {}), None)

    def run(graph, stats):
        leaves = {s.weight: prune(graph.weight_ok(s)) for s in graph.sites}
        return graph.update(leaves), stats

    for transform in (by_array, (Stage("mine", frozenset(), run),), MASK):
        cells = {}
        seg.solve(chain(transform, watching(cells)))
        for site in seg.graph.sites:
            cell, W = cells[seg.graph.where(site)], seg.graph.weight_ok(site)
            assert torch.equal(cell.support, larger_half_of(W))
            assert torch.equal(cell.leaf, W * cell.support) and torch.equal(cell.target, W)


def larger_half_of(W):
    return larger_half(type("W", (), {"cell": cell_of(W)})).support


def watching(cells):
    """A step that changes nothing and keeps every cell that it sees, by name."""

    def watch(weight):
        cells[weight.name] = weight.cell
        return weight.cell

    return each_cell("watch", watch)


def test_a_step_that_changes_values_is_what_later_ones_aim_at():
    seg, cells = segment("llama"), {}
    clip = each_weight("clip", lambda W, stats, spec: (W.clamp(-0.05, 0.05), {}), None)

    graph, _ = seg.solve(chain(clip, watching(cells)))
    for site in graph.sites:
        clipped = seg.graph.weight_ok(site).clamp(-0.05, 0.05)
        assert torch.equal(cells[graph.where(site)].target, clipped)
        assert graph.params[site.weight] is not seg.graph.params[site.weight]
    aim = each_cell("aim", lambda w: w.cell.aim(2 * w.cell.target))
    twice = seg.solve(chain(MASK, aim, gptq(SPEC), watching(cells)))[0]
    for site, _, leaf, _, support in weights(twice):
        assert torch.equal(cells[twice.where(site)].target, 2 * seg.graph.weight_ok(site))
        W = dense(leaf, torch.float32)
        assert (
            not W[~support].any() and W.norm() > 1.3 * (seg.graph.weight_ok(site) * support).norm()
        )


def test_a_scale_of_inputs_moves_targets_with_weights():
    """AWQ's scale folds into rows upstream and columns here; a masked target stays its weight's."""
    seg, kept = segment("llama"), {}
    scales = LAW_METHODS["awq_scale"](SPEC)

    seg.solve(chain(MASK, scales, watching(kept)))
    moved = 0
    for site in seg.graph.sites:
        cell = kept[seg.graph.where(site)]
        on = cell.support
        assert torch.allclose(cell.leaf[on], cell.target[on], rtol=1e-5)
        moved += not torch.allclose(cell.target, seg.graph.weight_ok(site))
    assert moved


# ------------------------------------------------------------------ rounded leaves are refined
@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES])
def test_a_later_step_refines_codes_on_their_grid(family):
    seg = segment(family)

    def descend(weight):
        cell, H_kk = weight.cell, damped(weight.stats["second_moment"].mean_kk, 0.01)
        order = torch.arange(len(H_kk))
        return cell.put(descend_codes(cell.target, H_kk, cell.leaf, order), swept=1)

    refine = each_cell("descend", descend, HESSIAN)
    nearest, refined = (seg.solve(t)[0] for t in (rtn(SPEC), chain(rtn(SPEC), refine)))
    stats, better = seg.all_stats(nearest), 0
    for (site, e, before, _, _), (_, _, after, _, _) in zip(weights(nearest), weights(refined)):
        assert isinstance(after, QTensor) and torch.equal(after.scales, before.scales)
        assert refined.notes[site.path]["swept"] == 1
        state = stats[site.source, "second_moment"]
        moment = state if e is None else state.states[e]
        W = seg.graph.weight_ok(site, e)
        J = [moment.output_error(dense(q, torch.float32) - W) for q in (after, before)]
        better += J[0] < J[1]
        if e is None:
            share = J[0] / moment.output_error(W)
            assert refined.notes[site.path]["loss"] == pytest.approx(share, rel=1e-3)
    assert better > 1


def test_a_side_path_beside_codes_is_free():
    seg = segment("llama")

    def beside(weight):
        D = weight.cell.target - dense(weight.cell.leaf, torch.float32)
        U, S, V = torch.linalg.svd(D, full_matrices=False)
        return weight.cell.put(Sum((weight.cell.leaf, LowRank(U[:, :4] * S[:4], V[:4]))))

    plain, graph = (seg.solve(t)[0] for t in (rtn(SPEC), chain(rtn(SPEC), each_cell("b", beside))))
    for site in graph.sites:
        notes = plain.notes[site.path]["weight_error"], graph.notes[site.path]["weight_error"]
        assert notes[1] < notes[0] and graph.params[site.weight].parts[0].spec.bits == 4


# ------------------------------------------------------------------ what may be put
W = normal(8, 32, seed=0)
HALF = torch.arange(32) % 2 == 0


@pytest.mark.parametrize(
    "cell, leaf, words",
    [
        (cell_of(W), W[:4], r"proj: mine made a weight \(4, 32\) of one \(8, 32\)"),
        (cell_of(W), W * torch.nan, "proj: mine made a weight that holds NaN or Inf"),
        (cell_of(W), W / 0, "proj: mine made a weight that holds NaN or Inf"),
        (cell_of(W), (W,), "proj: mine put a tuple, which is no leaf"),
        (cell_of(W), encode(minmax, W, SPEC), "made int4-g16 and is to round nothing"),
        (cell_of(W, ASYM), encode(minmax, W, SPEC), "made int4-g16 and is to round to int3"),
        (
            cell_of(W, SPEC),
            W,
            "made plain numbers and is to round to int4-g16, the grid of its cell; give codes",
        ),
        (
            cell_of(W, SPEC),
            replace(encode(minmax, W, SPEC), codes=encode(minmax, W, SPEC).codes + 9),
            r"proj\.weight: codes span .* and int4-g16 has \[-8, 7\]; round to the grid",
        ),
        (
            cell_of(W, SPEC),
            replace(encode(minmax, W, SPEC), scales=encode(minmax, W, SPEC).scales * torch.inf),
            "proj: mine made scales that torch.float32 does not hold",
        ),
        (cell_of(W, None, HALF.expand(8, 32)), W, r"proj: mine moves 128 weights that a step"),
        (
            cell_of(W, SPEC, HALF.expand(8, 32)),
            encode(minmax, W, SPEC),
            r"proj: mine moves \d+ weights that a step before it set to 0",
        ),
        (
            cell_of(W, None, HALF.expand(8, 32)),
            Sum((W, LowRank(W[:, :1], W[:1]))),
            r"proj: mine moves 128 weights",
        ),
    ],
)
def test_what_a_cell_cannot_hold_is_refused_by_name(cell, leaf, words):
    with pytest.raises(QlabError, match=words):
        cell.put(leaf)


def test_what_a_cell_can_hold_is_put():
    support = HALF.expand(8, 32)
    cell = cell_of(W, None, support).put(W * support, tried=1).put(0 * W, again=2)
    assert cell.notes == {"tried": 1, "again": 2} and not cell.leaf.any() and cell.target is W
    beside = LowRank(W[:, :1], W[:1])
    assert cell.put(Sum((W * support, beside))).leaf.parts[1] is beside


@given(st.integers(0, 99), st.sampled_from(["int4-g16", "int3-g16-asym", "fp8-channel", "mxfp4"]))
def test_narrowing_only_narrows(seed, text):
    spec = parse_spec(text)
    W_ok = normal(8, 32, seed=seed)
    support = torch.rand(8, 32, generator=torch.Generator().manual_seed(seed)) < 0.5
    wider = support.clone()
    wider[0] = True
    cell = cell_of(W_ok).narrow(support=support)
    assert torch.equal(cell.leaf, W_ok * support) and torch.equal(cell.target, W_ok)
    assert cell.narrow(support=support & wider).support.equal(support)
    with pytest.raises(QlabError, match=r"proj: mine widens the support by \d+ weights"):
        cell.narrow(support=wider | ~support)
    with pytest.raises(QlabError, match=r"narrows to a support of torch.float32 \(8, 32\)"):
        cell.narrow(support=support.float())
    q = encode(minmax, W_ok, spec)
    rounded = Cell(target=W_ok, leaf=q, feasible=Feasible(q.spec)).narrow(support=support)
    assert not dense(rounded.leaf, torch.float32)[~support].any()
    assert torch.equal(rounded.leaf.codes.float()[support], q.codes.float()[support])
    assert rounded.narrow(spec=spec).feasible.spec == q.spec
    with pytest.raises(QlabError, match=r"lies on the grid .* and the step asks for int2-g16"):
        rounded.narrow(spec=parse_spec("int2-g16"))
    assert torch.equal(
        dense(replace(q, codes=zero_codes(q)), torch.float32), torch.zeros_like(W_ok)
    )


@pytest.mark.parametrize(
    "fn, spec, words",
    [
        (lambda w: w.cell.leaf, None, r"q_proj: mine returned a Tensor; return a cell"),
        (lambda w: w.cell, SPEC, r"q_proj: mine made plain numbers and is to round to int4"),
        (lambda w: replace(w.cell, leaf=w.cell.leaf * torch.nan), None, "q_proj: mine made .*NaN"),
        (lambda w: w.cell.put(w.cell.leaf, loss=1.0), None, "mine notes 'loss', which is measured"),
        (lambda w: w.cell.put(w.cell.leaf, x=w), None, "mine notes what no report holds"),
        (lambda w: w.cell.aim(w.cell.target[:1]), None, r"q_proj: mine aims at a weight \(1, 64\)"),
        (lambda w: w.cell.aim(w.cell.target / 0), None, "mine aims at a weight .*NaN or Inf"),
        (lambda w: w.stats["absmax"], None, r"q_proj: the step asks for the statistic 'absmax'"),
    ],
)
def test_what_a_step_of_cells_may_not_return_is_refused_by_site(fn, spec, words):
    refused(segment("llama"), each_cell("mine", fn, spec=spec), words)


def test_a_mask_is_not_widened_behind_a_step():
    """Not by a cell that a step made by hand, nor by a raw stage."""
    seg = segment("llama")
    by_hand = lambda w: replace(w.cell, feasible=Feasible(), leaf=w.cell.target)
    refused(seg, chain(MASK, each_cell("mine", by_hand)), r"q_proj: mine moves \d+ weights")
    open_up = lambda w: replace(
        w.cell, feasible=Feasible(support=torch.ones_like(w.cell.support)), leaf=w.cell.target
    )
    refused(seg, chain(MASK, each_cell("mine", open_up)), r"q_proj: mine widens the support")

    def forget(graph, stats):
        return replace(graph, supports={}, targets={}), stats

    graph = seg.solve(chain(MASK, (Stage("forget", frozenset(), forget),), gptq(SPEC)))[0]
    assert all(not dense(leaf)[~support].any() for _, _, leaf, _, support in weights(graph))
    stray = lambda graph, stats: (replace(graph, supports={"norm": torch.ones(1)}), stats)
    refused(seg, (Stage("mine", frozenset(), stray),), "'mine' gives a support to .*norm, which is")


def test_rounding_twice_is_refused_and_hqq_keeps_a_mask_between_codes():
    seg = segment("llama")
    refused(seg, chain(rtn(SPEC), gptq(SPEC)), r"q_proj is quantized already; give each site one")
    floating = replace(ASYM, zero_dtype=torch.float32)
    graph = seg.solve(chain(MASK, hqq(floating)))[0]
    for _, _, leaf, _, support in weights(graph):
        assert leaf.zeros.is_floating_point() and not dense(leaf)[~support].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_cells_writes_to_copies(family):
    seg = segment(family)
    before = seg.solve(chain(MASK, rtn(SPEC)))[0]

    def scribble(weight):
        leaf = weight.cell.leaf
        weight.cell.target.mul_(0)
        weight.cell.support.fill_(True)
        leaf.codes.mul_(0)
        return weight.cell.put(replace(leaf, codes=zero_codes(leaf)))

    with untouched(before, seg.graph):
        after = seg.solve(each_cell("scribble", scribble), before)[0]
    for (site, _, leaf, _, support), (_, _, _, _, kept) in zip(weights(after), weights(before)):
        assert not dense(leaf).any() and torch.equal(support, kept)
        assert after.notes[site.path]["weight_error"] == pytest.approx(1)


def test_one_expert_at_a_time():
    seg, seen = segment("mixtral"), []

    def one(weight):
        seen.append((weight.name, weight.expert, tuple(weight.cell.leaf.shape)))
        return weight.cell.put(weight.cell.leaf * 2) if weight.expert == 1 else weight.cell

    graph = seg.solve(at("*experts*", each_cell("one", one)))[0]
    assert {e for _, e, _ in seen} == {0, 1, 2, 3} and all(len(shape) == 2 for *_, shape in seen)
    for site, e, leaf, _, _ in weights(graph):
        if site.route:
            assert torch.equal(leaf, seg.graph.weight_ok(site, e) * (2 if e == 1 else 1))
    left_alone = seg.solve(each_cell("none", lambda weight: weight.cell))[0]
    assert all(left_alone.params[n] is leaf for n, leaf in seg.graph.params.items())
