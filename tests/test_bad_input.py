"""What cannot work is refused in one sentence that names it, and nothing is left half-written."""

import errno
import json
import shutil

import pytest
import torch
from directories import change, contents, random_tokens

import qlab
from qlab import QlabError
from qlab.checkpoint import open_checkpoint

INT4 = qlab.parse_spec("int4-g16")


@pytest.fixture
def folder(saved, tmp_path):
    """A tiny model of the test's own, to break."""
    return shutil.copytree(saved("llama"), tmp_path / "model")


def refused(act, *words):
    with pytest.raises(QlabError) as error:
        act()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00009.safetensors"}}))
    refused(lambda: qlab.open(folder), "model-00009.safetensors", "missing")


def test_a_config_that_is_broken_or_unknown(folder):
    (folder / "config.json").write_text("{")
    refused(lambda: qlab.open(folder), "config.json", "not valid JSON")
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    refused(lambda: qlab.open(folder), "no_such_model", "this version of transformers")


def test_a_foreign_quantization(folder):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mystery"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(lambda: qlab.open(folder), "mystery")


def test_a_missing_tensor(folder, tmp_path):
    change(folder, model__layers__1__mlp__up_proj__weight=None)
    model = open_checkpoint(folder)
    refused(lambda: qlab.quantize(model, qlab.rtn(INT4), None, tmp_path / "q"), "model.layers.1.mlp.up_proj.weight")
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_a_weight_names_its_site(folder, tmp_path, value):
    change(folder, model__layers__1__mlp__up_proj__weight=lambda t: t.index_fill(1, torch.tensor([3]), value))
    model = open_checkpoint(folder)
    refused(lambda: qlab.quantize(model, qlab.rtn(INT4), None, tmp_path / "q"), "model.layers.1.mlp.up_proj", "NaN or Inf")
    assert not (tmp_path / "q").exists()


def test_inf_in_activations_names_the_sites_it_reaches(folder, tmp_path):
    change(folder, model__layers__1__post_attention_layernorm__weight=lambda t: t * 1e38)
    model, data = open_checkpoint(folder), random_tokens(folder)
    refused(lambda: qlab.quantize(model, qlab.gptq(INT4), data, tmp_path / "q"), "model.layers.1.mlp.gate_proj", "NaN or Inf")
    assert not (tmp_path / "q").exists()


def test_texts_that_cannot_calibrate(folder, tmp_path):
    model = open_checkpoint(folder)
    text, lines = tmp_path / "t.txt", tmp_path / "t.jsonl"
    refused(lambda: qlab.tokens(model, [tmp_path / "none.txt"], 1, 8), "none.txt", "cannot be read")
    text.write_text("  \n")
    refused(lambda: qlab.tokens(model, [text], 1, 8), "t.txt", "empty")
    text.write_bytes(b"word1 \xff\xfe")
    refused(lambda: qlab.tokens(model, [text], 1, 8), "t.txt", "UTF-8")
    text.write_text("word1 word2 word3")
    refused(lambda: qlab.tokens(model, [text], 1, 8), "t.txt", "3 tokens", "8")
    text.write_text("word1 word2 " * 20)
    refused(lambda: qlab.tokens(model, [text], 9, 8), "5 windows", "9")
    lines.write_text('{"text": "word1"}\n{"no": 1}\n')
    refused(lambda: qlab.tokens(model, [lines], 1, 8), "t.jsonl", "line 2")


def test_token_ids_outside_the_vocabulary(folder):
    model = open_checkpoint(folder)
    refused(lambda: qlab.from_ids(model, torch.full((2, 8), 128)), "128", "vocabulary")
    refused(lambda: qlab.from_ids(model, torch.full((2, 8), -1)), "-1", "vocabulary")


def test_a_second_moment_that_no_damping_repairs_names_its_site(folder, tmp_path, monkeypatch):
    from qlab import stats

    broken = stats.STATS["second_moment"]._replace(lift=lambda o: stats.Moment(-100 * stats.gram(o.x_nk), len(o.x_nk)))
    monkeypatch.setitem(stats.STATS, "second_moment", broken)
    model, data = open_checkpoint(folder), random_tokens(folder)
    refused(lambda: qlab.quantize(model, qlab.gptq(INT4), data, tmp_path / "q"), "model.layers.0.", "positive definite")


def test_an_existing_output_directory_stays_as_it_is(folder, tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    refused(lambda: qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, out), "q exists", "--overwrite")
    assert contents(out) == {"mine.txt": b"precious"}


def test_a_full_disk_leaves_the_former_result_and_can_be_resumed(folder, tmp_path, monkeypatch):
    from qlab import writer

    model, out = open_checkpoint(folder), tmp_path / "q"
    qlab.quantize(model, qlab.rtn(INT4), None, out)
    before, save = contents(out), writer.save_file

    def full(tensors, path, **kwargs):
        if "00003" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **kwargs)

    monkeypatch.setattr(writer, "save_file", full)
    again = qlab.rtn(qlab.parse_spec("int3-g16"))
    refused(lambda: qlab.quantize(model, again, None, out, overwrite=True), "00003", "No space left")
    assert contents(out) == before
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(writer, "save_file", save)
    qlab.quantize(model, again, None, out, resume=True)
    assert json.loads((out / "qlab.json").read_text())["bits_per_weight"] == 3 + 32 / 16
