"""Files are hashed while they are read: whatever the order, the hash is the same, no byte is read
for it that was read in its turn, and a resumed run goes on only with what it began with."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from model_folders import change, contents, random_tokens

from qlab.algebra.spec import parse_spec
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files import hashed
from qlab.files.checkpoint import open_checkpoint
from qlab.files.digests import KINDS, said
from qlab.files.hashed import HashedFiles
from qlab.files.writer import Writer
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab_kernels.buffers import Buffers

SPEC = parse_spec("int4-g16")
FIRST, LAST = (f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 2))


@pytest.fixture
def readings(monkeypatch):
    """What is read: tensor -> how often, and "" -> bytes that are read for a hash alone."""
    counted, read, hash_up_to = Counter(), hashed.read, hashed._HashedFile.hash_up_to

    def counting_read(name, *place):
        counted[name] += 1
        return read(name, *place)

    def counting_hash(file, stop):
        counted[""] += stop - file.position
        hash_up_to(file, stop)

    monkeypatch.setattr(hashed, "read", counting_read)
    monkeypatch.setattr(hashed._HashedFile, "hash_up_to", counting_hash)
    return counted


def headers(model):
    """How many bytes of its files hold no tensor."""
    whole = sum(file.stat().st_size for file in set(model.files.values()))
    return whole - sum(tensor.nbytes for tensor in model.stored.values())


@pytest.mark.parametrize("seed", range(5))
def test_in_any_order_the_hash_is_that_of_the_files(seed, saved):
    model = open_checkpoint(saved("llama", shard_size="100KB", num_hidden_layers=3))
    digests = {kind: of((model.path / "config.json").read_bytes()) for kind, of in KINDS.items()}
    for file in sorted(model.path.glob("*.safetensors")):
        for kind, digest in digests.items():
            digest.update(KINDS[kind](file.read_bytes()).digest())
    source, names = HashedFiles(model.path, model.stored), list(model.stored)
    random.Random(seed).shuffle(names)
    for name in names[seed:]:
        source.read(name, model.stored[name])
    assert source.digest() == said(digests["blake3"])
    assert model.sha256() == said(digests["sha256"])
    assert HashedFiles(model.path, model.stored).agrees([source.proof()])


def test_reading_in_the_order_of_the_files_reads_nothing_for_the_hash(saved, readings):
    model = open_checkpoint(saved("llama", num_hidden_layers=3))
    source = HashedFiles(model.path, model.stored)
    for name in sorted(model.stored, key=model.place):
        source.read(name, model.stored[name])
    source.digest()
    assert readings.pop("") == headers(model) and set(readings.values()) == {1}


@pytest.mark.parametrize("method", [rtn, gptq])
def test_quantizing_reads_and_hashes_every_weight_once(method, saved, tmp_path, readings):
    """Certificates read nothing; what runs around the blocks is loaded to plan, to record, to write
    and to compare what was written with it."""
    folder = saved("llama", num_hidden_layers=3)
    model, data = open_checkpoint(folder), random_tokens(folder) if method is gptq else None
    out = quantize(model, method(SPEC), data, tmp_path / "out").path
    blocks = {name: times for name, times in readings.items() if ".layers." in name}
    assert len(blocks) == 27 and set(blocks.values()) == {1}
    assert {name: n for name, n in readings.items() if name not in blocks} == {
        "": headers(model),
        "lm_head.weight": 2,
        "model.embed_tokens.weight": 4,
        "model.norm.weight": 4,
    }
    record = json.loads((out / "qlab.json").read_text())
    assert (
        record["job"]["source"] == HashedFiles(folder, model.stored).digest()
        and len(record["certificates"]) == 21
    )
    assert all("weight_error" in row for row in record["certificates"].values())


@pytest.fixture
def stopped(saved, tmp_path):
    """The model of three blocks and the output of a run that stopped while it wrote the second, and
    the run itself. Its record is of when the first was written, while the second was read."""
    folder = saved("llama", num_hidden_layers=3)
    model, out = shutil.copytree(folder, tmp_path / "model"), tmp_path / "out"
    job = lambda **options: quantize(open_checkpoint(model), rtn(SPEC), None, out, **options)
    real = Writer.write_notes

    def stopping(writer, index, notes):
        if index == 2:
            raise KeyboardInterrupt
        real(writer, index, notes)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write_notes", stopping)
        job()
    return model, out, job


def one_number(tensor):
    """Another first number, which no fingerprint looks at."""
    tensor[0, 0] += 1
    return tensor


def test_one_other_number_in_what_was_read_is_another_job(stopped):
    model, out, job = stopped
    before = open_checkpoint(model).fingerprint()
    change(model, **{FIRST.replace(".", "__"): one_number})
    assert open_checkpoint(model).fingerprint() == before
    left = contents(out.parent)
    with pytest.raises(QlabError, match="belongs to another job"):
        job(resume=True)
    assert contents(out.parent) == left


def test_what_nobody_had_read_is_read_as_it_is_now(stopped, tmp_path):
    """Nothing was made of it yet, so that no two models are mixed."""
    model, out, job = stopped
    change(model, **{LAST.replace(".", "__"): one_number})
    job(resume=True)
    fresh = quantize(open_checkpoint(model), rtn(SPEC), None, tmp_path / "fresh").path
    assert contents(out) == contents(fresh)


def test_a_copy_of_the_model_is_the_same_job(stopped, tmp_path):
    model, out, _ = stopped
    copied = shutil.copytree(model, tmp_path / "copied", copy_function=shutil.copyfile)
    quantize(open_checkpoint(copied), rtn(SPEC), None, out, resume=True)
    whole = quantize(open_checkpoint(model), rtn(SPEC), None, tmp_path / "whole").path
    assert contents(out) == contents(whole)


def test_a_buffer_is_used_again_once_no_tensor_of_it_is_left():
    buffers = Buffers()
    size = buffers.LEAST
    first, second = buffers.empty(4 * size), buffers.empty(4 * size)
    place, view = first.data_ptr(), first.view(torch.bfloat16)[3:]
    del first
    third = buffers.empty(4 * size)
    assert place not in (second.data_ptr(), third.data_ptr())  # `view` is left
    del view
    small = buffers.empty(size)  # which would take too much of it
    again = buffers.empty(4 * size - 1)
    assert again.data_ptr() == place != small.data_ptr() and again.shape == (4 * size - 1,)
