"""Inspecting reads headers and JSON files; it loads no tensor, builds no model and asks
transformers nothing."""

import json
import subprocess
import sys

import pytest
import torch
from model_folders import random_tokens
from rich.console import Console

from qlab.algebra.spec import parse_spec
from qlab.cli.output import console
from qlab.directories.inspect import inspect
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.files.directory import INDEX
from qlab.files.tensors import write
from qlab.methods.gptq import gptq


def printed(inspection) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspection)
    return capture.get()


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    source = saved("llama", torch.float16)
    recipe = gptq(parse_spec("int4-g32-asym"))
    return quantize(
        open_checkpoint(source),
        recipe,
        random_tokens(source),
        tmp_path_factory.mktemp("made") / "out",
    ).path


def test_what_qlab_wrote_shows_what_it_measured(quantized):
    inspection = inspect(quantized)
    assert (
        inspection.format == "compressed-tensors pack-quantized 0.20.0"
        and inspection.model_type == "llama"
        and len(inspection.sites) == 14
    )
    row = inspection.sites["model.layers.1.mlp.up_proj"]
    assert (
        row["stored"] == "weight_packed I32 128x8, weight_scale F16 128x2, weight_shape I64 2, "
        "weight_zero_point I32 16x2"
    )
    assert row["bytes"] == 4 * 128 * 8 + 2 * 128 * 2 + 16 + 4 * 32 and row["loss"] > 0
    assert (
        inspection.unquantized["model.norm.weight"] == "F16 64" and len(inspection.unquantized) == 7
    )
    text = printed(inspection)
    assert (
        "14 of 14 weights quantized" in text
        and "model.layers.1.mlp.up_proj" in text
        and "quantized inputs" in text
    )


def test_a_directory_of_others_is_shown_by_families(quantized, tmp_path):
    for file in quantized.iterdir():
        if file.name != "qlab.json":
            (tmp_path / file.name).symlink_to(file)
    inspection = inspect(tmp_path)
    assert inspection.record == {} and inspection.sites.keys() == inspect(quantized).sites.keys()
    text = printed(inspection)
    assert "14 weights quantized" in text
    line = next(line for line in text.splitlines() if "model.layers.*.mlp.up_proj" in line)
    assert [cell.strip() for cell in line.split("│")][2:4] == ["2", "int4-g32-asym"]


def test_an_unquantized_directory_too(saved):
    inspection = inspect(saved())
    assert (
        inspection.format == "unquantized"
        and not inspection.sites
        and "0 weights quantized" in printed(inspection)
    )


def test_what_a_configuration_says_at_length_is_cut(tmp_path):
    """A terminal's colours of a text take the square of its length."""
    write(tmp_path / "model.safetensors", [("norm.weight", torch.zeros(2, dtype=torch.float16))])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x/" * 50_000}))
    inspection = inspect(tmp_path)
    assert len(printed(inspection)) < 5000 and inspection.json()["model_type"] == "x/" * 50_000
    assert console().render_str("1 of 2").spans and not console().render_str("1 " * 2000).spans


def test_a_hundred_shards_of_an_unknown_architecture_without_transformers(tmp_path):
    weights = {"num_bits": 4, "strategy": "channel", "type": "int", "symmetric": True}
    scheme = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    parts = {
        "weight_packed": torch.int32,
        "weight_scale": torch.float16,
        "weight_shape": torch.int64,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "nobody_knows", "quantization_config": scheme})
    )
    listed = {}
    for i in range(100):
        tensors = [
            (f"layers.{i}.{module}.{name}", torch.zeros(2, dtype=dtype))
            for module in "qkvo"
            for name, dtype in parts.items()
        ]
        write(tmp_path / f"part-{i}.safetensors", tensors)
        listed |= {name: f"part-{i}.safetensors" for name, _ in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    code = (
        "import sys; from qlab.directories.inspect import inspect; found = "
        f"inspect({str(tmp_path)!r}); print(len(found.sites), found.files, 'transformers' in "
        "sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["400", "100", "False"], done.stderr


def test_only_headers_are_read(quantized, monkeypatch):
    monkeypatch.setattr("qlab.files.checkpoint.read", None)
    assert len(inspect(quantized).sites) == 14


@pytest.mark.parametrize("value", [[1], "int4", 3])
def test_a_quantization_config_that_is_no_object(value, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": value})
    )
    write(tmp_path / "model.safetensors", [("a", torch.zeros(1))])
    with pytest.raises(QlabError, match="a quantization_config that is no object"):
        inspect(tmp_path)
