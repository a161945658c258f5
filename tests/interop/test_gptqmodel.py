"""GPTQModel reads what we write and we read what it writes: dense weights equal bit for bit.

It runs in an environment of its own, named by QLAB_INTEROP_VENV_GPTQMODEL; see make_env.py.
"""

import json
import os
from dataclasses import replace

import pytest
import torch
from driving import SHAPES, assert_equal, drive
from families import tiny
from model_folders import add_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

VENV, NAME = os.environ.get("QLAB_INTEROP_VENV_GPTQMODEL"), "QLAB_INTEROP_VENV_GPTQMODEL"
pytestmark = pytest.mark.skipif(
    not VENV,
    reason=f"GPTQModel needs an environment of its own: set {NAME} (tests/interop/make_env.py)",
)
F16 = torch.float16

# name -> codec, spec; a codec with desc_act gets channels in random order
WRITTEN = {
    "gptq": ("gptq", Int(4, Tile(1, 64), True, F16)),
    "gptq-3-bits": ("gptq", Int(3, Tile(1, 64), True, F16)),
    "gptq-channel": ("gptq", Int(8, Tile(1, None), True, F16)),
    "gptq_v2-asym": ("gptq_v2", Int(2, Tile(1, 32), False, F16)),
    "gptq_v2-desc_act": ("gptq_v2_desc_act", Int(4, Tile(1, 32), False, F16)),
    "mixed": ("gptq", Int(4, Tile(1, 64), True, F16)),
    "awq": ("awq", Int(4, Tile(1, 64), False, F16)),
    "awq-symmetric": ("awq", Int(4, Tile(1, 64), True, F16)),
}
# The driver's names of what it writes.
WAYS = ("plain", "three_bits", "channel", "asymmetric", "asymmetric_v2", "desc_act", "dynamic")


def random_leaf(spec, o, k, generator, reordered):
    draw = lambda *shape: torch.randint(
        spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int8
    )
    grid = spec.tile.scales_shape((o, k))
    scales = (torch.rand(grid, generator=generator) * 0.05 + 0.01).half()
    order = (
        torch.randperm(k, generator=generator)
        .view(-1, spec.tile.cols or k)
        .sort(-1)
        .values.flatten()
    )
    return QTensor(
        draw(o, k),
        scales,
        None if spec.symmetric else draw(*grid),
        spec,
        perm=order if reordered else None,
    )


def write(directory, name):
    """A tiny llama of random codes; returns its dense weights."""
    codec, spec = CODECS[WRITTEN[name][0]], WRITTEN[name][1]
    model, generator = tiny("llama", **SHAPES).half(), torch.Generator().manual_seed(0)
    state, specs, weights = dict(model.state_dict()), {}, {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        specs[path] = None if path == "lm_head" else spec
        if name == "mixed":
            specs[path] = {"o_proj": replace(spec, bits=8), "down_proj": None}.get(
                path.rpartition(".")[2], specs[path]
            )
        if specs[path]:
            del state[f"{path}.weight"]
            leaf = random_leaf(
                specs[path], *module.weight.shape, generator, WRITTEN[name][0].endswith("desc_act")
            )
            state |= codec.encode(path, leaf)
            weights[path] = dense(leaf)
    directory.mkdir()
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "quantization_config": codec.config(specs),
        "dtype": "float16",
    }
    (directory / "config.json").write_text(json.dumps(config, sort_keys=True))
    add_tokenizer(directory)
    return weights


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    weights = {name: write(folder / name, name) for name in WRITTEN}
    drive(VENV, "gptqmodel_driver.py", "read", *(folder / name for name in WRITTEN))
    return {
        name: (weights[name], load_file(folder / f"{name}.dense.safetensors")) for name in WRITTEN
    }


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    tiny("llama", **SHAPES).half().save_pretrained(folder / "source")
    add_tokenizer(folder / "source")
    drive(VENV, "gptqmodel_driver.py", "write", folder / "source", folder)
    return folder


@pytest.mark.parametrize("name", WRITTEN)
def test_it_reads_what_we_write(name, ours):
    weights, read = ours[name]
    assert_equal(read, weights)


def test_it_reads_linears_stored_transposed(tmp_path):
    tiny("gpt2", n_embd=128).half().save_pretrained(tmp_path / "source")
    add_tokenizer(tmp_path / "source")
    out = quantize(
        open_checkpoint(tmp_path / "source"),
        rtn(Int(4, Tile(1, 64), True, F16)),
        None,
        tmp_path / "out",
        codec="gptq",
    ).path
    drive(VENV, "gptqmodel_driver.py", "read", out)
    model = open_checkpoint(out)
    assert_equal(
        load_file(f"{out}.dense.safetensors"),
        {path: dense(model.leaf(f"{path}.weight")) for path in model.quantized},
    )


@pytest.mark.parametrize("name", WAYS)
def test_we_read_what_it_writes(name, theirs):
    model = open_checkpoint(theirs / name)
    leaves = {path: model.leaf(f"{path}.weight") for path in model.quantized}
    assert_equal(
        {path: dense(leaf) for path, leaf in leaves.items()},
        load_file(theirs / f"{name}.dense.safetensors"),
    )
    assert any(leaf.perm is not None for leaf in leaves.values()) == (name == "desc_act")
    assert len(leaves) == (12 if name == "dynamic" else 14)
