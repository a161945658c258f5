"""Rules, plans and budgets of mixtures of experts: which experts, routers and shared experts a
recipe reaches, and what memory their statistics take."""

import pytest
import torch
from families import FAMILIES
from logits import assert_read_alike, qlab_logits
from model_folders import random_tokens
from transformers import AutoConfig, AutoModelForCausalLM

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import keep, rules
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g16")


def test_routers_stay_as_they_are_and_a_rule_for_them_is_refused_by_name(saved):
    model = open_checkpoint(saved("qwen3_moe"))
    planned = plan(model, rtn(INT4))
    assert (
        "model.layers.1.mlp.gate" in planned.unquantized
        and planned.sites["model.layers.1.mlp.gate"]["spec"] is None
    )
    # A router needs no rule.
    assert plan(model, rules({"*.self_attn.*": keep(), "*.experts.*": rtn(INT4)})).sites
    with pytest.raises(
        QlabError,
        match=(
            r"'rtn' is for model\.layers\.0\.mlp\.gate, model\.layers\.1\.mlp\.gate only, which "
            r"choose"
        ),
    ):
        plan(model, rules({"*.mlp.gate": rtn(INT4), "*": rtn(INT4)}))


def test_the_gate_of_a_shared_expert_stays_as_it_is_too(tmp_path):
    experts = dict(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    config = AutoConfig.for_model("qwen2_moe", **FAMILIES["qwen2"] | experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    result = quantize(
        open_checkpoint(tmp_path / "model"),
        rtn(parse_spec("int4-g16-asym")),
        None,
        tmp_path / "out",
    )
    gates = [
        f"model.layers.{i}.mlp.{gate}" for i in range(2) for gate in ("gate", "shared_expert_gate")
    ]
    assert set(gates) <= set(open_checkpoint(result.path).raw["quantization_config"]["ignore"])
    assert {name for name, row in result.sites.items() if row["spec"] is None} == set(gates)


def test_rules_choose_experts_and_shared_experts(saved, tmp_path):
    source = saved("deepseek_v3")
    recipe = rules(
        {
            "*.shared_experts.*": keep(),
            "*.mlp.experts.down_proj": rtn(parse_spec("int8-channel")),
            "*": rtn(INT4),
        }
    )
    result = quantize(open_checkpoint(source), recipe, None, tmp_path / "out")
    specs = {
        name.removeprefix("model.layers.2.mlp."): row["spec"]
        for name, row in result.sites.items()
        if ".2.mlp." in name
    }
    assert specs == {
        "experts.gate_up_proj": "int4-g16",
        "experts.down_proj": "int8-channel",
        "gate": None,
        **dict.fromkeys([f"shared_experts.{p}_proj" for p in ("gate", "up", "down")]),
    }
    assert (
        open_checkpoint(result.path).quantized["model.layers.2.mlp.experts.7.down_proj"].bits == 8
    )
    assert torch.isfinite(qlab_logits(result.path)).all()


def test_experts_alone_are_quantized_and_all_else_is_kept(saved, tmp_path):
    recipe = rules({"*.experts.*": gptq(INT4), "*": keep()})
    source = saved("mixtral")
    result = quantize(open_checkpoint(source), recipe, random_tokens(source), tmp_path / "out")
    assert {name.split(".")[-2] for name in open_checkpoint(result.path).quantized} <= set("0123")
    assert_read_alike(result.path)


def test_a_plan_counts_experts_and_the_memory_of_their_statistics(saved):
    model = open_checkpoint(saved("qwen3_moe"))
    planned = plan(model, gptq(INT4), random_tokens(model.path), inputs="reference")
    assert (
        planned.sites["model.layers.0.mlp.experts.down_proj"]["experts"] == 4
        and "experts" not in planned.sites["model.layers.0.mlp.gate"]
    )
    expected = 4 * (64**2 + 32**2) * 4
    assert planned.memory["statistics"] >= expected
    everywhere = plan(model, gptq(INT4), random_tokens(model.path), calibrate_all_experts=True)
    assert everywhere.passes == 2 and everywhere.peak_bytes > 0


def test_a_budget_is_met_by_parts_of_the_experts_or_refused(saved):
    model = open_checkpoint(saved("qwen3_moe"))
    data = random_tokens(model.path, samples=2, length=16)  # few beside the statistics
    whole, small = (plan(model, gptq(INT4), data, memory=memory) for memory in (None, 1))
    assert whole.experts_at_once is None and small.experts_at_once == 1
    assert small.memory["statistics"] < whole.memory["statistics"]
    with pytest.raises(QlabError, match="the budget is 0 MiB"):
        small.check(1)
    # The experts' statistics are shared.
    assert plan(model, gptq(INT4), data, memory=1, inputs="reference").experts_at_once is None


@pytest.mark.parametrize("spec", ["int8-tensor"])
def test_a_scale_per_tensor_of_fused_experts_is_refused_by_name(spec, saved):
    with pytest.raises(
        QlabError,
        match=(
            r"layers\.0\.mlp\.experts\.\w+, .*: fused experts have a scale per group, channel or "
            r"block"
        ),
    ):
        plan(open_checkpoint(saved("mixtral")), rtn(parse_spec(spec)))
