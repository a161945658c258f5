"""Scales of cached keys and values beside weights, in formats whose configuration says nothing of a
cache."""

import pytest
import torch
from foreign import directory
from model_folders import tensors
from safetensors.torch import save_file

import qlab

SCALES = {
    f"model.layers.{i}.self_attn.{s}_proj.{s}_scale": torch.ones(1) for i in range(2) for s in "kv"
}


@pytest.mark.parametrize(
    "name, codecs",
    [
        ("fp8, rounded inputs", ["compressed-tensors"]),
        ("groups of 16", ["gptq", "compressed-tensors"]),
    ],
)
def test_scales_of_a_cache_are_no_part_of_a_weight_and_are_carried_on(name, codecs, tmp_path):
    folder = directory(name, tmp_path / "model", torch.float16)
    save_file(tensors(folder) | SCALES, folder / "model.safetensors")
    assert qlab.inspect(folder).extras == {
        "k_scale": "scales for a cache of keys and values lie beside the weights; 4 tensors"
    }
    for codec in codecs:
        out = qlab.convert(folder, codec, tmp_path / codec).path
        assert SCALES.keys() <= tensors(out).keys() and qlab.verify(out, folder).faults == []
        folder = out


def test_they_stay_where_weights_are_quantized_anew(tmp_path):
    folder = directory("fp8, rounded inputs", tmp_path / "model")
    save_file(tensors(folder) | SCALES, folder / "model.safetensors")
    recipe = qlab.rtn(qlab.parse_spec("int8-g32"))
    out = qlab.quantize(qlab.open(folder), recipe, None, tmp_path / "out")
    free = qlab.quantize_files(folder, recipe, tmp_path / "free")
    for path in (out.path, free.path):
        assert SCALES.keys() <= tensors(path).keys() and qlab.verify(path, folder).faults == []
