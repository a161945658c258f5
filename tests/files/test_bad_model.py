"""A model directory that is damaged, incomplete or another model's is refused in one sentence that
names the file and the tensor."""

import json

import pytest
import torch
import transformers
from families import tiny
from model_folders import change, random_tokens, refused, rewrite
from transformers import AutoConfig

import qlab
from qlab.files.checkpoint import INDEX, open_checkpoint
from qlab.model.skeleton import Skeleton

INT4 = qlab.parse_spec("int4-g16")


def test_a_missing_and_an_empty_model_directory(tmp_path):
    refused(lambda: qlab.open(tmp_path / "none"), "none", "not a model directory")
    (tmp_path / "empty").mkdir()
    refused(lambda: qlab.open(tmp_path / "empty"), "no config.json")


def test_a_directory_without_safetensors(folder):
    (folder / "model.safetensors").unlink()
    refused(lambda: qlab.open(folder), "no safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard(folder, keep):
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:keep])
    refused(lambda: qlab.open(folder), "model.safetensors", "truncated")


def test_a_file_that_is_not_safetensors(folder):
    (folder / "model.safetensors").write_text("hello, this is not what it says it is")
    refused(lambda: qlab.open(folder), "model.safetensors", "not a safetensors file")


def test_an_index_that_lists_a_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00009.safetensors"}})
    )
    refused(lambda: qlab.open(folder), "model-00009.safetensors", "missing")


def test_a_config_that_is_broken_or_unknown(folder):
    (folder / "config.json").write_text("{")
    refused(lambda: qlab.open(folder), "config.json", "not valid JSON")
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    refused(lambda: qlab.open(folder), "no_such_model", "this version of transformers")


def test_a_foreign_quantization(folder):
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "mystery"}
    }
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: qlab.open(folder), "mystery")


def test_a_missing_tensor(folder, tmp_path):
    change(folder, model__layers__1__mlp__up_proj__weight=None)
    model = open_checkpoint(folder)
    refused(
        lambda: qlab.quantize(model, qlab.rtn(INT4), None, tmp_path / "q"),
        "model.layers.1.mlp.up_proj.weight",
    )
    # Refused by the headers, before anything is written.
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "edit", [{"num_hidden_layers": 10**9}, {"text_config": {"num_hidden_layers": 10**9}}]
)
def test_more_layers_than_tensors_are_never_built(edit, folder, monkeypatch):
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | edit)
    )
    monkeypatch.setattr(transformers, "AutoConfig", None)  # some configs hold a list of all layers
    refused(
        lambda: qlab.plan(open_checkpoint(folder), qlab.rtn(INT4)),
        "num_hidden_layers 1000000000",
        "tensors",
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("edit", [lambda t: t[1:], lambda t: t.to(torch.int8)])
def test_files_of_another_model_than_the_config_describes(name, edit, folder):
    change(folder, **{name.replace(".", "__"): edit})
    model = open_checkpoint(folder)
    refused(
        lambda: qlab.plan(model, qlab.rtn(INT4)),
        f"{name} is torch.",
        "config.json describes a model with floats",
        "another model",
    )


@pytest.mark.parametrize("keep", [1, 7, 8, 9, 3000, 0.5, 0.999])
def test_a_shard_cut_in_its_length_header_or_data(folder, keep):
    shard = folder / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(len(whole) * keep) if isinstance(keep, float) else keep])
    refused(lambda: qlab.open(folder), "model.safetensors is truncated")


@pytest.mark.parametrize(
    "text, words",
    [("{}", "has no weight_map"), ("[]", "holds no JSON object"), ("{", "is not valid JSON")],
)
def test_an_index_that_lists_nothing(folder, text, words):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(text)
    refused(lambda: qlab.open(folder), INDEX, words)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b'{"model_type": "llama", }'])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text)
    refused(lambda: qlab.open(folder), "config.json", "JSON")


@pytest.mark.parametrize("changes", [{"model_type": 7}, {"hidden_size": "wide"}])
def test_a_config_with_values_that_transformers_rejects(folder, changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        lambda: qlab.open(folder),
        "config.json",
        "transformers cannot read",
        repr(config["model_type"]),
    )


def test_a_config_that_contradicts_itself_is_told_how(folder):
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 66}
    (folder / "config.json").write_text(json.dumps(config))
    refused(
        lambda: qlab.open(folder),
        "config.json",
        "hidden size (66) is not a multiple of the number of attention heads (4)",
    )


def test_a_model_that_is_no_causal_language_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    AutoConfig.for_model("vit", **vision).save_pretrained(tmp_path)
    refused(
        lambda: Skeleton(open_checkpoint(tmp_path), torch.float32),
        "cannot build a causal language model",
    )


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "model.norm.weight"],
)
def test_a_missing_tensor_that_is_no_site(folder, tmp_path, name):
    change(folder, **{name.replace(".", "__"): None})
    refused(
        lambda: qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, tmp_path / "q"),
        f"has no tensor {name}",
    )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "edit, stored",
    [
        (lambda t: t[:-1].clone(), "(127, 64)"),
        (lambda t: t.T.contiguous(), "(64, 128)"),
        (lambda t: t.to(torch.int8), "torch.int8 (128, 64)"),
    ],
)
def test_a_tensor_that_the_config_does_not_describe(folder, tmp_path, edit, stored):
    change(folder, model__layers__1__mlp__up_proj__weight=edit)
    model = open_checkpoint(folder)
    words = ("model.safetensors: model.layers.1.mlp.up_proj.weight is", stored, "floats (128, 64)")
    refused(lambda: qlab.quantize(model, qlab.rtn(INT4), None, tmp_path / "q"), *words)
    refused(lambda: qlab.evaluate(model, model, random_tokens(folder)), *words)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_config_that_names_another_file_in_its_place(folder):
    rewrite(folder / "config.json", lambda c: c.update(configuration_files=["../config.1.json"]))
    refused(lambda: qlab.open(folder), "config.json has configuration_files", "remove that key")


def test_what_another_library_says_at_length_is_cut(folder):
    rewrite(folder / "config.json", lambda config: config.update(eos_token_id={"x" * 2000: 1}))
    refused(lambda: open_checkpoint(folder).config, "config.json", "...")


@pytest.mark.parametrize("numbers", [{"head_dim": 2**30}, {"head_dim": 2**31}])
def test_constants_larger_than_the_files_are_never_computed(numbers, folder):
    rewrite(folder / "config.json", lambda config: config.update(numbers))
    refused(
        lambda: Skeleton(open_checkpoint(folder), torch.float32),
        "config.json describes",
        "inv_freq",
    )


def test_more_parameters_than_the_files_hold_are_never_made(tmp_path):
    tiny("qwen2_vl").save_pretrained(tmp_path)
    rewrite(tmp_path / "config.json", lambda c: c["vision_config"].update(depth=10**9))
    refused(
        lambda: Skeleton(open_checkpoint(tmp_path), torch.float32), "more than", "its files hold"
    )
