"""Without a model definition the same weights get the same codes, chosen by name, for architectures
that nobody knows too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import KILLED, dying, finish, start
from model_folders import bits_equal, contents, tensors

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.algebra.transform import Stage, keep, rules
from qlab.algebra.views import EachWeight
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint
from qlab.files.record import recorded
from qlab.files.tensors import write
from qlab.methods.gptq import gptq
from qlab.methods.grid import encode, minmax
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g32")
NAMES = [
    "embed_tokens",
    "layers.0.attn.q_proj",
    "layers.0.mlp.gate_proj",
    "layers.0.mlp.gate",
    "layers.0.mlp.experts.3.up_proj",
    "layers.0.mlp.shared_expert_gate",
    "layers.0.router.proj",
    "layers.1.attn.q_proj",
    "lm_head",
]
LINEAR = {
    "layers.0.attn.q_proj",
    "layers.0.mlp.gate_proj",
    "layers.0.mlp.experts.3.up_proj",
    "layers.1.attn.q_proj",
}


@pytest.fixture
def unknown(tmp_path) -> Path:
    """Two files of an architecture that no library has."""
    folder = tmp_path / "unknown"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "nobody_knows", "hidden": [1, {"deep": None}]})
    )
    (folder / "tokenizer.json").write_text("{}")
    torch.manual_seed(0)
    state = {f"{name}.weight": torch.randn(16, 64, dtype=torch.bfloat16) for name in NAMES}
    state |= {"layers.0.attn.q_proj.bias": torch.randn(16), "layers.0.norm.weight": torch.ones(64)}
    state["layers.0.conv.weight"] = torch.ones(2, 2, 3)
    items = list(state.items())
    write(folder / "a.safetensors", items[:5])
    write(folder / "b.safetensors", items[5:])
    return folder


def test_codes_of_a_raw_stage_are_certified_by_the_weights_of_the_files(unknown, tmp_path):
    """Which notes no errors, whatever else it notes."""

    def run(graph, stats):
        spec = with_scale_dtype(INT4, graph.dtype)
        codes = {s.weight: encode(minmax, graph.weight_ok(s), spec) for s in graph.sites}
        notes = {s.path: {"weight_error": 0.0} for s in graph.sites}
        return replace(graph.update(codes), notes=notes), stats

    raw = (Stage("raw", frozenset(), run, EachWeight(), spec=INT4),)
    certificates = [
        recorded(quantize_files(unknown, recipe, tmp_path / name).path)["certificates"]
        for name, recipe in (("raw", raw), ("rtn", rtn(INT4)))
    ]
    assert certificates[0] == certificates[1] and certificates[0].keys() == LINEAR


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe"])
def test_the_codes_and_the_config_of_the_ordinary_path(family, saved, tmp_path):
    source = saved(family, torch.bfloat16, shard_size="60KB")
    ordinary = open_checkpoint(
        quantize(open_checkpoint(source), rtn(INT4), None, tmp_path / "ordinary").path
    )
    free = open_checkpoint(quantize_files(source, rtn(INT4), tmp_path / "free").path)
    assert free.quantized == ordinary.quantized and free.raw == ordinary.raw
    for module in free.quantized:
        assert fingerprint(free.leaf(f"{module}.weight")) == fingerprint(
            ordinary.leaf(f"{module}.weight")
        )
    assert verify(free, source).faults == []


def test_linear_weights_are_chosen_by_name(unknown, tmp_path):
    result = quantize_files(unknown, rtn(INT4), tmp_path / "out")
    assert result.sites.keys() == open_checkpoint(result.path).quantized.keys() == LINEAR
    old, new = tensors(unknown), tensors(result.path)
    plain = [name for name in old if name.removesuffix(".weight") not in LINEAR]
    assert len(plain) == 8 and all(bits_equal(old[name], new[name]) for name in plain)
    config = json.loads((result.path / "config.json").read_text())
    assert (
        config["hidden"] == [1, {"deep": None}]
        and "lm_head" in config["quantization_config"]["ignore"]
    )
    assert (result.path / "tokenizer.json").read_text() == "{}"
    assert verify(result.path, unknown).faults == []


def test_a_model_type_that_is_no_name_is_an_unknown_one(unknown, tmp_path):
    (unknown / "config.json").write_text('{"model_type": ["llama"]}')
    assert quantize_files(unknown, rtn(INT4), tmp_path / "out").sites.keys() == LINEAR


def test_codes_without_a_config_are_no_weights(unknown, tmp_path):
    write(
        unknown / "a.safetensors",
        [("layers.0.attn.q_proj.weight", torch.ones(16, 64, dtype=torch.int8))],
    )
    with pytest.raises(
        QlabError, match=r"layers.0.attn.q_proj.weight of .* is stored as I8, which are no weights"
    ):
        quantize_files(unknown, rtn(INT4), tmp_path / "out")


def test_patterns_choose_and_rules_decide(unknown, tmp_path):
    first = quantize_files(
        unknown,
        rtn(INT4),
        tmp_path / "a",
        include=["layers.0.*"],
        exclude=["*.experts.*", "*gate", "*router*"],
    )
    assert set(first.sites) == {"layers.0.attn.q_proj", "layers.0.mlp.gate_proj"}
    recipe = rules(
        {"*q_proj": rtn(parse_spec("int8-channel")), "*.experts.*": keep(), "*": rtn(INT4)}
    )
    second = quantize_files(unknown, recipe, tmp_path / "b")
    specs = {name: row["spec"] for name, row in second.sites.items()}
    assert specs == {f"layers.{i}.attn.q_proj": "int8-channel" for i in (0, 1)} | {
        "layers.0.mlp.gate_proj": "int4-g32"
    }


@pytest.mark.parametrize("spec", ["fp8-channel", "mxfp4", "nvfp4", "fp8-b128x128"])
def test_floats(spec, unknown, tmp_path):
    out = quantize_files(unknown, rtn(parse_spec(spec)), tmp_path / "out").path
    assert open_checkpoint(out).quantized.keys() == LINEAR and verify(out, unknown).faults == []


def test_8_bit_floats_are_dequantized_first(unknown, tmp_path):
    eight = open_checkpoint(
        quantize_files(unknown, rtn(parse_spec("fp8-channel")), tmp_path / "fp8").path
    )
    four = open_checkpoint(
        quantize_files(eight, rtn(INT4), tmp_path / "int4", include=["*q_proj"]).path
    )
    name = "layers.0.attn.q_proj.weight"
    W = dense(eight.leaf(name), torch.bfloat16).float()
    assert (
        isinstance(four.leaf(name), QTensor)
        and (dense(four.leaf(name)).float() - W).norm() < 0.2 * W.norm()
    )
    kept = four.leaf("layers.0.mlp.gate_proj.weight")
    assert torch.equal(kept, dense(eight.leaf("layers.0.mlp.gate_proj.weight"), torch.bfloat16))
    with pytest.raises(QlabError, match="is quantized to int4-g32 already"):
        quantize_files(four, rtn(INT4), tmp_path / "again")


def test_what_cannot_be_done_is_refused_and_nothing_is_written(unknown, saved, tmp_path):
    out = tmp_path / "out"
    for words, act in {
        "observes second_moment, for which the model has to run": lambda: quantize_files(
            unknown, gptq(INT4), out
        ),
        "the pattern '\\*experts.9\\*' matches no weight": lambda: quantize_files(
            unknown, rtn(INT4), out, include=["*experts.9*"]
        ),
        "mlp.gate.* belongs to no nn.Linear": lambda: quantize_files(
            saved("qwen3_moe"), rtn(INT4), out, exclude=["lm_head"]
        ),
        "q_proj.*groups of 48 do not divide the 64": lambda: quantize_files(
            unknown, rtn(parse_spec("int4-g48")), out
        ),
        "no rule covers layers.0.mlp": lambda: quantize_files(
            unknown, rules({"*q_proj": rtn(INT4)}), out
        ),
        "choose no weight": lambda: quantize_files(unknown, rtn(INT4), out, include=["*lm_head"]),
        "the codec 'nothing' is unknown": lambda: quantize_files(
            unknown, rtn(INT4), out, codec="nothing"
        ),
        r"q_proj, .*: GPTQ version 1 stores z - 1 and .*; write gptq_v2 \(--codec\)$": lambda: (
            quantize_files(unknown, rtn(parse_spec("int4-g32-asym")), out, codec="gptq")
        ),
        "vllm loads no int4-g16": lambda: quantize_files(
            unknown, rtn(parse_spec("int4-g16")), out, target="vllm"
        ),
        "vllm loads no int4-g32-asym expert": lambda: quantize_files(
            unknown, rtn(parse_spec("int4-g32-asym")), out, target="vllm"
        ),
        "is the model itself": lambda: quantize_files(unknown, rtn(INT4), unknown, overwrite=True),
    }.items():
        with pytest.raises(QlabError, match=words):
            act()
    assert [path.name for path in tmp_path.iterdir()] == ["unknown"]


def test_an_output_around_the_model_is_refused_even_when_it_may_be_overwritten(unknown, tmp_path):
    before = contents(tmp_path)
    for out in (unknown, unknown.parent):
        with pytest.raises(
            QlabError,
            match="is the model itself" if out == unknown else "holds the model .*unknown",
        ):
            quantize_files(unknown, rtn(INT4), out, overwrite=True)
        assert contents(tmp_path) == before


def test_killed_anywhere_and_resumed(unknown, tmp_path):
    run = lambda out, **options: quantize_files(unknown, rtn(INT4), out, **options)
    run(tmp_path / "whole")
    for n in range(1, 8):
        status = finish(start(dying(lambda n=n: run(tmp_path / f"{n}"), n, "after")))
        assert status == KILLED
        run(tmp_path / f"{n}", resume=True)
        assert contents(tmp_path / f"{n}") == contents(tmp_path / "whole")
        shutil.rmtree(tmp_path / f"{n}")
