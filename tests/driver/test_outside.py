"""Linears around the blocks: vision towers, projectors and heads are left alone, or rounded without
data where a rule says so."""

import json

import pytest
import torch
from families import tiny
from logits import IDS, qlab_logits
from model_folders import bits_equal, random_tokens, tensors
from pictures import every_model, from_transformers, pictured, with_image
from transformers import AutoModelForCausalLM

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, keep, outside, rules
from qlab.cli import main
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.outside import outside_sites
from qlab.driver.plan import plan
from qlab.driver.quantize import compare, quantize
from qlab.errors import QlabError
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import lower
from qlab.methods.awq import awq
from qlab.methods.gptq import gptq
from qlab.methods.hqq import hqq
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.model.skeleton import Skeleton

INT4, INT8 = parse_spec("int4-g16"), parse_spec("int8-channel")
TOWER = rules({"*lm_head": outside(keep()), "*": outside(rtn(INT8))})


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    """written(family) -> a directory whose decoder, tower and projector are rounded, made once."""
    paths = {}

    def write(family):
        if family not in paths:
            recipe, out = chain(gptq(INT4), TOWER[:-1]), tmp_path_factory.mktemp(family) / "out"
            paths[family] = quantize(
                open_checkpoint(saved(family)), recipe, random_tokens(saved(family)), out
            )
        return paths[family]

    return write


def causal(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@torch.no_grad()
@every_model
def test_a_rounded_tower_loads_in_transformers_and_computes_what_qlab_reads(family, saved, written):
    batch, result = pictured(family, 0), written(family)
    ours, theirs = with_image(result.path, batch), from_transformers(result.path)(**batch).logits
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    decoder = quantize(
        open_checkpoint(saved(family)),
        gptq(INT4),
        random_tokens(saved(family)),
        result.path.with_name("decoder"),
    )
    # The tower did change,
    assert (with_image(decoder.path, batch) - ours).norm() > 1e-4 * ours.norm()
    # and the decoder did not.
    assert torch.equal(qlab_logits(decoder.path), qlab_logits(result.path))


@every_model
def test_every_linear_around_the_blocks_is_reported_and_verified(family, saved, written):
    result, source = written(family), open_checkpoint(saved(family))
    around = set(outside_sites(Skeleton(source, torch.float32))) - {"lm_head"}
    assert (
        around <= set(result.sites) == set(result.plan.sites) - {"lm_head"}
        and "lm_head" in result.plan.unquantized
    )
    assert all(
        result.sites[name]["spec"] == "int8-channel"
        and 0 < result.sites[name]["weight_error"] < 0.01
        for name in around
    )
    model, new = tiny(family), tensors(result.path)
    biases = {name for name in tensors(saved(family)) if name.endswith("bias")}
    assert all(bits_equal(tensors(saved(family))[name], new[name]) for name in biases)
    assert {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} == set(
        result.sites
    ) | {"lm_head"}
    assert not verify(result.path, source).faults


def test_a_killed_run_writes_the_tower_again_with_its_report(saved, tmp_path, monkeypatch):
    source = open_checkpoint(saved("llava"))
    recipe = chain(rtn(INT4), at("*projector*", outside(hqq(INT8))))
    whole = quantize(source, recipe, None, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(
            "qlab.files.writer.Writer.write_notes",
            lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            quantize(source, recipe, None, tmp_path / "killed")
    again = quantize(source, recipe, None, tmp_path / "killed", resume=True)
    assert again.sites == whole.sites and sum("projector" in name for name in again.sites) == 2
    assert all(bits_equal(t, tensors(again.path)[name]) for name, t in tensors(whole.path).items())


def test_recipes_of_one_pass_each_round_what_they_name(saved, tmp_path):
    source = open_checkpoint(saved("llava"))
    recipes = {
        "left": rtn(INT4),
        "rounded": chain(rtn(INT4), at("*projector*", outside(rtn(INT4)))),
    }
    compare(source, recipes, None, tmp_path)
    for name, expected in {"left": 0, "rounded": 2}.items():
        assert (
            sum("projector" in module for module in open_checkpoint(tmp_path / name).quantized)
            == expected
        )


@torch.no_grad()
def test_a_head_of_its_own_is_rounded_by_rule(saved, tmp_path):
    source = saved("llama")
    result = quantize(
        open_checkpoint(source),
        chain(rtn(parse_spec("int4-g32")), at("lm_head", outside(rtn(INT8)))),
        None,
        tmp_path / "out",
    )
    assert "lm_head.weight_packed" in tensors(result.path)
    theirs = causal(result.path)(input_ids=IDS).logits
    assert (qlab_logits(result.path) - theirs).norm() <= 1e-5 * theirs.norm()
    assert (
        lower(result.path, dtype=torch.float32, dense_cache=True)(input_ids=IDS).logits - theirs
    ).norm() <= 1e-4 * theirs.norm()
    assert (
        evaluate(open_checkpoint(result.path), open_checkpoint(source), random_tokens(source)).kl
        > 0
    )


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_vl"])
def test_a_tied_head_becomes_a_weight_of_its_own(family, saved, tmp_path):
    source = saved(family, tie_word_embeddings=True)
    result = quantize(
        open_checkpoint(source),
        chain(rtn(INT4), at("lm_head", outside(rtn(INT8)))),
        None,
        tmp_path / "out",
    )
    after, before = tensors(result.path), tensors(source)
    [embedding] = [name for name in before if "embed_tokens" in name]
    assert "lm_head.weight_packed" in after and not any(
        name.startswith("lm_head") for name in before
    )
    assert (
        bits_equal(after[embedding], before[embedding])
        and result.sites["lm_head"]["weight_error"] > 0
    )
    theirs = (from_transformers if family == "qwen2_vl" else causal)(result.path)(
        input_ids=IDS
    ).logits
    assert (qlab_logits(result.path) - theirs).norm() <= 1e-5 * theirs.norm()
    assert (
        lower(result.path, dtype=torch.float32, dense_cache=True)(input_ids=IDS).logits - theirs
    ).norm() <= 1e-4 * theirs.norm()
    assert verify(result.path, source).faults == []


def test_verify_finds_a_head_that_is_not_the_embedding_rounded(saved, tmp_path):
    source, other = (saved("llama", tie_word_embeddings=True), tmp_path / "other")
    quantize(
        open_checkpoint(source),
        chain(rtn(INT4), at("lm_head", outside(rtn(INT8)))),
        None,
        tmp_path / "out",
    )
    model = tiny("llama", tie_word_embeddings=True)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(other)
    assert any(
        fault.startswith("lm_head: its weight error")
        for fault in verify(tmp_path / "out", other).faults
    )


def test_rules_for_the_blocks_do_not_reach_around_them(saved):
    with pytest.raises(
        QlabError,
        match=r"matches no site \(\*visual\*\); outside\(\) reaches model.visual.blocks.0.attn.qkv",
    ):
        plan(open_checkpoint(saved("qwen2_vl")), rules({"*visual*": rtn(INT4), "*": keep()}))


@pytest.mark.parametrize(
    "transform, words",
    [
        (gptq(INT4), "'gptq' observes second_moment"),
        (awq(INT4), "'awq_scale' observes"),
        (quantize_inputs(INT8), "'quantize_inputs' changes more than weights"),
    ],
)
def test_methods_that_need_data_are_refused_around_the_blocks(transform, words):
    with pytest.raises(QlabError, match=f"{words}.*use rtn or hqq"):
        outside(transform)


def test_groups_that_do_not_divide_a_tower_are_refused_by_name(saved):
    with pytest.raises(QlabError, match=r"model\.vision_tower.*groups of 48 do not divide the 32"):
        plan(
            open_checkpoint(saved("llava")),
            chain(rtn(INT4), at("*vision*", outside(rtn(parse_spec("int4-g48"))))),
        )


def test_weights_named_twice_are_refused(saved):
    twice = chain(rtn(INT4), at("*fc1", outside(rtn(INT8))), at("*vision*", outside(rtn(INT4))))
    with pytest.raises(QlabError, match="fc1 is rounded by two stages"):
        plan(open_checkpoint(saved("llava")), twice)


def test_without_a_model_nothing_lies_outside(saved, tmp_path):
    with pytest.raises(QlabError, match="nobody knows what lies around its blocks"):
        quantize_files(saved("llava"), chain(rtn(INT4), outside(rtn(INT8))), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_rounds_a_tower(saved, tmp_path, command):
    code, out, err = command(
        main,
        "quantize",
        saved("qwen2_vl"),
        "--out",
        tmp_path / "out",
        "--method",
        "rtn",
        "--spec",
        "int4-g16",
        "--outside",
        "*visual*=int8-channel",
    )
    assert code == 0 and "around the blocks" in out, err
    record = json.loads((tmp_path / "out" / "qlab.json").read_text())
    assert {row["spec"] for name, row in record["sites"].items() if "visual" in name} == {
        "int8-channel"
    }
    code, _, err = command(
        main,
        "plan",
        saved("qwen2_vl"),
        "--method",
        "rtn",
        "--spec",
        "int4-g16",
        "--outside",
        "*visual*",
    )
    assert code == 2 and "write GLOB=SPEC" in err
