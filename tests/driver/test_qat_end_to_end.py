"""QAT of the whole model: it begins at the codes that are there, keeps grid, mask and shapes, and
lowers the divergence."""

import pytest
import torch
from model_folders import random_tokens

from qlab.algebra.leaf import dense, proper
from qlab.algebra.qtensor import QTensor, off_grid
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, each_cell
from qlab.data.calibration import from_ids
from qlab.directories.verify import verify
from qlab.driver.apply import apply
from qlab.driver.write import write
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.magnitude import magnitude
from qlab.methods.qat_end_to_end import qat_end_to_end
from qlab.methods.rtn import rtn

LEARNING = {"steps": 8, "rate": 0.4}


def opened(saved, family="llama"):
    """A model, and one window several times, so that what is learned on some of them lowers the
    divergence on those held out."""
    model = open_checkpoint(saved(family, torch.float32))
    return model, from_ids(model, random_tokens(model.path, 1, 24).ids.repeat(4, 1))


def rounded(graph):
    leaves = {name: proper(leaf) for name, leaf in graph.params.items()}
    return {name: leaf for name, leaf in leaves.items() if isinstance(leaf, QTensor)}


@pytest.mark.parametrize("text", ["int3-g16", "int2-g32-asym", "nvfp4"])
def test_without_steps_the_codes_are_those_that_were_there(text, saved):
    model, data = opened(saved)
    plain = apply(model, gptq(parse_spec(text)), data)
    trained = apply(model, chain(gptq(parse_spec(text)), qat_end_to_end(steps=0)), data)
    before = dict(plain.segments())
    for path, after in trained.segments():
        for name, q in rounded(after).items():
            assert torch.equal(q.codes.float(), rounded(before[path])[name].codes.float())
            assert torch.equal(q.scales.float(), rounded(before[path])[name].scales.float())


@pytest.mark.parametrize("family, text", [("llama", "int2-g16"), ("qwen3_moe", "int2-g32-asym")])
def test_codes_move_on_their_grid_and_it_learns(family, text, saved, tmp_path):
    model, data = opened(saved, family)
    spec = parse_spec(text)
    value = apply(model, chain(rtn(spec), qat_end_to_end(**LEARNING)), data)
    before, flipped = dict(apply(model, rtn(spec), data).segments()), 0
    for path, after in value.segments():
        for name, q in rounded(after).items():
            assert off_grid(q) is None
            flipped += int((q.codes != rounded(before[path])[name].codes).sum())
        for note in after.notes.values():
            assert note["kl"] < note["kl_before"]
    assert flipped
    result = write(value, tmp_path / "out")
    assert not verify(result.path, model.path).faults
    plain = evaluate(apply(model, rtn(spec), data), model, data).kl
    assert evaluate(open_checkpoint(result.path), model, data).kl < plain


def test_a_small_step_changes_no_code(saved):
    """Nor one that a method chose although another is nearer to the target."""
    model, data = opened(saved)
    spec = parse_spec("int3-g16")
    before = dict(apply(model, gptq(spec), data).segments())
    step = qat_end_to_end(steps=1, rate=0.05)
    for path, after in apply(model, chain(gptq(spec), step), data).segments():
        assert all(note["kept_step"] == 1 for note in after.notes.values())
        for name, q in rounded(after).items():
            assert torch.equal(q.codes, rounded(before[path])[name].codes)


def test_zeros_of_a_mask_stay(saved):
    model, data = opened(saved)
    recipe = chain(magnitude("2:4"), gptq(parse_spec("int4-g16")), qat_end_to_end(**LEARNING))
    for graph in dict(apply(model, recipe, data).segments()).values():
        for name, support in graph.supports.items():
            assert not dense(graph.params[name], torch.float32)[~support].any()


def test_codes_read_from_a_directory_learn(saved, tmp_path):
    model, data = opened(saved)
    spec = parse_spec("int3-g16-asym")
    read = open_checkpoint(write(apply(model, rtn(spec), data), tmp_path / "out").path)

    def as_written(weight):
        return weight.cell.put(read.leaf(f"{weight.name}.weight"))

    front = each_cell("as_written", as_written, spec=spec)
    graphs = dict(apply(model, chain(front, qat_end_to_end(steps=2)), data).segments()).values()
    assert {q.scales.dtype for graph in graphs for q in rounded(graph).values()} == {torch.float32}
    assert all(off_grid(q) is None for graph in graphs for q in rounded(graph).values())
