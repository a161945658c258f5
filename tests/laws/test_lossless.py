"""A step that claims to keep the function is held to it, in float32 whatever the model runs in; a
wrong inverse is refused."""

import copy
from dataclasses import replace

import pytest
import torch
from families import MIXTURES
from model_folders import random_tokens
from segments import batches_of, hidden, model_of, normal, relative, segment
from torch.utils import _pytree as pytree

from qlab.algebra.absorb import absorb, fold_scales, folds
from qlab.algebra.graph import by_origin, by_source
from qlab.algebra.interpret import interpret, outputs_of
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.spec import parse_spec
from qlab.algebra.tracing.trace import trace
from qlab.algebra.transform import Stage, chain
from qlab.algebra.views import Folded, Gauged, WholeSegment
from qlab.driver.lossless import refuse_changed
from qlab.driver.quantize import quantize
from qlab.driver.solve import in_order, solve, solve_in_order
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.awq import awq_scale
from qlab.methods.rtn import rtn
from qlab.model.paper import find_blocks

SPEC = parse_spec("int4-g16")
FOLDED = Folded()


def checked(seg, transform):
    """solve, with every claim checked on the segment's first batch."""
    check = lambda stage, before, after: refuse_changed(stage, before, after, None, batches_of(seg))
    return solve(seg.graph, transform, seg.observe, check)


def scaling_norms(factor, view=FOLDED):
    def run(graph, stats):
        return graph.update(
            {
                n: leaf * factor
                for n, leaf in graph.params.items()
                if "norm" in n and n.endswith("weight")
            }
        ), stats

    return (Stage("mine", frozenset(), run, view),)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_scales_and_rotations_keep_the_function(family):
    seg = segment(family)

    def turn(graph, stats):
        for origin, sites in by_origin(graph.sites).items():
            k = graph.weight_ok(sites[0]).shape[-1]
            if sites[0].route is None:
                M = torch.linalg.qr(normal(k, k, seed=1))[0]
                graph, stats = reparametrize(graph, stats, origin, M, M.T)
        return graph, stats

    checked(seg, awq_scale(SPEC))
    checked(seg, (Stage("turn", frozenset(), turn, Gauged()),))


@pytest.mark.parametrize("factor", [2.0, 1.01])
@pytest.mark.parametrize("view", [Folded(), Gauged()])
def test_a_claim_that_does_not_hold_is_refused_by_name(factor, view):
    seg = segment("llama")
    with pytest.raises(
        QlabError,
        match=(
            r"the stage 'mine' changes what model\.layers\.0 computes by .* and claims to keep "
            r"it; move"
        ),
    ):
        checked(seg, scaling_norms(factor, view))
    checked(seg, scaling_norms(factor, WholeSegment()))  # which claims nothing


def test_what_a_stage_left_alone_is_not_run():
    seg = segment("llama")
    refuse_changed(
        absorb()[0], seg.graph, replace(seg.graph, params=dict(seg.graph.params)), None, None
    )


def test_a_claim_is_checked_where_sites_are_solved_in_order_too():
    seg, seen = segment("llama"), []
    check = lambda stage, before, after: (
        seen.append(stage.name),
        refuse_changed(stage, before, after, None, batches_of(seg)),
    )
    recipe = chain(awq_scale(SPEC), rtn(SPEC))
    solve_in_order(seg.graph, recipe, batches_of(seg), check=check)
    assert {"awq_scale", "absorb", "rtn"} == set(seen)
    with pytest.raises(QlabError, match="the stage 'mine' changes what"):
        solve_in_order(seg.graph, chain(recipe, scaling_norms(1.01)), batches_of(seg), check=check)


def test_a_lossless_stage_that_observes_is_not_put_off_until_there_is_nothing_to_see():
    seg = segment("llama")
    observing = replace(absorb()[0], needs=frozenset({"absmax"}))
    assert in_order(seg.graph.code, chain(rtn(SPEC), absorb()), "quantized")
    assert not in_order(seg.graph.code, chain(rtn(SPEC), (observing,)), "quantized")


@pytest.mark.parametrize(
    "wrong, words",
    [
        (
            lambda M, k: (M, M),
            r"M_inv is not the inverse of M at the input of .*q_proj, .*v_proj: x @ M @ M_inv "
            r"differs from x by",
        ),
        (lambda M, k: (M, M.T * 1.001), "M_inv is not the inverse of M"),
        (lambda M, k: (torch.ones(k), torch.full((k,), 1.001)), "M_inv is not the inverse of M"),
        (
            lambda M, k: (torch.zeros(k), torch.full((k,), torch.inf)),
            "M_inv is not the inverse of M",
        ),
        (
            lambda M, k: (M, M.T[0]),
            r"M \(64, 64\) and M_inv \(64,\) at the input of .* differ in shape",
        ),
    ],
)
def test_matrices_that_do_not_undo_each_other_are_refused(wrong, words):
    graph = segment("llama").graph
    source, sites = next(iter(by_source(graph.sites).items()))
    k = graph.weight_ok(sites[0]).shape[1]
    M, M_inv = wrong(torch.linalg.qr(normal(k, k, seed=1))[0], k)
    with pytest.raises(QlabError, match=words):
        reparametrize(graph, {}, source, M, M_inv)


def test_one_wrong_entry_of_an_inverse_is_found():
    graph = segment("llama").graph
    source = next(iter(by_source(graph.sites)))
    M_inv = torch.eye(64)
    M_inv[17, 3] = 1e-2
    with pytest.raises(QlabError, match="M_inv is not the inverse of M"):
        reparametrize(graph, {}, source, torch.eye(64), M_inv)


def test_what_is_put_on_an_input_does_not_change_with_its_author():
    graph = segment("llama").graph
    source, sites = next(iter(by_source(graph.sites).items()))
    m_k = torch.full((64,), 2.0)
    moved, _ = reparametrize(graph, {}, source, m_k, 1 / m_k)
    m_k.mul_(3)
    assert (moved.online[sites[0].path][0].m_k == 2).all()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "mixtral"])
def test_a_program_of_bfloat16_is_read_in_float32_throughout(family):
    seg = segment(family)
    narrow = copy.deepcopy(model_of(family)).bfloat16()
    block = list(find_blocks(narrow)[1].values())[int(family in MIXTURES)]
    halved = lambda tree, dtype: pytree.tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree
    )
    args, kwargs = halved(seg.batches[0], torch.bfloat16)
    graph = trace(block, args, kwargs)
    wide = outputs_of(graph, args, kwargs, wide=True)[0]
    leaves = {
        name: leaf.float() if leaf.is_floating_point() else leaf
        for name, leaf in graph.params.items()
    }
    exact = hidden(interpret(seg.graph.update(leaves), *halved((args, kwargs), torch.float32)))
    assert wide.dtype == torch.float32 and relative(wide, exact) < 1e-5
    assert relative(hidden(interpret(graph, args, kwargs)), exact) > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "opt"])
def test_what_folding_loses_to_the_dtype_of_the_files_is_no_change(family):
    """Scales that nobody rounded to what a bfloat16 norm can hold."""
    seg = segment(family)

    def smooth(graph, stats):
        for origin in folds(graph.code).keys() & by_origin(graph.sites).keys():
            fold = folds(graph.code)[origin]
            m_k = fold.tie(normal(len(fold.index_k), seed=0).mul(0.3).exp())
            graph, stats = reparametrize(graph, stats, origin, m_k, 1 / m_k)
        return fold_scales(graph), stats

    halves = replace(seg.graph, dtype=torch.bfloat16)
    refuse_changed(
        Stage("smooth", frozenset(), smooth, Folded()),
        halves,
        smooth(halves, {})[0],
        None,
        batches_of(seg),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_false_claim_ends_the_job_and_leaves_nothing(dtype, saved, tmp_path):
    source = saved("llama", dtype)
    with pytest.raises(QlabError, match="the stage 'mine' changes what"):
        quantize(
            open_checkpoint(source), chain(rtn(SPEC), scaling_norms(1.1)), None, tmp_path / "none"
        )
    with pytest.raises(QlabError, match="the stage 'mine' changes what"):
        quantize(
            open_checkpoint(source),
            chain(scaling_norms(0.9), rtn(SPEC)),
            random_tokens(source),
            tmp_path / "some",
        )
    assert not list(tmp_path.iterdir())
