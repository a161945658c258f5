"""Opening model directories: names, dtypes and tensors as the files hold them, and what is loaded
when."""

import json

import pytest
import torch
from families import FAMILIES, tiny
from model_folders import bits_equal, change, random_tokens, rewrite, tensors
from transformers import AutoModelForCausalLM

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import parse_spec
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn
from qlab.model.loading import drop_outside, load_outside
from qlab.model.skeleton import Skeleton


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_found_in_the_files(family, saved):
    model, skeleton = tiny(family), Skeleton(open_checkpoint(saved(family)), torch.float32)
    load_outside(skeleton, with_head=True)
    outside = {
        n: p for n, p in skeleton.model.named_parameters(remove_duplicate=False) if not p.is_meta
    }
    inside = {
        f"{path}.{leaf}": skeleton.checkpoint.tensor(piece.name)
        for path in skeleton.blocks
        for leaf, (piece,) in skeleton.names.block_names(path).items()
    }
    expected = dict(model.named_parameters(remove_duplicate=False))
    assert outside.keys() | inside.keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in {**outside, **inside}.items())


def test_what_is_loaded_outside_the_blocks_can_be_dropped(saved):
    skeleton = Skeleton(open_checkpoint(saved()), torch.float32)
    load_outside(skeleton, with_head=False)
    assert [n for n, p in skeleton.model.named_parameters() if not p.is_meta] == [
        "model.embed_tokens.weight",
        "model.norm.weight",
    ]
    drop_outside(skeleton)
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_shards_are_one_model(saved):
    single, several = open_checkpoint(saved()), open_checkpoint(saved("llama", shard_size="60KB"))
    assert len(set(several.files.values())) > 2 and set(several.files) == set(single.files)
    assert all(bits_equal(several.tensor(name), single.tensor(name)) for name in single.files)


def test_a_single_file_goes_before_others_as_in_transformers(saved, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read")
    assert {file.name for file in open_checkpoint(tmp_path).files.values()} == {"model.safetensors"}


def test_the_dtype_is_that_of_most_numbers(saved, tmp_path):
    assert open_checkpoint(saved()).dtype == torch.float32
    tiny("llama").to(torch.float16).save_pretrained(tmp_path)
    change(tmp_path, model__norm__weight=torch.Tensor.float)
    model = open_checkpoint(tmp_path)
    assert model.dtype == torch.float16
    assert model.shape_and_dtype("model.norm.weight") == ((64,), torch.float32)
    assert model.leaf("model.norm.weight", torch.bfloat16).dtype == torch.bfloat16


def test_each_tensor_keeps_its_own_dtype_in_the_output(tmp_path):
    tiny("llama").to(torch.float16).save_pretrained(tmp_path / "model")
    change(
        tmp_path / "model",
        model__norm__weight=torch.Tensor.float,
        model__layers__0__input_layernorm__weight=torch.Tensor.float,
    )
    out = quantize(
        open_checkpoint(tmp_path / "model"), rtn(parse_spec("int4-g16")), None, tmp_path / "out"
    ).path
    source, written = tensors(tmp_path / "model"), tensors(out)
    kept = source.keys() & written.keys()
    assert len(kept) == 7 and all(bits_equal(source[name], written[name]) for name in kept)


def test_quantized_leaves_come_back_as_codes(saved, tmp_path):
    out = quantize(
        open_checkpoint(saved()), rtn(parse_spec("int4-g16")), None, tmp_path / "out"
    ).path
    model = open_checkpoint(out)
    leaf = model.leaf("model.layers.1.mlp.up_proj.weight")
    assert isinstance(leaf, QTensor) and leaf.shape == (128, 64) and str(leaf.spec) == "int4-g16"
    assert len(model.quantized) == 14 and isinstance(model.leaf("lm_head.weight"), torch.Tensor)
    assert not hasattr(model.config, "quantization_config")


def test_a_missing_head_is_the_embedding_only_where_the_config_ties_them(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    change(tmp_path, lm_head__weight=None)
    with pytest.raises(QlabError, match=r"no tensor lm_head.weight"):
        load_outside(Skeleton(open_checkpoint(tmp_path), torch.float32), with_head=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    skeleton = Skeleton(open_checkpoint(tmp_path), torch.float32)
    load_outside(skeleton, with_head=True)
    assert torch.equal(skeleton.model.lm_head.weight, skeleton.model.model.embed_tokens.weight)


def test_the_fingerprint_follows_the_model_and_not_its_place(saved, tmp_path):
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny("llama", seed=seed).save_pretrained(tmp_path / name)
        prints.append(open_checkpoint(tmp_path / name).fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_generation_runs_on_the_quantized_directory(saved, tmp_path):
    out = quantize(
        open_checkpoint(saved()),
        rtn(parse_spec("int8-channel")),
        random_tokens(saved()),
        tmp_path / "out",
    ).path
    prompt = torch.tensor([[5, 6, 7]])
    new = [
        AutoModelForCausalLM.from_pretrained(path).generate(
            prompt, max_new_tokens=8, do_sample=False
        )
        for path in (saved(), out)
    ]
    assert new[0].shape == new[1].shape == (1, 11)


def test_narrow_floats_without_a_word_on_their_scales_are_refused(saved, tmp_path):
    """As they are they would be another model; their scales lie beside them and only a
    quantization_config says how."""
    quantized = quantize(
        open_checkpoint(saved()), rtn(parse_spec("fp8-channel")), None, tmp_path / "made"
    ).path
    rewrite(quantized / "config.json", lambda c: c.pop("quantization_config"))
    with pytest.raises(
        QlabError,
        match=(
            r"model\.layers\.0\.mlp\.down_proj\.weight and 13 more tensors in F8_E4M3, and its "
            r"config"
        ),
    ):
        open_checkpoint(quantized)
