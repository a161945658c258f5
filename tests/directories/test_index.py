"""Indexes that list what no file holds: nobody misses what the model does not need, and every door
says what it does."""

import json
import shutil

import pytest
import torch
from model_folders import bits_equal, tensors
from safetensors.torch import save_file

import qlab
from qlab.errors import QlabError
from qlab.files.directory import INDEX, SINGLE

INT8 = qlab.rtn(qlab.parse_spec("int8-g32"))
NAME = "model.layers.1.mlp.up_proj.weight"


def indexed(source, folder, listed, without=()):
    """A copy of a directory in two files, with an index that lists every tensor and more."""
    shutil.copytree(source, folder)
    state, present = tensors(source), sorted(tensors(source).keys() - set(without))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    files = {"1.safetensors": present[::2], "2.safetensors": present[1::2]}
    for file, names in files.items():
        save_file({name: state[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(
        json.dumps({"weight_map": weight_map | dict.fromkeys(listed, "1.safetensors")})
    )
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_what_no_model_needs_is_not_missed(tied, saved, tmp_path):
    source = saved("llama", tie_word_embeddings=tied)
    unneeded = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        *(["lm_head.weight"] if tied else []),
    ]
    folder = indexed(source, tmp_path / "model", unneeded)
    out = qlab.quantize(qlab.open(folder), INT8, None, tmp_path / "out").path
    free = qlab.quantize_files(folder, INT8, tmp_path / "free").path
    again = qlab.convert(
        indexed(out, tmp_path / "listed", unneeded),
        "gptq",
        tmp_path / "gptq",
        requantize=qlab.parse_spec("int8-g32"),
    )
    assert qlab.verify(out, folder).faults == [] and not set(unneeded) & tensors(again.path).keys()
    assert all(bits_equal(tensors(free)[name], t) for name, t in tensors(out).items())


@pytest.mark.parametrize(
    "act",
    [
        lambda path, out: qlab.quantize(qlab.open(path), INT8, None, out),
        lambda path, out: qlab.quantize_files(path, INT8, out),
    ],
    ids=["quantize", "model-free"],
)
def test_what_the_model_needs_is_named_before_anything_is_written(act, saved, tmp_path):
    folder = indexed(saved(), tmp_path / "model", [NAME], without=[NAME])
    with pytest.raises(
        QlabError, match=rf"has no tensor {NAME}, which the architecture llama needs"
    ):
        act(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_codes_that_are_listed_and_not_there_are_named(saved, tmp_path):
    quantized = qlab.quantize(qlab.open(saved()), INT8, None, tmp_path / "made").path
    gone = [name for name in tensors(quantized) if name.startswith(NAME.removesuffix("weight"))]
    folder = indexed(quantized, tmp_path / "model", gone, without=gone)
    for act in (
        qlab.lower,
        lambda path: qlab.convert(path, "gptq", tmp_path / "out"),
        lambda path: qlab.verify(path, saved()),
    ):
        with pytest.raises(QlabError, match=rf"has no tensor {NAME}"):
            act(folder)
    assert not list(tmp_path.glob("out*"))


def test_of_an_architecture_that_nobody_knows_all_that_is_listed_is_needed(tmp_path):
    save_file({"a.weight": torch.ones(64, 64)}, tmp_path / SINGLE.replace("model", "x"))
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a.weight": "x.safetensors", "b.weight": "x.safetensors"}})
    )
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        QlabError, match=r"index\.json lists b\.weight in x\.safetensors, which does not hold it"
    ):
        qlab.quantize_files(tmp_path, INT8, tmp_path / "out")
    assert not (tmp_path / "out").exists()
