"""Mixtures of experts from file to file: each expert solved on its own tokens and written by the
name engines expect."""

import json

import pytest
import torch
from families import MIXTURES, tiny
from logits import IDS, assert_read_alike, qlab_logits
from model_folders import add_tokenizer, bits_equal, random_tokens, tensors
from quick import ROUNDING

from qlab.algebra.grid import encode as on_grid
from qlab.algebra.grid import minmax
from qlab.algebra.qtensor import dense, round_codes
from qlab.algebra.spec import parse_spec
from qlab.cli import main
from qlab.data.calibration import from_ids
from qlab.driver.quantize import compare, quantize
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.loading import load_block, load_outside
from qlab.model.running import record_blocks
from qlab.model.skeleton import Skeleton

INT4 = parse_spec("int4-g16")
EXPERT = {  # an expert's modules in the files, as the families' own checkpoints call them
    "mixtral": "model.layers.{}.block_sparse_moe.experts.{}.{}",
    "qwen3_moe": "model.layers.{}.mlp.experts.{}.{}",
    "deepseek_v3": "model.layers.{}.mlp.experts.{}.{}",
}
PROJECTIONS = {
    "mixtral": ("w1", "w3", "w2"),
    **dict.fromkeys(["qwen3_moe", "deepseek_v3"], ("gate_proj", "up_proj", "down_proj")),
}
every_mixture = pytest.mark.parametrize("family", MIXTURES)


@every_mixture
def test_every_method_writes_experts_that_transformers_reads_as_qlab_does(family, saved, tmp_path):
    source = saved(family)
    model = open_checkpoint(source)
    before = qlab_logits(source)
    assert torch.allclose(before, tiny(family)(IDS).logits, rtol=1e-4, atol=1e-4)
    chosen = ROUNDING if family == "mixtral" else ("rtn", "gptq", "awq")
    recipes = {name: ROUNDING[name](INT4) for name in chosen}
    results = compare(model, recipes, random_tokens(source), tmp_path)
    last = model.config.num_hidden_layers - 1
    for name, result in results.items():
        names = tensors(result.path)
        for expert in range(result.sites[f"model.layers.{last}.mlp.experts.down_proj"]["shape"][0]):
            for projection in PROJECTIONS[family]:
                module = EXPERT[family].format(last, expert, projection)
                assert f"{module}.weight_packed" in names and f"{module}.weight" not in names
        assert result.sites[f"model.layers.{last}.mlp.gate"]["spec"] is None
        assert_read_alike(result.path)
        assert 0 < (qlab_logits(result.path) - before).norm() < 0.9 * before.norm(), name
    assert_read_alike(results["rtn"].path, dequantize=True)


@every_mixture
def test_what_is_no_expert_and_no_linear_is_written_as_it_was(family, saved, tmp_path):
    source = saved(family)
    result = quantize(open_checkpoint(source), rtn(INT4), None, tmp_path / "out")
    before, after = tensors(source), tensors(result.path)
    left = before.keys() & after.keys()
    assert {
        name for name in left if name.endswith((".gate.weight", "norm.weight", "correction_bias"))
    }
    assert all(bits_equal(before[name], after[name]) for name in left)
    quantized = {name.removesuffix("_packed") for name in after if name.endswith("weight_packed")}
    assert before.keys() == left | quantized  # nothing else appeared or went missing


def starving(directory):
    """A mixtral and calibration tokens of which, in the first block, expert 0 sees none and expert
    1 exactly two.

    Experts 2 to 5 read two directions with either sign, so that two of them always score above 0,
    where expert 0 is. Expert 1 follows the input of one token, just above what that token's second
    choice scores. Every window comes twice.
    """
    model = tiny("mixtral", num_local_experts=6)
    ids = torch.randint(3, 128, (1, 24), generator=torch.Generator().manual_seed(3))
    router, seen = model.model.layers[0].mlp.gate, {}
    with torch.no_grad():
        router.weight[:2] = 0
        router.weight[4:] = -router.weight[2:4]
        hook = router.register_forward_pre_hook(
            lambda module, args: seen.update(x=args[0].reshape(-1, 64))
        )
        model(ids)
        hook.remove()
        second = (seen["x"] @ router.weight.T).topk(2).values[:, 1]
        token = int(second.argmin())
        x = seen["x"][token]
        router.weight[1] = 1.01 * second[token] * x / x.square().sum()
    model.save_pretrained(directory)
    add_tokenizer(directory)
    return open_checkpoint(directory), from_ids(open_checkpoint(directory), ids.repeat(2, 1))


@torch.no_grad()
def fused_leaf(path, name):
    """The stacked leaf of a site in a directory."""
    skeleton = Skeleton(open_checkpoint(path), torch.float32)
    load_outside(skeleton, with_head=False)
    _, calls = record_blocks(skeleton, IDS)
    block = next(b for b in skeleton.blocks if name.startswith(f"{b}."))
    return load_block(skeleton, block, calls[block]).params[name.removeprefix(f"{block}.")]


def test_experts_that_no_token_or_two_tokens_reach_are_quantized_and_named(tmp_path):
    model, data = starving(tmp_path / "model")
    compared = ("qronos-refined", "loaq-refined", "gptaq")
    recipes = {name: ROUNDING[name](INT4) for name in ROUNDING if name not in compared}
    # Every router sees the tokens that it was made for.
    results = compare(model, recipes, data, tmp_path / "out", inputs="reference")
    results["gptaq"] = quantize(model, ROUNDING["gptaq"](INT4), data, tmp_path / "out" / "gptaq")
    site = "model.layers.0.mlp.experts.gate_up_proj"
    W_eok = torch.stack(
        [
            torch.cat(
                [
                    model.tensor(f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight")
                    for w in ("w1", "w3")
                ]
            )
            for e in range(6)
        ]
    )
    for name, result in results.items():
        row, q = result.sites[site], fused_leaf(result.path, site)
        assert torch.isfinite(q.scales).all() and torch.isfinite(qlab_logits(result.path)).all()
        if name in (
            "autoawq",
            "llmcompressor-awq",
            "smoothquant",
        ):  # which scale what nobody observed
            continue
        if name in ("rtn", "hqq", "auto_round", "qat"):  # which observe nothing of single experts
            assert "expert_tokens" not in row
            assert name == "hqq" or torch.equal(q.codes[0], on_grid(minmax, W_eok[0], q.spec).codes)
            continue
        assert row["expert_tokens"][0] == 0 and (name == "gptaq" or row["expert_tokens"][1] == 2)
        assert sum(row["expert_tokens"]) == row["tokens"] == 2 * data.ids.numel()
        assert {0, 1} <= set(result.experts_with_few_tokens[site])
        # AWQ's norm scales all experts alike before they are rounded.
        if not name.startswith("awq"):
            # Rounded to nearest: no data, H = I.
            assert torch.equal(q.codes[0], round_codes(W_eok[0], q.scales[0], None, q.spec)), name
            assert q.codes[0].count_nonzero() > q.codes[0].numel() / 2
        else:
            assert result.sites["model.layers.0.mlp.experts.down_proj"]["awq_ratio"][0] == 0.0


@pytest.mark.parametrize("everywhere", [False, True])
def test_all_experts_can_be_calibrated_on_all_tokens(everywhere, tmp_path):
    model, data = starving(tmp_path / "model")
    result = quantize(
        model,
        gptq(INT4),
        data,
        tmp_path / "out",
        inputs="reference",
        calibrate_all_experts=everywhere,
    )
    row = result.sites["model.layers.0.mlp.experts.gate_up_proj"]
    assert (row["expert_tokens"] == [data.ids.numel()] * 6) is everywhere
    assert result.plan.passes == 2
    assert (
        json.loads((result.path / "qlab.json").read_text())["job"]["calibrate_all_experts"]
        is everywhere
    )
    assert_read_alike(result.path)


def copies(directory):
    """A dense mistral, and a mixtral whose every expert is a copy of the dense MLP."""
    same = dict(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        sliding_window=None,
        rms_norm_eps=1e-6,
    )
    dense, mixture = tiny("mistral", **same), tiny("mixtral", **same)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                mlp = dense.get_submodule(name.removesuffix(".experts.gate_up_proj"))
                parameter.copy_(
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(parameter)
                )
            elif name.endswith("experts.down_proj"):
                parameter.copy_(
                    dense.get_submodule(
                        name.removesuffix(".experts.down_proj")
                    ).down_proj.weight.expand_as(parameter)
                )
            elif not name.endswith("mlp.gate.weight"):
                parameter.copy_(dense.get_parameter(name))
    for name, model in (("dense", dense), ("mixture", mixture)):
        model.save_pretrained(directory / name)
        add_tokenizer(directory / name)
    return directory / "mixture", directory / "dense"


@pytest.mark.parametrize("spec", ["int4-g16", "int3-channel", "int4-g32-asym"])
def test_a_mixture_of_copies_has_the_perplexity_of_the_dense_model_before_and_after(spec, tmp_path):
    pair = copies(tmp_path)
    data = random_tokens(pair[0])
    before = evaluate(*map(open_checkpoint, pair), data)
    rounded = [
        quantize(
            open_checkpoint(path), rtn(parse_spec(spec)), None, tmp_path / f"{path.name}-{spec}"
        ).path
        for path in pair
    ]
    after = evaluate(*map(open_checkpoint, rounded), data)
    for reading in (before, after):
        assert reading.perplexity == pytest.approx(reading.reference_perplexity, rel=1e-5)
        assert abs(reading.kl) < 1e-6
    assert abs(after.perplexity / before.perplexity - 1) > 1e-4  # rounding did something


@pytest.mark.parametrize("spec", ["nvfp4", "mxfp4", "fp8-channel", "fp8-b32x32"])
def test_experts_of_narrow_floats_read_back_as_they_were_solved(spec, saved, tmp_path):
    result = quantize(
        open_checkpoint(saved("mixtral")), rtn(parse_spec(spec)), None, tmp_path / "out"
    )
    name = "model.layers.1.mlp.experts.gate_up_proj"
    W_eok = torch.stack(
        [
            torch.cat(
                [
                    tensors(saved("mixtral"))[
                        f"model.layers.1.block_sparse_moe.experts.{e}.{w}.weight"
                    ]
                    for w in ("w1", "w3")
                ]
            )
            for e in range(4)
        ]
    )
    q = fused_leaf(result.path, name)
    assert relative(dense(q, torch.float32), W_eok) == pytest.approx(
        result.sites[name]["weight_error"], rel=1e-4
    )
    assert (q.outer is not None) == (spec == "nvfp4")


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_commands_calibrate_all_experts_and_name_those_with_few_tokens(
    tmp_path, saved, text, command
):
    def run(*more):
        return command(
            main,
            "quantize",
            saved("mixtral"),
            "--out",
            tmp_path / f"out{len(more)}",
            "--method",
            "gptq",
            "--spec",
            "int4-g16",
            "--calib",
            text,
            "--samples",
            4,
            "--length",
            24,
            *more,
        )

    code, out, err = run()
    assert (
        code == 0
        and "mlp.experts.gate_up_proj: experts" in out
        and "saw fewer tokens than input channels" in out
    ), err
    code, out, err = run("--calibrate-all-experts")
    assert code == 0 and "gate_up_proj: experts" not in out, err
    assert command(main, "inspect", tmp_path / "out0")[0] == 0
