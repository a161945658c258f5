"""A plan says what a recipe will do, and refuses by name what it cannot, before anything runs or is
written."""

import json
import re
from dataclasses import replace

import pytest
import torch
from families import tiny
from model_folders import change, contents, random_tokens, refused, tensors
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

import qlab
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, each_weight, keep, rules
from qlab.data.calibration import from_ids
from qlab.data.images import Samples
from qlab.directories.verify import verify
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g16")
PER_TENSOR = qlab.quantize_inputs("int8-tensor", static="absmax")
Q, K, V, O = (f"model.layers.0.self_attn.{p}_proj" for p in "qkvo")


@pytest.fixture(scope="module")
def source(saved):
    return saved("llama")


@pytest.fixture(scope="module")
def model(source):
    return open_checkpoint(source)


def refusal(*args) -> str:
    with pytest.raises(QlabError) as error:
        plan(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_stages_sites_and_what_stays_unquantized(model):
    planned = plan(model, rules({"*.o_proj": keep(), "*": rtn(INT4)}))
    assert [stage["stage"] for stage in planned.stages] == ["keep", "rtn"]
    assert len(planned.sites) == 14 and planned.sites[Q] == {
        "spec": "int4-g16",
        "shape": [64, 64],
        "bits_per_weight": 6.0,
    }
    assert set(planned.unquantized) == {"lm_head", O, O.replace("0", "1")}
    assert planned.json()["sites"][O]["spec"] is None


def test_layers_beyond_those_of_the_config_stay_and_are_named(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    # A weight of a layer that predicts further tokens.
    more = {"model.layers.1.join.weight": torch.ones(64, 128)}
    save_file(tensors(folder) | more, folder / "model.safetensors", metadata={"format": "pt"})
    left = plan(open_checkpoint(folder), rtn(INT4)).unquantized
    beyond = {f"model.layers.1.self_attn.{p}_proj" for p in "qkvo"} | {
        f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")
    }
    assert set(left) == {"lm_head", "model.layers.1.join"} | beyond and len(left) == 9


def test_bits_per_weight_by_hand(model, saved):
    # a block: q and o 64 x 64, k and v 32 x 64, gate and up 128 x 64, down 64 x 128
    mixed = rules(
        {
            "*.self_attn.o_proj": keep(),  # fp32
            "*.self_attn.*": rtn(parse_spec("int8-channel")),  # one fp32 scale per row of 64
            "*.mlp.down_proj": rtn(
                parse_spec("int3-g32-asym")
            ),  # an fp32 scale and a 3-bit zero per 32
            "*": rtn(parse_spec("int4-g64")),  # an fp32 scale per 64
        }
    )
    bits = 4096 * 32 + (4096 + 2 * 2048) * 8.5 + 8192 * (3 + 35 / 32) + 2 * 8192 * 4.5
    assert plan(model, mixed).bits_per_weight == bits / (2 * 4096 + 2 * 2048 + 3 * 8192)
    halves = open_checkpoint(saved("llama", torch.bfloat16))
    assert plan(halves, rtn(parse_spec("int4-g64-asym"))).bits_per_weight == 4 + (16 + 4) / 64
    assert plan(halves, rtn(parse_spec("int8-tensor"))).sites[Q]["bits_per_weight"] == 8 + 16 / 4096


def test_the_plan_is_what_the_job_then_does(model, source, tmp_path):
    recipe = rules(
        {"*.self_attn.*": awq(parse_spec("int4-g32-asym")), "*.down_proj": keep(), "*": gptq(INT4)}
    )
    result = quantize(model, recipe, random_tokens(source), tmp_path / "out")
    assert result.bits_per_weight == result.plan.bits_per_weight
    rows = {
        name: {key: row[key] for key in ("spec", "shape", "bits_per_weight")}
        for name, row in result.sites.items()
    }
    assert rows == result.plan.sites


def test_passes_tokens_and_statistics(model, source):
    without = plan(model, rtn(INT4), random_tokens(source))
    assert (without.passes, without.tokens, without.statistics) == (0, 0, [])
    observed = plan(
        model,
        chain(at("*.mlp.*", gptq(INT4)), at("*.self_attn.*", awq(INT4))),
        random_tokens(source),
    )
    assert (observed.passes, observed.tokens) == (1, 128)
    assert plan(model, gptq(INT4), random_tokens(source)).passes == 1
    assert plan(model, gptq(INT4), random_tokens(source), inputs="reference").passes == 2
    # Rounded rows take no scale.
    assert plan(model, awq(parse_spec("nvfp4")), random_tokens(source)).passes == 2
    assert observed.statistics == ["absmean", "second_moment"]
    beside = plan(model, gptaq(INT4), random_tokens(source))
    # The reference runs too.
    assert (beside.passes, beside.statistics) == (2, ["drift", "second_moment"])


def test_the_plan_writes_nothing(model, source):
    before = contents(source)
    plan(model, gptq(INT4), random_tokens(source))
    assert contents(source) == before


def test_a_memory_budget_is_kept_or_refused(model, source, tmp_path):
    planned = plan(model, gptq(INT4), random_tokens(source))
    planned.check(planned.peak_bytes)
    with pytest.raises(
        QlabError, match=r"the plan needs \d+ MiB and the budget is 8 MiB .*most of it: process.*"
    ):
        quantize(model, gptq(INT4), random_tokens(source), tmp_path / "out", memory=8 << 20)
    assert not list(tmp_path.iterdir())


def test_groups_that_do_not_divide_are_refused_with_the_legal_ones(model):
    message = refusal(model, rules({"*.down_proj": rtn(parse_spec("int4-g48")), "*": rtn(INT4)}))
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in message
    assert "groups of 48 do not divide the 128 input channels" in message and "(64, 128)" in message
    assert message.endswith("16, 32, 64, 128 or 'channel'")  # the one width of this spec


def test_groups_are_suggested_that_divide_every_width(saved):
    message = refusal(open_checkpoint(saved("llama", hidden_size=96)), rtn(parse_spec("int4-g64")))
    assert message.endswith("legal groups here are 16, 32 or 'channel'; for all 2 widths 16, 32")
    narrow = refusal(
        open_checkpoint(saved("llama", hidden_size=96, intermediate_size=80)),
        rtn(parse_spec("int4-g64")),
    )
    assert narrow.endswith("; for all 2 widths 16")


def test_a_pattern_without_a_site_is_refused(model):
    assert "matches no site (*.experts.*)" in refusal(model, at("*.experts.*", rtn(INT4)))
    assert "matches no site (*.atn.*" in refusal(
        model, rules({"*.atn.*": rtn(INT4), "*": rtn(INT4)})
    )


def test_a_gauge_without_a_wire_names_the_nearest(model):
    for pattern in ("*.o_porj:in", "model.layers.0.self_attn.o_porj:in"):
        message = refusal(model, chain(qlab.gauge("flip", pattern, lambda turn: None), rtn(INT4)))
        assert "'flip' matches no site" in message and "self_attn.o_proj:in" in message


def test_what_a_block_step_says_that_it_puts_is_refused_beforehand(model):
    step = qlab.each_block("mine", lambda block: {}, leaves="low ranks")
    data = random_tokens(model.path)
    assert re.search(
        r"the stage 'mine' makes of .* low ranks, for which", refusal(model, step, data)
    )


def test_a_pattern_that_earlier_ones_leave_nothing_for_is_refused(model):
    assert "matches no site (*.q_proj and not *)" in refusal(
        model, rules({"*": rtn(INT4), "*.q_proj": keep()})
    )


def test_uncovered_sites_are_refused(model):
    message = refusal(model, rules({"*.self_attn.*": rtn(INT4)}))
    assert "no rule covers model.layers.0.mlp.down_proj" in message and "keep()" in message


def test_a_site_rounded_twice_is_refused(model):
    message = refusal(model, chain(rtn(INT4), at("*.q_proj", rtn(parse_spec("int8-channel")))))
    assert f"{Q} is rounded by two stages, to int4-g16 and to int8-channel" in message


def test_a_rule_that_splits_the_sites_of_one_input_is_refused(model, source):
    recipe = rules({"*.q_proj": awq(INT4), "*": rtn(INT4)})
    message = refusal(model, recipe, random_tokens(source))
    assert f"{Q} shares its input with {K}, {V}" in message and "awq_scale" in message


def test_a_data_dependent_recipe_without_data_is_refused(model):
    assert "observes second_moment and no calibration text" in refusal(model, gptq(INT4))


def test_a_statistic_that_nobody_knows_is_refused_with_those_there_are(model, source):
    mine = each_weight("mine", lambda W, seen, spec: (W, {}), INT4, frozenset({"hessian"}))
    said = refusal(model, mine, random_tokens(source))
    assert (
        "asks for a statistic 'hessian'; there are absmax, absmean, drift" in said
        and "second_moment" in said
    )


def test_a_recipe_that_rounds_nothing_is_refused(model, source):
    assert "rounds no weight" in refusal(model, ())
    assert "rounds no weight" in refusal(model, keep())
    assert "rounds no weight" in refusal(model, awq_scale(INT4), random_tokens(source))


def test_windows_longer_than_a_table_of_positions_are_refused_and_rotated_ones_have_no_end(
    tmp_path,
):
    for family in ("opt", "llama"):
        tiny(family).save_pretrained(tmp_path / family)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 4}
    GPTJForCausalLM(GPTJConfig(**sizes, n_positions=64, rotary_dim=8)).save_pretrained(
        tmp_path / "gptj"
    )  # its table is a buffer
    for limited in (open_checkpoint(tmp_path / family) for family in ("opt", "gptj")):
        longest = limited.config.max_position_embeddings
        plan(limited, gptq(INT4), random_tokens(limited.path, 1, longest))
        message = refusal(limited, gptq(INT4), random_tokens(limited.path, 1, longest + 1))
        assert f"windows of {longest + 1} tokens are longer than the {longest} positions" in message
    llama = open_checkpoint(tmp_path / "llama")
    plan(llama, gptq(INT4), random_tokens(llama.path, 1, llama.config.max_position_embeddings + 1))


def test_conv1d_is_refused_by_name_with_the_codec_that_holds_it(tmp_path):
    tiny("gpt2").half().save_pretrained(tmp_path)
    message = refusal(open_checkpoint(tmp_path), rtn(INT4))
    assert "transformer.h.0.attn.c_attn" in message and message.endswith(
        "; the codec gptq holds these"
    )
    assert plan(open_checkpoint(tmp_path), rtn(INT4), codec="gptq").sites[
        "transformer.h.0.attn.c_attn"
    ]["shape"] == [192, 64]


def test_a_quantized_model_is_refused(model, tmp_path):
    out = quantize(model, rtn(INT4), None, tmp_path / "out").path
    assert "is quantized already; start from the unquantized model" in refusal(
        open_checkpoint(out), rtn(INT4)
    )


def test_refusals_come_before_anything_is_written(model, tmp_path):
    with pytest.raises(QlabError):
        quantize(model, rtn(parse_spec("int4-g48")), None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_a_format_cannot_hold_of_these_shapes_or_all_together_is_refused(model, saved):
    fine, coarse, odd = (
        replace(parse_spec(name), scale_dtype=torch.float16)
        for name in ("int4-g16", "int4-g32", "int3-channel")
    )
    with pytest.raises(
        QlabError,
        match=(
            r"^AWQ has one spec for all modules, and .* has int4-g16 where .* has int4-g32; write "
            r"gptq$"
        ),
    ):
        plan(model, rules({"*.o_proj": rtn(coarse), "*": rtn(fine)}), codec="awq")
    narrow = open_checkpoint(saved("llama", intermediate_size=72))
    with pytest.raises(
        QlabError,
        match=(
            r"\.mlp\.gate_proj, .*: 72 x 64 codes of 3 bits do not fill int32 words along both "
            r"axes"
        ),
    ):
        plan(narrow, rtn(odd), codec="gptq")


def test_zero_points_that_version_1_of_gptq_may_not_hold_are_refused_before_any_work(
    source, tmp_path, saved
):
    zeros, halves = parse_spec("int4-g32-asym"), open_checkpoint(saved("llama", torch.float16))
    mixed = rules({"*.mlp.*": gptq(parse_spec("int4-g32")), "*": gptq(zeros)})
    for codec, other in (("gptq", "gptq_v2"), ("gptq_desc_act", "gptq_v2_desc_act")):
        words = (
            rf"^{Q}, {K}, {V}, {O} and 4 more: GPTQ version 1 stores z - 1 and so no zero point at "
            rf"the lowest code, which rounding to int4-g32-asym may give; write {other} "
            r"\(--codec\)$"
        )
        with pytest.raises(QlabError, match=words):
            plan(halves, mixed, random_tokens(source), codec=codec)
        with pytest.raises(QlabError, match=words):
            quantize(halves, mixed, random_tokens(source), tmp_path / "out", codec=codec)
        assert (
            plan(halves, mixed, random_tokens(source), codec=other).sites[Q]["spec"]
            == "int4-g32-asym"
        )
    assert not list(tmp_path.iterdir())
    positive = tmp_path / "positive"
    tiny("llama").half().save_pretrained(positive)
    # Zero points of positive weights are the lowest code.
    change(positive, model__layers__0__mlp__up_proj__weight=torch.abs)
    written = quantize(
        open_checkpoint(positive), rtn(zeros), None, tmp_path / "v2", codec="gptq_v2"
    ).path
    leaf = open_checkpoint(written).leaf("model.layers.0.mlp.up_proj.weight")
    assert leaf.zeros.eq(-8).all() and verify(written, positive).faults == []


@pytest.mark.parametrize(
    "clip, words",
    [
        (8.0, "is used in DbrxExperts, which torch.export cannot trace"),
        (
            None,
            "transformer.blocks.0 (DbrxBlock) cannot be traced by torch.export",
        ),  # and does not run either
    ],
)
def test_a_module_whose_operations_ask_for_values_runs_as_it_is_and_is_refused_by_name(
    clip, words, tmp_path
):
    config = AutoConfig.for_model(
        "dbrx",
        d_model=64,
        n_heads=4,
        n_layers=2,
        max_seq_len=128,
        vocab_size=128,
        attn_config=dict(kv_n_heads=2, clip_qkv=clip, rope_theta=1e4),
        ffn_config=dict(ffn_hidden_size=64, moe_num_experts=4, moe_top_k=2),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dbrx")
    dbrx = open_checkpoint(tmp_path / "dbrx")
    refused(lambda: quantize(dbrx, rtn(INT4), None, tmp_path / "out"), words)
    assert not list(tmp_path.glob("out*"))
    if clip:
        data = from_ids(dbrx, torch.arange(3, 67).view(2, 32))
        assert evaluate(dbrx, dbrx, data).kl == 0
        recipe = rules({"*.attn.*": gptq(INT4), "*": keep()})
        result = quantize(dbrx, recipe, data, tmp_path / "kept")
        quantized = {name for name, row in result.sites.items() if row["spec"]}
        assert quantized == {
            f"transformer.blocks.{block}.norm_attn_norm.attn.{name}"
            for block in (0, 1)
            for name in ("Wqkv", "out_proj")
        }
        assert verify(result.path, dbrx).faults == []
        assert 0 < evaluate(open_checkpoint(result.path), dbrx, data).kl < 1e-2


def test_windows_of_lengths_that_a_program_is_not_for_are_refused_before_anything_runs(saved):
    windows = tuple({"input_ids": torch.arange(3, 3 + n)[None]} for n in (20, 20, 24))
    samples = Samples(inputs=windows, texts=(), sha256="", seed=0, images=0, image_tokens=0)
    words = (
        "model.layers.0 runs other operations on windows of another length",
        "windows of 20 and of 24 tokens",
    )
    refused(
        lambda: plan(open_checkpoint(saved("olmo_hybrid")), gptq(parse_spec("int8-g16")), samples),
        *words,
    )
    assert plan(open_checkpoint(saved()), gptq(parse_spec("int8-g16")), samples).tokens == 64
