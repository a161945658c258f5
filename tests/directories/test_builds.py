"""A command builds the Hugging Face model of a directory at most once."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlab.algebra.spec import parse_spec
from qlab.directories.convert import convert
from qlab.directories.inspect import inspect
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

RECIPE = rtn(parse_spec("int4-g32"))
FAMILIES = pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])


@pytest.fixture
def builds(monkeypatch):
    """Model type -> how often transformers built a model of it on the meta device."""
    counts = Counter()
    build = AutoModelForCausalLM.from_config

    def counted(config, **options):
        counts[config.model_type] += 1
        return build(config, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", counted)
    return counts


def times(builds):
    """How often a model was built since the last call."""
    count = builds.total()
    builds.clear()
    return count


@FAMILIES
def test_every_command_builds_a_model_at_most_once(family, saved, builds, tmp_path):
    source = saved(family, torch.bfloat16)
    codec = "gptq" if family == "gpt2" else "compressed-tensors"
    times(builds)
    plan(open_checkpoint(source), RECIPE, codec=codec)
    assert times(builds) == 1
    quantize(open_checkpoint(source), RECIPE, None, tmp_path / "quantized", codec=codec)
    assert times(builds) == 1
    quantize_files(source, RECIPE, tmp_path / "files", codec=codec)
    assert times(builds) == 1
    convert(tmp_path / "files", codec, tmp_path / "converted")
    assert times(builds) == 1
    assert not verify(tmp_path / "converted", source).faults
    assert times(builds) == 2  # of the directory, and of the model that it is compared with
    inspect(tmp_path / "converted")
    assert times(builds) == 0
