"""What a step returns is what it says: on its grid, with the claims that it makes, in what a file
holds, and with the zeros of the steps before it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from model_folders import random_tokens
from raw_steps import refused, step
from segments import batches_of, of, segment
from torch import fx, nn

from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.reparametrize import reparametrize
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import Stage, chain, each_weight
from qlab.algebra.views import EachWeight, Gauged
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.driver.solve import solve_in_order
from qlab.driver.writing import refuse_unwritten
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.awq import awq_scale
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")
HESSIAN = frozenset({"second_moment"})


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda g: g.update({"mlp.up_proj.low_rank": torch.ones(2, 2)}),
            r"'mine' adds the leaf model\.layers\.0\.mlp\.up_proj\.low_rank",
        ),
        (
            lambda g: replace(
                g, params={n: p for n, p in g.params.items() if n != "input_layernorm.weight"}
            ),
            r"'mine' drops the leaf model\.layers\.0\.input_layernorm\.weight",
        ),
        (
            lambda g: replace(g, code=replace(g.code, graph=fx.Graph())),
            r"'mine' changes the program of model\.layers\.0",
        ),
        (
            lambda g: replace(g, online={"mlp.up": (torch.neg,)}),
            r"'mine' puts an operation on 'mlp\.up', which is no site",
        ),
        (
            lambda g: replace(g, online_outputs={"key": (torch.neg,)}),
            r"'mine' puts an operation on 'key', which is no site",
        ),
        (
            lambda g: g.update({"mlp.up_proj.weight": torch.ones(64, 128)}),
            r"up_proj\.weight \(64, 128\), and its program has \(128, 64\)",
        ),
        (
            lambda g: g.update({"mlp.up_proj.weight": (torch.ones(128, 2), torch.ones(2, 64))}),
            r"up_proj\.weight a tuple, which no file",
        ),
        (
            lambda g: g.update(
                {"mlp.up_proj.weight": encode(minmax, g.params["mlp.up_proj.weight"], SPEC)}
            ),
            r"up_proj\.weight int4-g16 and was to round nothing; give the stage that spec",
        ),
        (lambda g: None, r"'mine' returned a NoneType; return \(graph, stats\)"),
        (lambda g: (g, {}), r"'mine' returned a tuple; return \(graph, stats\)"),
    ],
)
def test_what_no_file_holds_is_refused_by_stage_and_name(change, words):
    refused(segment("llama"), step(lambda graph, stats: change(graph)), words)


def test_a_stage_returns_a_graph_and_statistics():
    seg = segment("llama")
    refused(
        seg,
        (Stage("mine", frozenset(), lambda graph, stats: graph),),
        r"'mine' returned a ModuleGraph; return \(graph, stats\)",
    )


def test_codes_belong_to_the_spec_that_was_planned():
    seg, other = segment("llama"), parse_spec("int3-g16")
    refused(
        seg,
        each_weight("mine", lambda W, stats, spec: (encode(minmax, W, other), {}), SPEC),
        r"q_proj: mine made int3-g16 and is to round to int4-g16",
    )
    refused(
        seg,
        each_weight("mine", lambda W, stats, spec: (W, {}), SPEC),
        r"q_proj: mine made plain numbers and is to round to int4",
    )
    refused(
        seg,
        step(lambda g, s: g, spec=SPEC),
        r"'mine' left model\.layers\.0\.self_attn\.q_proj as it was and is to round it to int4-g16",
    )
    bare = each_weight("mine", lambda W, stats, spec: W, SPEC)
    refused(seg, bare, r"q_proj: mine returned Tensor; return \(tensor or QTensor, notes\)")
    norm = {"input_layernorm.weight": encode(minmax, torch.ones(1, 64), SPEC)}
    refused(
        seg,
        step(lambda g, s: g.update(norm), spec=SPEC),
        r"input_layernorm\.weight \(1, 64\), and its program has \(64,\)",
    )


DOWN, UP = "mlp.down_proj.weight", "mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda g, s: g.update(
                {"input_layernorm.weight": 2 * g.params["input_layernorm.weight"]}
            ),
            "changes .*input_layernorm",
        ),
        (
            lambda g, s: g.update({x.weight: 2 * g.params[x.weight] for x in g.code.sites}),
            "changes|depend on weights of other sites",
        ),
        (
            lambda g, s: replace(g, online={x.path: (QuantizeInput(SPEC),) for x in g.code.sites}),
            "changes",
        ),
        (
            lambda g, s: replace(g, online_outputs={x.path: (torch.neg,) for x in g.code.sites}),
            "changes",
        ),
        (
            lambda g, s: g.update(
                {x.weight: g.params[x.weight] * g.params[UP].norm() for x in g.sites}
            ),
            "depend on weights of other sites",
        ),
        (
            lambda g, s: g.update(
                {x.weight: g.params[x.weight] * float(g.params[DOWN].norm()) for x in g.sites}
            ),
            "depend on weights",
        ),
        (
            lambda g, s: [s[x.source, "second_moment"] for x in g.code.sites] and g,
            "asks for the statistic 'second_moment' of",
        ),
    ],
)
def test_a_sitewise_claim_that_does_not_hold_is_refused(change, words):
    seg = segment("llama")
    with pytest.raises(QlabError, match=rf"the stage 'mine' .*{words}"):
        solve_in_order(
            seg.graph,
            chain(step(change, needs=HESSIAN, view=EachWeight()), rtn(SPEC)),
            batches_of(seg),
        )


def smallest_of_four(W_ok, stats, spec):
    """Magnitude pruning to 2:4."""
    assert spec is None
    rank = W_ok.abs().unflatten(-1, (-1, 4)).argsort(-1).argsort(-1)
    return W_ok * (rank >= 2).flatten(-2), {}


PRUNED = each_weight("prune", smallest_of_four, None)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_zeros_that_a_step_made_are_kept_by_those_behind_it(family):
    seg = segment(family)
    pruned, rounded = seg.solve(PRUNED)[0], seg.solve(chain(PRUNED, rtn(SPEC)))[0]
    for site in (s for s in seg.graph.sites if not s.router):
        leaf, codes = pruned.weight_ok(site), rounded.params[site.weight].codes
        assert ((leaf == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all() and (
            codes[leaf == 0] == 0
        ).all()
        assert rounded.notes[site.path]["zeros"] == pytest.approx(0.5)
    assert all(
        torch.equal(pruned.params[s.weight], seg.graph.params[s.weight])
        for s in seg.graph.sites
        if s.router
    )


def forgetful(seg):
    """GPTQ on a graph that knows of no zeros."""
    bare = lambda graph: replace(graph, notes={}, supports={}, targets={})
    return step(lambda graph, stats: seg.solve(gptq(SPEC), bare(graph))[0], spec=SPEC)


def test_a_step_that_loses_the_zeros_of_another_is_refused():
    masks = step(lambda graph, stats: replace(seg.solve(PRUNED, graph)[0], notes={}))
    for family, before in (("llama", PRUNED), ("llama", masks), ("mixtral", PRUNED)):
        seg = segment(family)
        refused(
            seg,
            chain(before, forgetful(seg)),
            r"q_proj: mine moves \d+ weights that a step before it set to 0; round",
        )
    lossy = each_weight("lossy", lambda W, stats, spec: (encode(minmax, W + 1, spec), {}), SPEC)
    refused(
        segment("llama"),
        chain(PRUNED, lossy),
        r"q_proj: lossy moves \d+ weights that a step before it set to 0; round",
    )
    refused(
        segment("llama"),
        each_weight("mine", lambda W, stats, spec: (encode(minmax, W, SPEC), {}), None),
        r"q_proj: mine made int4-g16 and is to round nothing",
    )


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda g: g.update({"rotary.inv_freq": 2 * g.params["rotary.inv_freq"]}),
            r"the recipe changed block\.rotary\.inv_freq, a buffer",
        ),
        (
            lambda g: replace(g, online_outputs={"linear": (torch.neg,)}),
            r"block\.linear still needs an operation on its output",
        ),
    ],
)
def test_what_has_no_tensor_in_the_files_is_refused_when_a_block_is_written(change, words):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(16))

        def forward(self, x):
            return x * self.inv_freq

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary, self.linear = Rotary(), nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(self.rotary(x))

    class Names:
        def block_names(self, path):
            return {"linear.weight": ("linear.weight",), "linear.bias": ("linear.bias",)}

    skeleton = SimpleNamespace(names=Names())
    seg = of(Block(), torch.ones(2, 3, 16))
    refuse_unwritten(skeleton, seg.graph, seg.solve(rtn(SPEC))[0])
    changed, _ = seg.solve(step(lambda graph, stats: change(graph)))
    with pytest.raises(QlabError, match=words):
        refuse_unwritten(skeleton, seg.graph, changed)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda g, s: reparametrize(
                g, {}, g.sites[0].source, torch.full((64,), 2.0), torch.full((64,), 0.5)
            )[0],
            r"q_proj still needs an operation at run time: compressed-tensors holds no run-time "
            r"Multiply",
        ),
        (
            lambda g, s: replace(g, online={"mlp.up_proj": (torch.neg,)}),
            r"up_proj still needs an operation at run time: compr",
        ),
        (
            lambda g, s: g.update({"mlp.up_proj.bias": torch.ones(128)}),
            r"'mine' adds the leaf model\.layers\.0\.mlp\.up_proj\.bias",
        ),
        (
            lambda g, s: g.params["mlp.up_proj.weight"].data.mul_(2) is None or g,
            r"'mine' writes to model\.layers\.0\.mlp\.up_proj\.weight",
        ),
    ],
)
def test_refused_steps_leave_no_directory(change, words, saved, tmp_path):
    with pytest.raises(QlabError, match=words):
        quantize(open_checkpoint(saved()), chain(step(change), rtn(SPEC)), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("by_source", [False, True])
def test_what_is_left_at_run_time_is_refused_before_a_weight_is_rounded(by_source, saved, tmp_path):
    rounded = []

    def turned(graph, stats):
        m = torch.full((graph.weight_ok(graph.sites[0]).shape[-1],), 2.0)
        return reparametrize(graph, stats, graph.sites[0].source, m, 1 / m)[0]

    turns = (
        Stage(
            "mine",
            frozenset(),
            lambda graph, stats: (turned(graph, stats), stats),
            Gauged(by_source=by_source),
        ),
    )
    rounds = each_weight(
        "round", lambda W, stats, spec: rounded.append(W) or (encode(minmax, W, spec), {}), SPEC
    )
    with pytest.raises(
        QlabError,
        match=(
            r"q_proj still needs an operation at run time: compressed-tensors holds no run-time "
            r"Mult"
        ),
    ):
        quantize(open_checkpoint(saved()), chain(turns, rounds), None, tmp_path / "out")
    assert rounded == [] and not list(tmp_path.iterdir())


def test_what_folds_when_all_inputs_are_done_is_waited_for(saved, tmp_path):
    """Behind it in the recipe, and before it in the run, is a step that rounds nothing."""
    model = open_checkpoint(saved())
    recipe = chain(awq_scale(SPEC), gptaq(SPEC))
    assert [stage.name for stage in recipe] == ["awq_scale", "absorb", "aim_at_reference", "gptq"]
    quantize(model, recipe, random_tokens(model.path), tmp_path / "out")
    assert not verify(tmp_path / "out", model).faults
