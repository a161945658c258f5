"""QAT: at zero steps it is rounding to nearest, it trains norms with the weights, and it learns."""

import pytest
import torch
from model_folders import contents, random_tokens
from segments import assert_same, samples_of, segment

from qlab.algebra.block import Block
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.qat import qat
from qlab.methods.rtn import rtn

families = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gemma2"])


def error(seg, graph):
    block = Block(segment=graph, samples=samples_of(seg), stats={})
    return float(block.loss(graph, range(block.count)).detach())


@families
@pytest.mark.parametrize("text", ["int3-g32-asym", "int2-channel", "nvfp4"])
def test_zero_steps_round_to_nearest(family, text):
    seg, spec = segment(family), parse_spec(text)
    trained, _ = seg.solve(qat(spec, steps=0))
    nearest, _ = seg.solve(rtn(spec))
    assert_same(trained, nearest)


@families
def test_training_helps_and_moves_vectors_where_all_sites_are_trained(family):
    seg, spec = segment(family), parse_spec("int2-g32-asym")
    nearest, _ = seg.solve(rtn(spec))
    trained, _ = seg.solve(qat(spec, steps=24, windows=2, lr=0.1))
    assert error(seg, trained) < 0.9 * error(seg, nearest)
    weights = {site.weight for site in seg.graph.code.sites}
    moved = [
        name
        for name, leaf in trained.params.items()
        if name not in weights and not torch.equal(leaf, seg.graph.params[name])
    ]
    assert moved and all(trained.params[name].ndim == 1 for name in moved)
    some, _ = seg.solve(at("*mlp*", qat(spec, steps=4, windows=2, lr=0.1)))
    kept = set(seg.graph.params) - {s.weight for s in seg.graph.sites if "mlp" in s.path}
    assert all(some.params[name] is seg.graph.params[name] for name in kept)


def test_norms_move_a_tenth_as_far_as_weights_in_steps_of_their_scale():
    seg = segment("llama")
    trained, _ = seg.solve(qat(parse_spec("int2-g32-asym"), steps=1, windows=2, lr=0.02))
    name = "input_layernorm.weight"
    before, after = (graph.params[name] for graph in (seg.graph, trained))
    # Adam's first step is as long whatever the gradient
    step = float((after - before).abs().max())
    assert step == pytest.approx(0.002 * float(before.abs().mean()), rel=0.01)


def test_what_is_trained_is_written_as_it_is_and_the_same_every_time(saved, tmp_path):
    source = saved("llama")
    model, data = open_checkpoint(source), random_tokens(source)
    recipe = qat(parse_spec("int4-g16"), steps=6, windows=2, lr=0.1)
    once, twice = (quantize(model, recipe, data, tmp_path / name) for name in ("a", "b"))
    assert contents(once.path) == contents(twice.path)
    assert verify(once.path, source).faults == []


def test_what_it_cannot_do_is_refused():
    for wrong in (dict(steps=-1), dict(windows=0), dict(lr=0.0), dict(lr=2.0)):
        with pytest.raises(QlabError, match="step size in"):
            qat(parse_spec("int4-g16"), **wrong)
