"""Mixtures of experts in checkpoints of every kind: fused or apart, transposed, in narrow floats,
of several specs."""

import json

import pytest
import torch
from families import MIXTURES, tiny
from logits import IDS, assert_read_alike, qlab_logits, transformers_logits
from model_folders import add_tokenizer, bits_equal, random_tokens, tensors
from safetensors.torch import save_file
from test_moe import INT4, every_mixture

from qlab.algebra.grid import encode as on_grid
from qlab.algebra.grid import minmax
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import keep, rules
from qlab.codecs import CODECS
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.loading import load_leaf
from qlab.model.skeleton import Skeleton


def fused(directory, family):
    """The same model with its experts as fused tensors in the file."""
    directory.mkdir()
    model = tiny(family)
    model.config.save_pretrained(directory)
    whole = {name: t.contiguous() for name, t in model.state_dict().items()}
    save_file(whole, directory / "model.safetensors", metadata={"format": "pt"})
    add_tokenizer(directory)
    return directory


@every_mixture
def test_fused_tensors_in_the_files_give_the_bits_that_experts_in_the_files_give(
    family, saved, tmp_path
):
    together, apart = fused(tmp_path / "fused", family), saved(family)
    assert any(name.endswith("experts.gate_up_proj") for name in tensors(together))
    assert torch.equal(qlab_logits(together), qlab_logits(apart))
    ours, theirs = (
        tensors(
            quantize(
                open_checkpoint(path), gptq(INT4), random_tokens(path), tmp_path / "out" / path.name
            ).path
        )
        for path in (together, apart)
    )
    experts = {name for name in theirs if ".experts." in name}
    assert experts and experts == {name for name in ours if ".experts." in name}
    assert all(bits_equal(ours[name], theirs[name]) for name in experts)
    verdict = verify(tmp_path / "out" / together.name, together)
    assert not verdict.faults and all(
        row["weight_error"] is not None for row in verdict.sites.values()
    )


GPT_OSS = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
    pad_token_id=0,
    sliding_window=8,
    layer_types=["sliding_attention", "full_attention"],
    attn_implementation="eager",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)


def test_experts_stored_transposed_are_read_and_refused_where_no_names_are_known(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(MIXTURES, "gpt_oss", GPT_OSS)
    model = tiny("gpt_oss")
    model.save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    checkpoint = open_checkpoint(tmp_path / "model")
    assert torch.allclose(qlab_logits(checkpoint.path), model(IDS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        QlabError,
        match=r"layers\.0\.mlp\.experts\.gate_up_proj.*transformers knows no names for them",
    ):
        plan(checkpoint, rtn(INT4))
    with pytest.raises(
        QlabError, match=r"experts\.down_proj of .* holds 4 experts in one tensor.*--exclude it"
    ):
        quantize_files(checkpoint, rtn(INT4), tmp_path / "free")
    left = quantize_files(
        checkpoint,
        rtn(INT4),
        tmp_path / "free",
        exclude=("*embed*", "*lm_head", "*.experts.*", "*router"),
    )
    assert not verify(left.path, checkpoint).faults
    result = quantize(
        checkpoint,
        rules({"*.experts.*": keep(), "*": gptq(INT4)}),
        random_tokens(checkpoint.path),
        tmp_path / "out",
    )
    assert_read_alike(result.path)


def test_float_checkpoints_are_decoded_and_quantized_on(saved, tmp_path):
    source = saved("deepseek_v3")
    fp8 = quantize(
        open_checkpoint(source), rtn(parse_spec("fp8-b16x16")), None, tmp_path / "fp8"
    ).path
    result = quantize(open_checkpoint(fp8), gptq(INT4), random_tokens(source), tmp_path / "int4")
    assert {str(spec.bits) for spec in open_checkpoint(result.path).quantized.values()} == {"4"}
    assert not [
        name
        for name in tensors(result.path)
        if name.endswith("weight_scale")
        and name.replace("_scale", "_packed") not in tensors(result.path)
    ]
    assert_read_alike(result.path)
    left = tensors(result.path)["model.layers.1.mlp.gate.weight"]
    assert bits_equal(left, tensors(source)["model.layers.1.mlp.gate.weight"])


def test_a_checkpoint_of_fp8_blocks_gives_what_its_dense_weights_give(saved, tmp_path):
    whole = tensors(saved("deepseek_v3"))
    linears = {
        n
        for n in whole
        if "layers." in n and whole[n].ndim == 2 and not n.endswith("mlp.gate.weight")
    }
    codes = {name: on_grid(minmax, whole[name], parse_spec("fp8-b16x16")) for name in linears}
    config = json.loads((saved("deepseek_v3") / "config.json").read_text())
    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [16, 16],
    }
    rest = {name: t for name, t in whole.items() if name not in linears}
    stored = {
        "fp8": {
            f"{name}{part}": t
            for name, q in codes.items()
            for part, t in (("", q.codes), ("_scale_inv", q.scales))
        },
        "dense": {name: dense(q, torch.float32) for name, q in codes.items()},
    }
    written = {}
    for kind, experts in stored.items():
        (tmp_path / kind).mkdir()
        save_file(rest | experts, tmp_path / kind / "model.safetensors", metadata={"format": "pt"})
        named = config | ({"quantization_config": quantization} if kind == "fp8" else {})
        (tmp_path / kind / "config.json").write_text(json.dumps(named))
        model = open_checkpoint(tmp_path / kind)
        written[kind] = tensors(
            quantize(model, gptq(INT4), random_tokens(model.path), tmp_path / f"{kind}-int4").path
        )
    assert written["fp8"].keys() == written["dense"].keys()
    assert all(bits_equal(t, written["dense"][name]) for name, t in written["fp8"].items())


def test_experts_of_different_specs_are_refused_by_name(saved, tmp_path):
    result = quantize(open_checkpoint(saved("mixtral")), rtn(INT4), None, tmp_path / "out")
    config = json.loads((result.path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    odd = "model.layers.0.block_sparse_moe.experts.2.w1"
    groups["odd"] = json.loads(json.dumps(groups["group_0"])) | {"targets": [odd]}
    groups["odd"]["weights"] |= {"num_bits": 8}
    (result.path / "config.json").write_text(json.dumps(config))
    whole = {name: t for name, t in tensors(result.path).items() if not name.startswith(odd)}
    q = on_grid(minmax, torch.randn(128, 64), parse_spec("int8-g16"))
    assert isinstance(q, QTensor)
    for file in result.path.glob("*.safetensors*"):
        file.unlink()
    save_file(
        whole | CODECS["compressed-tensors"].encode(odd, q),
        result.path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(QlabError, match="of its fused weight are stored as int4-g16 and int8-g16"):
        qlab_logits(result.path)


def test_zero_points_of_experts_read_back_and_transformers_refuses_them_aloud(saved, tmp_path):
    result = quantize(
        open_checkpoint(saved("mixtral")), rtn(parse_spec("int4-g16-asym")), None, tmp_path / "out"
    )
    assert (qlab_logits(result.path) - qlab_logits(saved("mixtral"))).norm() < 0.5 * qlab_logits(
        result.path
    ).norm()
    with pytest.raises(RuntimeError):  # never a model with random experts
        transformers_logits(result.path, dequantize=True)


def test_an_awq_mixture_is_converted_there_and_back_and_verified(saved, tmp_path):
    source = saved("qwen3_moe", torch.float16)
    quantized = quantize(
        open_checkpoint(source),
        METHODS["awq"](parse_spec("int4-g16")),
        random_tokens(source),
        tmp_path / "made",
    ).path
    there = convert(quantized, "gptq", tmp_path / "there").path
    back = convert(there, "compressed-tensors", tmp_path / "back").path
    assert torch.equal(qlab_logits(there), qlab_logits(quantized)) and torch.equal(
        qlab_logits(back), qlab_logits(quantized)
    )
    assert not verify(quantized, source).faults


def test_model_free_rounding_gives_the_tensors_of_the_normal_path(saved, tmp_path):
    source = saved("deepseek_v3")
    theirs = tensors(quantize(open_checkpoint(source), rtn(INT4), None, tmp_path / "normal").path)
    for stored in source, fused(tmp_path / "fused", "deepseek_v3"):
        ours = tensors(
            quantize_files(
                open_checkpoint(stored), rtn(INT4), tmp_path / f"free-{stored.name}"
            ).path
        )
        assert ours.keys() == theirs.keys() and all(
            bits_equal(ours[name], theirs[name]) for name in ours
        )


@pytest.mark.parametrize("spec, size", [("fp8-tensor", None), ("fp8-b24x16", [24, 16])])
def test_experts_whose_scales_are_for_more_than_a_row_of_one_projection_are_read(
    spec, size, saved, tmp_path
):
    whole = tensors(saved("mixtral"))
    linears = {name for name in whole if "experts" in name}
    codes = {name: on_grid(minmax, whole[name], parse_spec(spec)) for name in linears}
    state = {name: t for name, t in whole.items() if name not in linears} | {
        name: q.codes for name, q in codes.items()
    }
    state |= {
        f"{name}_scale_inv": q.scales if size else q.scales.reshape(1) for name, q in codes.items()
    }
    config = json.loads((saved("mixtral") / "config.json").read_text())
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    skeleton = Skeleton(open_checkpoint(tmp_path), torch.float32)
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        pieces, leaf = skeleton.names.pieces(name), dense(load_leaf(skeleton, name), torch.float32)
        assert len(pieces) > 3
        assert all(
            torch.equal(piece.of(leaf), dense(codes[piece.name], torch.float32)) for piece in pieces
        )
