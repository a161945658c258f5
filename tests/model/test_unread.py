"""Weights that no program shows as a product stay as they are: everything else of their model is
measured and quantized."""

from functools import partial

import pytest
import torch
from model_folders import contents, random_tokens, refused, tensors
from transformers import AutoModelForCausalLM

import qlab.cli
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import keep, rules
from qlab.directories.verify import verify
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import lower
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

INT8 = parse_spec("int8-g16")
FAMILY = "llama4_text"  # multiplies all tokens by all experts at once, in a product of batches
EXPERTS = "model.layers.1.feed_forward.experts.gate_up_proj"


@pytest.fixture(scope="module")
def source(saved):
    return saved(FAMILY)


def test_a_model_whose_weights_are_not_all_read_is_evaluated(source):
    model = open_checkpoint(source)
    assert evaluate(model, model, random_tokens(source)).kl == 0


@pytest.mark.parametrize("method", [rtn, gptq])
def test_what_a_rule_keeps_need_not_be_read(method, source, tmp_path):
    model, data = open_checkpoint(source), random_tokens(source)
    recipe = rules({"*experts*": keep(), "*": method(INT8)})
    planned = plan(model, recipe, data)
    assert EXPERTS in planned.unquantized and EXPERTS not in planned.sites
    out = quantize(model, recipe, data, tmp_path / "out").path
    assert verify(out, source).faults == []
    assert torch.equal(tensors(out)[EXPERTS], tensors(source)[EXPERTS])
    assert 0 < evaluate(open_checkpoint(out), model, data).kl < 0.01


def test_a_recipe_that_covers_what_is_not_read_is_refused_before_work(source, tmp_path):
    model = open_checkpoint(source)
    words = (
        f"{EXPERTS} (4, 64, 256) is used by aten.bmm.default",
        "--keep PATTERN",
        "keep() in rules()",
    )
    refused(lambda: quantize(model, rtn(INT8), None, tmp_path / "out"), *words)
    others = {"*attn*": rtn(INT8), "*shared_expert*": keep(), "*layers.0*": keep()}
    refused(lambda: plan(model, rules(others)), "no rule covers", EXPERTS)
    assert not list(tmp_path.iterdir())


def test_the_command_line_keeps_what_it_is_told_to(command, source, saved, tmp_path):
    call = partial(command, qlab.cli.main)
    arguments = ["--method", "rtn", "--spec", "int8-g16"]
    code, _, error = call("quantize", source, "--out", tmp_path / "out", *arguments)
    assert code == 2 and "--keep PATTERN" in error and not list(tmp_path.iterdir())
    assert (
        call("quantize", source, "--out", tmp_path / "out", *arguments, "--keep", "*experts*")[0]
        == 0
    )
    code, out, _ = call("plan", saved(), *arguments, "--keep", "*.o_proj", "--keep", "*.up_proj")
    assert code == 0 and "keep" in out and "10 weights quantized" in out
    code, _, error = call("plan", saved(), *arguments, "--keep", "*nowhere*")
    assert code == 2 and "'keep' matches no site (*nowhere*)" in error
    model, recipe = open_checkpoint(source), rules({"*experts*": keep(), "*": rtn(INT8)})
    same = quantize(model, recipe, None, tmp_path / "same").path
    assert {n: b for n, b in contents(same).items() if n != "qlab.json"} == {
        n: b for n, b in contents(tmp_path / "out").items() if n != "qlab.json"
    }


def test_a_router_of_experts_that_are_not_read_is_one(source, tmp_path):
    model, data = open_checkpoint(source), random_tokens(source, 2, 16)
    router = "model.layers.1.feed_forward.router"  # a subclass of nn.Linear, which gives a pair
    recipe = rules({"*experts*": keep(), "*": rtn(INT8)})
    assert plan(model, recipe, data).sites[router]["spec"] is None
    out = quantize(model, recipe, data, tmp_path / "out").path
    with torch.no_grad():
        lowered = lower(out, dtype=torch.float32, dense_cache=True)(input_ids=data.ids).logits
        whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        expected = whole(input_ids=data.ids).logits
    assert (lowered - expected).norm() < 0.05 * expected.norm()
