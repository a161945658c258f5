"""A pass over the weights opens each shard once, however many tensors and blocks it holds."""

import traceback
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from model_folders import random_tokens

from qlab.algebra.spec import parse_spec
from qlab.directories.model_free import quantize_files
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.files.directory import read_header
from qlab.files.tensors import OpenFiles, read, write
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")


@pytest.fixture
def opened(monkeypatch):
    """A file -> what opened it, each time."""
    opened, open_ = defaultdict(list), Path.open

    def noting(path, *args, **options):
        opened[path].append([frame.name for frame in traceback.extract_stack(limit=7)[:-1]])
        return open_(path, *args, **options)

    monkeypatch.setattr(Path, "open", noting)
    return opened


@pytest.mark.parametrize("way", ["gptq", "model-free"])
def test_a_pass_opens_each_shard_of_a_mixture_once(way, saved, tmp_path, opened):
    path = saved("qwen3_moe", shard_size="200KB", num_hidden_layers=4, num_experts=16)
    model, data = open_checkpoint(path), random_tokens(path, 2, 8)
    shards = set(model.files.values())
    in_shard = Counter(model.files.values())
    assert 1 < len(shards) < 4 * 16 and min(in_shard.values()) > 1
    opened.clear()
    if way == "gptq":
        quantize(model, gptq(SPEC), data, tmp_path / "out")
    else:
        quantize_files(model, rtn(SPEC), tmp_path / "out")
    # headers are read once more where transformers asks for the config and qlab.hf is there
    passes = {
        shard: [names for names in opened[shard] if "read_header" not in names] for shard in shards
    }
    # the bytes that tell the model from others, before the pass, are read of all files
    assert {len(names) for names in passes.values()} == {2}, passes[min(shards)]


def test_of_many_files_few_stay_open(tmp_path, opened):
    files, several = OpenFiles(), [tmp_path / f"{i}.safetensors" for i in range(40)]
    for number, path in enumerate(several):
        write(path, [("x", torch.tensor([number], dtype=torch.int64))])
    opened.clear()
    for _ in range(2):
        for number, path in enumerate(several):
            (stored,) = read_header(path).values()
            assert read("x", stored, files).item() == number
    assert len(files._files) == files.MOST
    assert sum(not file.closed for file in files._files.values()) == files.MOST
