"""A GGUF file converted: the file's codes, the logits of transformers' own reading of it, and
errors that leave nothing."""

import json
from types import SimpleNamespace

import gguf
import pytest
import torch
from families import tiny
from gguf_files import KINDS, TEMPLATE, write
from model_folders import contents, tensors, unpacked
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlab
from qlab.__main__ import main
from qlab.algebra.qtensor import QTensor
from qlab.codecs import gguf as file_format
from qlab.directories.convert import convert
from qlab.driver.batches import push
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint
from qlab.model.loading import load_block, load_outside
from qlab.model.running import head, record_blocks
from qlab.model.skeleton import Skeleton

CODES = {
    "attn_q": KINDS.Q4_0,
    "attn_k": KINDS.Q8_0,
    "ffn_up": KINDS.Q4_0,
    "ffn_down": KINDS.Q8_0,
    "ffn_gate": KINDS.F16,
    "attn_v": KINDS.F16,
    "token_embd": KINDS.F16,
}
IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def qlab_logits(path):
    skeleton = Skeleton(qlab.open(path), torch.float32)
    load_outside(skeleton, with_head=True)
    hidden, calls = record_blocks(skeleton, IDS)
    state = (hidden,)
    for block, call in calls.items():
        (state,) = push(load_block(skeleton, block, call), iter([(call, state)]))
    return head(skeleton, IDS, *state)


@torch.no_grad()
def transformers_logits(path, **how):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how).eval()(IDS).logits


def of_the_file(file):
    return transformers_logits(file.parent, gguf_file=file.name, **unpacked())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    file = write(folder / "model.gguf", CODES)
    return SimpleNamespace(
        file=file, result=convert(file, "compressed-tensors", folder / "out"), out=folder / "out"
    )


def test_logits_are_those_of_the_file(converted):
    theirs = of_the_file(converted.file)
    assert (qlab_logits(converted.out) - theirs).norm() <= 1e-5 * theirs.norm()
    assert (transformers_logits(converted.out) - theirs).norm() <= 1e-3 * theirs.norm()


@pytest.mark.parametrize("arch, config", [("qwen2", {}), ("qwen3", {"head_dim": 128})])
def test_models_with_biases_and_norms_of_heads_have_the_logits_of_their_file(
    arch, config, tmp_path
):
    file = write(tmp_path / "model.gguf", CODES, arch, **config)
    out, theirs = convert(file, "compressed-tensors", tmp_path / "out").path, of_the_file(file)
    assert (qlab_logits(out) - theirs).norm() <= 1e-5 * theirs.norm() and len(
        open_checkpoint(out).quantized
    ) == 8


def test_a_size_of_heads_is_read_and_two_sizes_are_refused_by_name(tmp_path):
    file = write(tmp_path / "model.gguf", {}, "qwen3", head_dim=32)
    out = convert(file, "compressed-tensors", tmp_path / "out").path
    model = tiny("qwen3", num_key_value_heads=2, num_attention_heads=4, head_dim=32)
    assert torch.equal(transformers_logits(out), model(IDS).logits)
    other = write(tmp_path / "other.gguf", {}, "qwen3", lambda w: w.add_key_length(16), head_dim=32)
    with pytest.raises(
        QlabError,
        match=r"value_length of .*other\.gguf is 32, stated or understood, .* has head_dim 16",
    ):
        convert(other, "compressed-tensors", tmp_path / "none")
    assert not list(tmp_path.glob("none*"))


def test_keys_that_no_config_made_of_the_file_holds_are_refused_before_anything_is_written(
    tmp_path,
):
    for n, (keys, words) in enumerate(
        {
            lambda w: w.add_float32(
                "llama.attention.scale", 0.25
            ): r"says llama\.attention\.scale 0\.25, which no config made of",
            lambda w: w.add_bool(
                "llama.new", True
            ): r"says llama\.new True, a key that qlab does not know",
            lambda w: w.add_uint32(
                "llama.attention.sliding_window", 8
            ): r"sliding_window of .* is 8, stated or understood, and the config",
            lambda w: w.add_rope_scaling_type(
                gguf.RopeScalingType.LONGROPE
            ): r"says llama\.rope\.scaling\.type 'longrope'",
            lambda w: w.add_block_count(2**31): "it has 2147483648 blocks and holds 21 tensors",
        }.items()
    ):
        file = write(tmp_path / f"{n}.gguf", {}, keys=keys)
        with pytest.raises(QlabError, match=words):
            convert(file, "compressed-tensors", tmp_path / "out")
        assert not list(tmp_path.glob("out*"))


ROTARY = {
    "linear": lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        w.add_rope_scaling_factor(2.5),
    ),
    "linear, older key": lambda w: w.add_float32("qwen2.rope.scale_linear", 2.5),
    "yarn": lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        w.add_rope_scaling_factor(4.0),
        w.add_rope_scaling_orig_ctx_len(32),
    ),
    "default": lambda w: (
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        w.add_rope_scaling_factor(4.0),
    ),
}


@pytest.mark.parametrize("scaled", ROTARY)
def test_rotary_positions_are_scaled_as_the_file_says(scaled, tmp_path):
    rope = {"rope_type": scaled.partition(",")[0], "rope_theta": 10000.0}
    rope |= {
        "linear": {"factor": 2.5},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    }.get(rope["rope_type"], {})
    file = write(tmp_path / "model.gguf", {}, "qwen2", keys=ROTARY[scaled])
    out = convert(file, "compressed-tensors", tmp_path / "out").path
    model = tiny("qwen2", num_key_value_heads=2, num_attention_heads=4, rope_parameters=rope)
    assert torch.equal(transformers_logits(out), model(IDS).logits)


def test_k_quants_are_dequantized_beside_codes_and_reported(tmp_path):
    kinds = {
        "attn_q": KINDS.Q2_K,
        "attn_k": KINDS.Q3_K,
        "attn_v": KINDS.Q6_K,
        "attn_output": KINDS.Q4_0,
        "ffn_up": KINDS.Q4_K,
        "ffn_gate": KINDS.Q5_K,
        "ffn_down": KINDS.Q8_0,
    }
    file = write(
        tmp_path / "model.gguf",
        kinds,
        "qwen3",
        hidden_size=256,
        intermediate_size=256,
        head_dim=128,
    )
    result = convert(file, "compressed-tensors", tmp_path / "out")
    theirs, model = of_the_file(file), open_checkpoint(result.path)
    # bfloat16 rounds to 1/512.
    assert (qlab_logits(result.path) - theirs).norm() <= 0.01 * theirs.norm()
    assert {name.rpartition(".")[2] for name in model.quantized} == {"o_proj", "down_proj"}
    record = json.loads((result.path / "qlab.json").read_text())["dequantized"]
    reported = {name.split(".")[-2]: row["kind"] for name, row in record.items()}
    assert reported == {
        "q_proj": "Q2_K",
        "k_proj": "Q3_K",
        "v_proj": "Q6_K",
        "up_proj": "Q4_K",
        "gate_proj": "Q5_K",
    }


def test_codes_are_those_of_the_file(converted):
    model = open_checkpoint(converted.out)
    names = [
        name
        for name, _ in Skeleton(model, torch.float32).model.named_parameters(remove_duplicate=False)
    ]
    leaves = {
        name: leaf
        for name, _, leaf in file_format.tensors(converted.file, names)
        if isinstance(leaf, QTensor)
    }
    assert len(leaves) == 8 and leaves.keys() == {f"{module}.weight" for module in model.quantized}
    assert converted.result.sites.keys() == model.quantized.keys()
    assert {str(spec) for spec in model.quantized.values()} == {"int4-g32", "int8-g32"}
    certificates = json.loads((converted.out / "qlab.json").read_text())["certificates"]
    for name, leaf in leaves.items():
        ours = model.leaf(name)
        assert torch.equal(ours.codes, leaf.codes) and torch.equal(ours.scales, leaf.scales)
        assert certificates[name.removesuffix(".weight")]["hash"] == fingerprint(leaf)
    assert qlab.verify(converted.out, converted.out).faults == []


@pytest.mark.parametrize("arch, config", [("qwen2", {}), ("qwen3", {"head_dim": 128})])
def test_a_converted_file_verifies_against_the_model_that_it_was_made_of(arch, config, tmp_path):
    # Every other tensor is float32.
    file = write(tmp_path / "model.gguf", {"attn_q": KINDS.Q4_0}, arch, **config)
    out = convert(file, "compressed-tensors", tmp_path / "out").path
    model = tiny(arch, num_key_value_heads=2, num_attention_heads=4, **config)
    model.save_pretrained(tmp_path / "model")
    assert qlab.verify(out, tmp_path / "model").faults == []
    model.config.rms_norm_eps = 1e-5
    model.save_pretrained(tmp_path / "model")
    assert ["rms_norm_eps" in fault for fault in qlab.verify(out, tmp_path / "model").faults] == [
        True
    ]
    record = json.loads((out / "qlab.json").read_text())
    (out / "qlab.json").write_text(json.dumps({**record, "certificates": {}}))
    assert any("lost its certificates" in fault for fault in qlab.verify(out, out).faults)


def test_codes_of_two_widths_in_another_format_are_the_same(converted, tmp_path):
    there = open_checkpoint(convert(converted.file, "gptq", tmp_path / "out").path)
    here = open_checkpoint(converted.out)
    assert there.quantized.keys() == here.quantized.keys()
    assert all(
        fingerprint(there.leaf(f"{m}.weight")) == fingerprint(here.leaf(f"{m}.weight"))
        for m in here.quantized
    )


def test_floats_keep_their_dtype_and_everything_else_comes_along(converted):
    converted_tensors = tensors(converted.out)
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= contents(converted.out).keys()
    assert json.loads((converted.out / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]
    assert (
        converted_tensors["model.norm.weight"].dtype == torch.float32
        and converted_tensors["model.layers.1.mlp.gate_proj.weight"].dtype == torch.float16
    )
    tokenizer = AutoTokenizer.from_pretrained(converted.out)
    theirs = AutoTokenizer.from_pretrained(converted.file.parent, gguf_file=converted.file.name)
    assert tokenizer("wo word7 w").input_ids == theirs("wo word7 w").input_ids and len(
        tokenizer
    ) == len(theirs)
    # transformers 5.17 takes the wrong token.
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == theirs.eos_token
    assert converted.result.dequantized == {}


def test_embeddings_are_dequantized_and_the_command_says_so(tmp_path, command):
    file = write(
        tmp_path / "model.gguf",
        {**CODES, "token_embd": KINDS.Q8_0, "attn_v": KINDS.Q4_1, "output": KINDS.Q8_0},
    )
    code, printed, _ = command(
        main, "convert", file, "--codec", "compressed-tensors", "--out", tmp_path / "out"
    )
    assert (
        code == 0 and "Q8_0 blocks dequantized to bfloat16: model.embed_tokens.weight\n" in printed
    )
    values = ", ".join(f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2))
    assert (
        f"Q4_1 blocks dequantized to bfloat16: {values}\n" in printed and "lm_head" not in printed
    )
    assert tensors(tmp_path / "out")["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert "lm_head" in open_checkpoint(tmp_path / "out").quantized
    theirs = of_the_file(file)
    # bfloat16 rounds to 1/512.
    assert (qlab_logits(tmp_path / "out") - theirs).norm() <= 0.01 * theirs.norm()


def test_a_file_without_codes_is_an_unquantized_directory(tmp_path):
    file = write(tmp_path / "model.gguf", {"attn_q": KINDS.F16})
    result = convert(file, "gptq", tmp_path / "out")
    assert not result.sites and "quantization_config" not in json.loads(
        (tmp_path / "out" / "config.json").read_text()
    )
    theirs = of_the_file(file)
    assert (transformers_logits(tmp_path / "out") - theirs).norm() <= 1e-6 * theirs.norm()


def test_errors_leave_nothing(converted, tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("no model")
    for file, codec, complaint in [
        (tmp_path / "text.gguf", "gptq", "truncated or not a GGUF file"),
        (tmp_path / "missing.gguf", "gptq", "missing.gguf"),
        (
            write(tmp_path / "other.gguf", {}, "gemma2"),
            "gptq",
            "architecture 'gemma2'; qlab reads llama",
        ),
        (
            write(tmp_path / "unknown.gguf", {}, "nobody"),
            "gptq",
            "architecture 'nobody'; qlab reads llama",
        ),
        (converted.file, "awq", r"k_proj: .*int8-g32"),
        (converted.file, "zip", "codec 'zip' is unknown"),
    ]:
        with pytest.raises(QlabError, match=complaint):
            convert(file, codec, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(QlabError, match="convert it without a grid"):
        convert(converted.file, "gptq", tmp_path / "out", requantize=qlab.parse_spec("int4-g32"))
    before = contents(converted.out)
    with pytest.raises(QlabError, match="exists and holds something else"):
        convert(converted.file, "compressed-tensors", converted.out)
    assert contents(converted.out) == before


def test_an_output_around_the_file_is_refused_even_when_it_may_be_overwritten(tmp_path):
    file = write(tmp_path / "models" / "llama" / "model.gguf", CODES)
    before = contents(tmp_path)
    for out in (file, file.parent, file.parent.parent):
        with pytest.raises(
            QlabError,
            match=r"model\.gguf is the model itself"
            if out == file
            else r"holds the model .*model\.gguf",
        ):
            convert(file, "compressed-tensors", out, overwrite=True)
        assert contents(tmp_path) == before


@pytest.mark.parametrize("door", [qlab.open, qlab.lower])
def test_doors_of_directories_say_that_a_file_is_converted_first(door, converted):
    with pytest.raises(
        QlabError,
        match=r"model\.gguf is a GGUF file, which is converted first: `qlab convert .* --out DIR`",
    ):
        door(converted.file)
