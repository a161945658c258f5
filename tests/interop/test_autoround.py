"""We read what auto-round writes as its own kernels do: dense weights equal bit for bit.

It runs in an environment of its own, named by QLAB_INTEROP_VENV_AUTO_ROUND; see make_env.py.
"""

import os

import pytest
from driving import SHAPES, assert_equal, drive
from families import tiny
from model_folders import add_tokenizer
from safetensors.torch import load_file

from qlab.algebra.qtensor import dense
from qlab.files.checkpoint import open_checkpoint

VENV, NAME = os.environ.get("QLAB_INTEROP_VENV_AUTO_ROUND"), "QLAB_INTEROP_VENV_AUTO_ROUND"
pytestmark = pytest.mark.skipif(
    not VENV,
    reason=f"auto-round needs an environment of its own: set {NAME} (tests/interop/make_env.py)",
)
SPECS = {  # of the driver's ways: what q_proj and o_proj become
    "auto_gptq": ("int4-g32", "int4-g32"),
    "three_bits": ("int3-g32", "int3-g32"),
    "gptqmodel": ("int4-g32-asym", "int4-g32-asym"),
    "auto_awq": ("int4-g32-asym", "int4-g32-asym"),
    "mixed": ("int4-g32", "int8-g32"),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    tiny("llama", **SHAPES).half().save_pretrained(folder / "source")
    add_tokenizer(folder / "source")
    drive(VENV, "auto_round_driver.py", folder / "source", folder)
    return folder


@pytest.mark.parametrize("name", SPECS)
def test_we_read_what_it_writes(name, theirs):
    model = open_checkpoint(theirs / name)
    decoded = {path: dense(model.leaf(f"{path}.weight")) for path in model.quantized}
    assert_equal(decoded, load_file(theirs / f"{name}.dense.safetensors"))
    attention = "model.layers.1.self_attn"
    assert (
        tuple(str(model.quantized[f"{attention}.{part}"]) for part in ("q_proj", "o_proj"))
        == SPECS[name]
    )
    assert ("model.layers.0.mlp.down_proj" in model.quantized) == (name != "mixed")
