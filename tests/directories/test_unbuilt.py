"""Layers that only engines build, wherever they stand in the files: what of them is dense is named
as such, and their codes close no door."""

import json
import re
import shutil

import pytest
import torch
from model_folders import bits_equal, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qlab
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint

INT4, INT8 = (qlab.rtn(qlab.parse_spec(f"int{bits}-g32")) for bits in (4, 8))
PLACES = ("model.layers.2.", "predictor.blocks.0.", "nextn.")
IDS = torch.arange(3, 19)[None]


@pytest.fixture(params=PLACES)
def deeper(request, saved, tmp_path):
    """A llama of two layers whose files hold a third one at some place, with a projection and
    experts of its own."""
    folder = shutil.copytree(saved("llama", torch.bfloat16), tmp_path / "model")
    place = request.param
    state = tensors(folder)
    state |= {
        name.replace("model.layers.1.", place): t.clone()
        for name, t in state.items()
        if ".1." in name
    }
    state |= {
        f"{place}join.weight": torch.randn(64, 128).bfloat16(),
        f"{place}experts.gate_up": torch.randn(2, 64, 64).bfloat16(),
    }
    save_file(state, folder / "model.safetensors")
    return folder, place


def names_left(config):
    """The names that a reader of the format takes for unquantized modules, as patterns that match
    them from end to end."""
    if config["quant_method"] == "compressed-tensors":
        return [re.escape(name) for name in config["ignore"]]
    if config["quant_method"] == "awq":
        return [f".*{re.escape(name)}.*" for name in config["modules_to_not_convert"]]
    head = [] if config["lm_head"] else ["lm_head"]
    return head + [
        pattern.removeprefix("-:") for pattern in config["dynamic"] if pattern.startswith("-:")
    ]


def dense_and_unnamed(path):
    """Modules with a dense matrix, no embedding, that the configuration does not name as
    unquantized."""
    patterns = names_left(json.loads((path / "config.json").read_text())["quantization_config"])
    matrices = [
        name.removesuffix(".weight")
        for name, t in tensors(path).items()
        if t.ndim > 1 and t.dtype == torch.bfloat16
    ]
    dense = [m for m in matrices if not m.endswith(("_scale", "scales", "embed_tokens"))]
    return [m for m in dense if not any(re.fullmatch(pattern, m) for pattern in patterns)]


@pytest.mark.parametrize(
    "codec, other",
    [("compressed-tensors", "gptq"), ("gptq_v2", "awq"), ("awq", "compressed-tensors")],
)
def test_dense_linears_of_layers_that_are_not_built_are_named_in_every_door(
    codec, other, deeper, tmp_path
):
    folder, place = deeper
    quantized = qlab.quantize(qlab.open(folder), INT4, None, tmp_path / "made", codec=codec).path
    free = qlab.quantize_files(
        folder, INT4, tmp_path / "free", codec=codec, exclude=["*lm_head", "*embed*", f"{place}*"]
    ).path
    for path in (quantized, free, qlab.convert(quantized, other, tmp_path / "other").path):
        assert (
            any(name.startswith(place) for name in tensors(path)) and dense_and_unnamed(path) == []
        )


def test_their_codes_stay_and_close_no_door(deeper, door, tmp_path):
    folder, place = deeper
    quantized = qlab.quantize_files(
        folder, INT8, tmp_path / "made", exclude=["*lm_head", "*embed*", "*gate_up"]
    ).path
    moved = qlab.convert(quantized, "gptq", tmp_path / "moved").path
    for path in (quantized, moved):
        assert (
            f"{place}self_attn.q_proj" in open_checkpoint(path).quantized
            and dense_and_unnamed(path) == []
        )
    shorter = qlab.quantize(qlab.open(folder), INT8, None, tmp_path / "shorter").path
    ours, theirs = (qlab.lower(path)(IDS).logits for path in (quantized, shorter))
    assert torch.equal(ours, theirs)
    again = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.bfloat16).eval()
    assert torch.equal(again(IDS).logits, ours)


def test_dequantized_codes_of_such_layers_are_dense_linears_too(deeper, tmp_path):
    folder, place = deeper
    fp8, kept = qlab.rtn(qlab.parse_spec("fp8-channel")), ["*lm_head", "*embed*", "*gate_up"]
    narrow = qlab.quantize_files(folder, fp8, tmp_path / "fp8", exclude=kept)
    quantized = qlab.quantize(qlab.open(narrow.path), INT4, None, tmp_path / "made").path
    assert (
        tensors(quantized)[f"{place}join.weight"].dtype == torch.bfloat16
        and dense_and_unnamed(quantized) == []
    )
    assert bits_equal(tensors(quantized)["lm_head.weight"], tensors(folder)["lm_head.weight"])


def test_layers_under_a_name_that_transformers_changes_are_named_in_both_spellings(saved, tmp_path):
    folder = shutil.copytree(saved("llava", torch.bfloat16), tmp_path / "model")
    state = tensors(folder)
    prefix = next(
        name.partition("layers.")[0]
        for name in state
        if ".layers.1.self_attn.q_proj" in name and "vision" not in name
    )
    state |= {
        name.replace(".layers.1.", ".layers.2."): t.clone()
        for name, t in state.items()
        if name.startswith(f"{prefix}layers.1.")
    }
    state[f"{prefix}layers.2.join.weight"] = torch.ones(64, 128).bfloat16()
    save_file(state, folder / "model.safetensors")
    quantized = qlab.quantize(qlab.open(folder), INT8, None, tmp_path / "made").path
    ignored = json.loads((quantized / "config.json").read_text())["quantization_config"]["ignore"]
    assert {f"{prefix}layers.2.mlp.up_proj", "model.language_model.layers.2.mlp.up_proj"} <= set(
        ignored
    )


def test_what_a_format_cannot_leave_out_is_refused_before_work(saved, tmp_path):
    folder = shutil.copytree(saved("llama", torch.float16), tmp_path / "model")
    state = tensors(folder)
    save_file(
        state | {"layers.0.mlp.up_proj.weight": torch.ones(64, 64).half()},
        folder / "model.safetensors",
    )
    with pytest.raises(QlabError, match=r"AWQ cannot leave layers\.0\.mlp\.up_proj unquantized"):
        qlab.plan(qlab.open(folder), INT4, codec="awq")
