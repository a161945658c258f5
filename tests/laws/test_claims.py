"""A step cannot change what it is measured against, nor what other steps and recipes go on with."""

from dataclasses import dataclass, replace

import pytest
import torch
from families import MIXTURES
from hypothesis import given
from hypothesis import strategies as st
from raw_steps import refused, step
from segments import assert_same, segment, untouched

from qlab.algebra.claims import _sum_of_bits
from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec
from qlab.algebra.stats import Moment
from qlab.algebra.transform import at, each_weight
from qlab.errors import QlabError
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")
HESSIAN = frozenset({"second_moment"})
WAYS = {
    "in place": lambda t: t.mul_(0.5),
    "data": lambda t: t.data.mul_(0.5),
    "numpy": lambda t: t.numpy().__imul__(0.5),
    "index": lambda t: t.__setitem__(0, 0.0),
    "out": lambda t: torch.mul(t, 0.5, out=t),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.mark.parametrize(
    "family, way",
    [*(("llama", way) for way in WAYS), *((family, "data") for family in ("gpt2", *MIXTURES))],
)
def test_a_step_that_writes_to_its_weight_and_statistics_is_measured_against_the_true_ones(
    family, way
):
    seg, way = segment(family), WAYS[way]

    def in_place(W_ok, stats, spec):
        way(stats["second_moment"].sum_kk)
        way(W_ok)
        return encode(minmax, W_ok, spec), {}

    def on_copies(W_ok, stats, spec):
        W_ok = W_ok.clone()
        way(W_ok)
        return encode(minmax, W_ok, spec), {}

    with untouched(seg.graph, seg.stats):
        graphs = [
            seg.solve(each_weight("mine", fn, SPEC, HESSIAN))[0] for fn in (in_place, on_copies)
        ]
    assert_same(*graphs)
    assert graphs[0].notes == graphs[1].notes
    for site in graphs[0].sites:
        W, leaf = seg.graph.weight_ok(site), graphs[0].params[site.weight]
        if isinstance(leaf, QTensor):
            error = (dense(leaf, torch.float32) - W).norm() / W.norm()
            assert graphs[0].notes[site.path]["weight_error"] == pytest.approx(
                float(error), rel=1e-4
            )


def test_a_step_may_keep_one_workspace_for_all_weights():
    seg, spaces, note = segment("llama"), {}, {}

    def reusing(W_ok, stats, spec):
        q, note["rows"] = encode(minmax, W_ok, spec), len(W_ok)
        codes = spaces.setdefault(q.shape, torch.empty_like(q.codes))
        return replace(q, codes=codes.copy_(q.codes)), note

    graph, expected = seg.solve(each_weight("mine", reusing, SPEC))[0], seg.solve(rtn(SPEC))[0]
    assert_same(graph, expected)
    assert all(
        graph.notes[site.path]["rows"] == len(graph.params[site.weight].codes)
        for site in graph.sites
    )


@ways
@pytest.mark.parametrize(
    "tensor_of, words",
    [
        (
            lambda graph, stats: graph.params["mlp.up_proj.weight"],
            r"'mine' writes to model\.layers\.0\.mlp\.up_proj\.weight",
        ),
        (
            lambda graph, stats: graph.params["input_layernorm.weight"],
            r"'mine' writes to model\.layers\.0\.input_layernorm\.weight",
        ),
        (
            lambda graph, stats: graph.weight_ok(graph.sites[0]),
            r"'mine' writes to model\.layers\.0\.self_attn\.q_proj\.weight",
        ),
        (
            lambda graph, stats: stats[graph.sites[0].source, "second_moment"].sum_kk,
            r"'mine' writes to the statistic 'second_moment' of "
            r"model\.layers\.0\.self_attn\.q_proj",
        ),
    ],
)
def test_a_stage_that_writes_to_what_it_is_given_is_refused_by_name(tensor_of, words, way):
    seg = segment("llama")
    copy = seg.graph.update({name: leaf.clone() for name, leaf in seg.graph.params.items()})
    with pytest.raises(QlabError, match=words):
        seg.solve(
            step(lambda graph, stats: (way(tensor_of(graph, stats)), graph)[1], needs=HESSIAN), copy
        )


def test_a_stage_that_writes_to_weights_of_other_sites_is_refused():
    seg = segment("llama")
    copy = seg.graph.update({name: leaf.clone() for name, leaf in seg.graph.params.items()})
    stage = step(
        lambda graph, stats: (graph.params["mlp.up_proj.weight"].data[0].mul_(2), graph)[1]
    )
    with pytest.raises(
        QlabError,
        match=r"'mine' writes to model\.layers\.0\.mlp\.up_proj\.weight, which others go on with",
    ):
        seg.solve(at("*q_proj", stage), copy)


@pytest.mark.parametrize(
    "write, words",
    [
        (
            lambda graph, stats: graph.params["mlp.up_proj.weight"].scales.mul_(2),
            r"mlp\.up_proj\.weight",
        ),
        (
            lambda graph, stats: graph.params.update({"mlp.up_proj.weight": torch.zeros(128, 64)}),
            r"mlp\.up_proj\.weight",
        ),
        (
            lambda graph, stats: graph.online["mlp.up_proj"][0].M.mul_(2),
            r"M of operation 0 at the input of .*mlp\.up_proj",
        ),
        (lambda graph, stats: stats.clear(), r"the statistic "),
    ],
)
def test_codes_operations_and_mappings_are_not_written_to_either(write, words):
    @dataclass(frozen=True)
    class Turn:
        M: torch.Tensor

    seg = segment("llama")
    graph = replace(seg.solve(rtn(SPEC))[0], online={"mlp.up_proj": (Turn(torch.ones(3)),)})
    stage = step(lambda graph, stats: (write(graph, stats), graph)[1], needs=HESSIAN)[0]
    with pytest.raises(QlabError, match=f"'mine' writes to .*{words}"):
        apply(stage, graph, dict(seg.stats))


@given(
    st.sampled_from(["float32", "bfloat16", "float16", "uint8"]),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 39),
)
def test_any_number_that_is_written_breaks_the_seal(dtype, size, offset, at):
    t = torch.zeros(64, dtype=getattr(torch, dtype))[offset : offset + size]
    before = _sum_of_bits(t)
    t.view(torch.uint8)[at % t.nbytes] += 1
    assert _sum_of_bits(t) != before


def test_a_statistic_that_was_not_asked_for_is_named():
    seg = segment("llama")
    mine = each_weight("mine", lambda W, stats, spec: (stats["absmax"], {}), SPEC, HESSIAN)
    refused(
        seg,
        mine,
        r"q_proj: the step asks for the statistic 'absmax' and has 'second_moment', 'outer'; name "
        r"it in `needs`",
    )
    late = step(lambda graph, stats: stats[graph.code.sites[-1].source, "absmax"] and graph)
    refused(
        seg,
        late,
        r"'mine' asks for the statistic 'absmax' of model\.layers\.0\.mlp\.down_proj, which was "
        r"not observed",
    )


def test_a_statistic_of_a_wire_that_is_not_there_is_refused_with_the_nearest():
    seg = segment("llama")
    stray = step(lambda graph, stats: stats["self_attn:keys", "absmax"] and graph)
    refused(seg, stray, r"'absmax' of 'self_attn:keys', which is no wire of .*self_attn:key")
    early = step(lambda graph, stats: stats["self_attn:key", "absmax"] and graph)
    refused(seg, early, r"'absmax' of model\.layers\.0\.self_attn:key, which was not observed")


DOWN, UP = "mlp.down_proj.weight", "mlp.up_proj.weight"


def test_statistics_are_copied_when_they_are_asked_for():
    seg, kept = segment("llama"), []

    def watch(W_ok, stats, spec):
        assert (
            "absmax" not in stats and set(stats) == {"second_moment", "outer"} and len(stats) == 2
        )
        assert stats.get("absmax") is None and isinstance(stats.get("second_moment"), Moment)
        kept.append(stats["second_moment"].sum_kk)
        return encode(minmax, W_ok, spec), {}

    seg.solve(each_weight("mine", watch, SPEC, HESSIAN))
    assert len({t.data_ptr() for t in kept}) == len(kept) == len(seg.graph.sites)
