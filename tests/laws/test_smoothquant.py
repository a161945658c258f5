"""SmoothQuant: its scale is the paper's, the function stays, and rounded inputs lose less."""

import shutil

import pytest
import torch
from families import FAMILIES, MIXTURES
from model_folders import change, random_tokens, refused
from segments import hidden, relative, segment

import qlab
from qlab.algebra.absorb import folds
from qlab.algebra.graph import by_origin
from qlab.algebra.interpret import interpret
from qlab.algebra.running import apply
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothing, smoothquant

OUTLIERS, FACTOR = [3, 17, 40], 60.0


def run(graph, transform, stats):
    for stage in transform:
        graph, stats = apply(stage, graph, stats)
    return graph


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_function_stays_and_nothing_is_left_at_run_time(family):
    seg = segment(family)
    graph = run(seg.graph, smoothquant(), seg.stats)
    assert not graph.online
    for batch in seg.batches[:2]:
        out, before = (hidden(interpret(g, *batch)) for g in (graph, seg.graph))
        assert relative(out, before) < 1e-5
    moved = {s.path for s in graph.sites if "smoothing" in graph.notes.get(s.path, {})}
    places = folds(graph.code)
    assert moved == {s.path for s in graph.sites if s.origin in places and not s.router}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_scale_is_that_of_the_paper(alpha):
    seg = segment("llama")
    graph = run(seg.graph, smoothquant(alpha), seg.stats)
    queries, keys, values = seg.graph.code.sites[:3]
    absmax = seg.stats[queries.source, "absmax"]
    joint = torch.cat([seg.graph.weight_ok(s) for s in (queries, keys, values)]).abs().amax(0)
    s_k = absmax**alpha / joint ** (1 - alpha)
    norm = "input_layernorm.weight"
    assert torch.allclose(seg.graph.params[norm] / graph.params[norm], s_k, rtol=1e-4)
    assert torch.allclose(
        graph.weight_ok(queries), seg.graph.weight_ok(queries) * s_k, rtol=1e-4, atol=1e-6
    )
    assert graph.notes[queries.path]["smoothing"] == pytest.approx(float(s_k.max()), rel=1e-4)


def test_half_of_the_range_moves_and_inputs_and_weights_have_one_maximum():
    seg = segment("llama")
    graph = run(seg.graph, qlab.at("re:.*[qkv]_proj", smoothquant(0.5)), seg.stats)
    sites = graph.code.sites[:3]
    absmax = seg.all_stats(graph)[sites[0].source, "absmax"]
    joint = torch.cat([graph.weight_ok(s) for s in sites]).abs().amax(0)
    assert torch.allclose(absmax, joint, rtol=1e-3)


def test_channels_with_nothing_to_move_keep_their_scale():
    absmax, weights = torch.tensor([0.0, 2.0, 8.0]), torch.tensor([1.0, 0.0, 2.0])
    assert torch.allclose(smoothing(absmax, weights, 0.5), torch.tensor([1.0, 1.0, 2.0]))


def test_every_expert_has_its_own_scale_and_shares_the_one_before_the_mixture():
    seg = segment("mixtral")
    graph = run(seg.graph, smoothquant(), seg.stats)
    (down,) = (s for s in graph.code.sites if s.path.endswith("experts.down_proj"))
    ratio = graph.weight_ok(down) / seg.graph.weight_ok(down)
    s_ek = ratio.median(1).values
    assert torch.allclose(ratio, s_ek[:, None].expand_as(ratio), rtol=1e-3)
    assert not torch.allclose(s_ek[0], s_ek[1], rtol=0.1)
    shared = by_origin(graph.code.sites)[
        next(s.origin for s in graph.code.sites if s.path.endswith("gate_up_proj"))
    ]
    scales = [
        (graph.weight_ok(s) / seg.graph.weight_ok(s)).flatten(0, -2).median(0).values
        for s in shared
    ]
    assert len(scales) == 2 and torch.allclose(*scales, rtol=1e-3)  # the router's and the experts'


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan"), "half", None])
def test_a_share_that_is_none_is_refused(alpha):
    refused(lambda: qlab.smoothquant(alpha), "alpha is", "from 0 to 1")


def with_outliers(saved, folder):
    """A tiny llama whose block inputs have outlier channels; what it computes stays."""
    shutil.copytree(saved("llama"), folder)
    scaled = {"input_layernorm": "qkv", "post_attention_layernorm": ("gate", "up")}
    edits = {}
    for block in range(2):
        for norm, readers in scaled.items():
            part = "self_attn" if norm == "input_layernorm" else "mlp"
            edits[f"model__layers__{block}__{norm}__weight"] = lambda w: _times(w, FACTOR)
            for reader in readers:
                name = f"model__layers__{block}__{part}__{reader}_proj__weight"
                edits[name] = lambda w: _times(w, 1 / FACTOR)
    change(folder, **edits)
    return folder


def _times(w, factor):
    w = w.clone()
    w[..., OUTLIERS] *= factor
    return w


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounded_weights_and_inputs_lose_less_behind_it(saved, tmp_path, method):
    source = with_outliers(saved, tmp_path / "outliers")
    int8 = parse_spec("int8-channel")
    rounded = chain(qlab.METHODS[method](int8), quantize_inputs(int8))
    recipes = {"plain": rounded, "smooth": chain(qlab.smoothquant(), rounded)}
    texts = random_tokens(source, samples=4, length=32, seed=1)
    losses = {}
    for name, recipe in recipes.items():
        result = qlab.quantize(source, recipe, random_tokens(source), tmp_path / name)
        losses[name] = qlab.evaluate(result, source, texts).kl
    assert losses["smooth"] < 0.5 * losses["plain"]


def test_alone_it_moves_weights_that_the_files_hold(saved, tmp_path):
    source = saved("llama")
    keep = chain(smoothquant(), qlab.at("*.mlp.down_proj", rtn(parse_spec("int8-channel"))))
    result = qlab.quantize(source, keep, random_tokens(source), tmp_path / "out")
    assert not qlab.verify(result, source).faults


def test_what_it_moves_in_front_of_an_input_is_certified_by_the_weights_of_the_files(
    saved, tmp_path
):
    source = saved("llama")
    recipe = chain(qlab.at("*.mlp.down_proj", smoothquant()), rtn(parse_spec("int4-g16")))
    result = qlab.quantize(source, recipe, random_tokens(source), tmp_path / "out")
    assert not qlab.verify(result, source).faults
