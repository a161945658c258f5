"""We read what llm-compressor writes and its compressed-tensors, which is older than ours, reads
what we write: dense weights equal bit for bit.

It runs in an environment of its own, named by QLAB_INTEROP_VENV_LLMCOMPRESSOR; see make_env.py.
"""

import json
import os

import pytest
import torch
from driving import SHAPES, assert_equal, drive
from families import tiny
from model_folders import add_tokenizer
from safetensors.torch import load_file

import qlab
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, keep, rules
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.model.running import head

VENV, NAME = os.environ.get("QLAB_INTEROP_VENV_LLMCOMPRESSOR"), "QLAB_INTEROP_VENV_LLMCOMPRESSOR"
pytestmark = pytest.mark.skipif(
    not VENV, reason=f"llm-compressor needs an environment of its own: set {NAME} (see make_env.py)"
)
WAYS = {  # of the driver: what q_proj becomes, and how its input is rounded
    "W4A16": ("int4-g32", None),
    "W4A16_asym": ("int4-g32-asym", None),
    "W8A16": ("int8-channel", None),
    "W8A8": ("int8-channel", "int8-channel"),
    "W8A8_static": ("int8-channel", "int8-tensor static"),
    "W8A8_static_asym": ("int8-channel", "int8-tensor-asym static"),
    "W4A8": ("int4-g32", "int8-channel"),
    "FP8": ("fp8-tensor", "fp8-tensor static"),
    "FP8_DYNAMIC": ("fp8-channel", "fp8-channel"),
    "FP8_BLOCK": ("fp8-b128x128", "fp8-g128"),
    "NVFP4A16": ("nvfp4", None),
    "NVFP4": ("nvfp4", "nvfp4 static"),
    "MXFP4": ("mxfp4", "mxfp4"),
    "MXFP8": ("mxfp8", "mxfp8"),
    "GPTQ": ("int4-g32", None),
    "GPTQ_unordered": ("int4-g32", None),
    "AWQ": ("int4-g32-asym", None),
    "SmoothQuant": ("int8-channel", "int8-channel"),
    "mixed_groups": ("int4-g32", None),
    "kv_cache": ("int4-g32", None),
    "kv_cache_heads": ("int4-g32", None),
    "SpinQuant": ("int4-g32", None),
    "SpinQuant_online": ("int4-g32", None),
    "QuIP": ("int4-g32", None),
    "QuIP_outputs": ("int4-g32", None),
}
RECIPES = {
    "int4": rtn(parse_spec("int4-g32")),
    "int4-asym": rtn(parse_spec("int4-g32-asym")),
    "int3": rtn(parse_spec("int3-g64")),
    "int8-rounded": chain(
        rtn(parse_spec("int8-channel")), quantize_inputs(parse_spec("int8-channel"))
    ),
    "fp8-rounded": chain(
        rtn(parse_spec("fp8-channel")), quantize_inputs(parse_spec("fp8-channel"))
    ),
    "fp8-blocks": rtn(parse_spec("fp8-b128x128")),
    "nvfp4": rtn(parse_spec("nvfp4")),
    "mxfp4": rtn(parse_spec("mxfp4")),
    "mxfp8": rtn(parse_spec("mxfp8")),
    "mixed": rules(
        {
            "*.o_proj": keep(),
            "*.mlp.*": rtn(parse_spec("fp8-channel")),
            "*": rtn(parse_spec("int4-g32")),
        }
    ),
}
PASSED_ON = (
    "W4A16_asym",
    "W8A8_static",
    "FP8_BLOCK",
    "mixed_groups",
    "kv_cache_heads",
    "SpinQuant_online",
    "QuIP_outputs",
)


def weights(directory):
    """Module -> its dense weight, rounded to the model's dtype as the library does it."""
    model = open_checkpoint(directory)
    return {
        path: dense(model.leaf(f"{path}.weight")).to(torch.bfloat16) for path in model.quantized
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "source"
    tiny("llama", **SHAPES).bfloat16().save_pretrained(folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    drive(VENV, "llmcompressor_driver.py", "write", source, folder)
    return folder


@pytest.fixture(scope="module")
def ours(source, theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    for name, recipe in RECIPES.items():
        qlab.quantize(open_checkpoint(source), recipe, None, folder / name)
    for name in PASSED_ON:
        qlab.convert(theirs / name, "compressed-tensors", folder / name)
    drive(
        VENV, "llmcompressor_driver.py", "read", *(folder / name for name in (*RECIPES, *PASSED_ON))
    )
    return folder


@pytest.mark.parametrize("name", WAYS)
def test_we_read_what_it_writes(name, theirs):
    assert_equal(weights(theirs / name), load_file(theirs / f"{name}.dense.safetensors"))
    model, q_proj = open_checkpoint(theirs / name), "model.layers.0.self_attn.q_proj"
    inputs = model.inputs.get(q_proj)
    assert (str(model.quantized[q_proj]), inputs and str(inputs)) == WAYS[name] and len(
        model.quantized
    ) == 14
    assert all(op.input_spec == inputs for op in model.rounding(q_proj))


def test_we_read_every_group_of_a_mixed_recipe(theirs):
    model, mlp = open_checkpoint(theirs / "mixed_groups"), "model.layers.1.mlp"
    assert {str(model.quantized[f"{mlp}.{part}"]) for part in ("gate_proj", "up_proj")} == {
        "int8-channel"
    }
    assert (
        str(model.quantized[f"{mlp}.down_proj"]) == "fp8-tensor"
        and str(model.inputs[f"{mlp}.down_proj"]) == "fp8-tensor static"
    )


@pytest.mark.parametrize(
    "name, says, tensors",
    [
        ("kv_cache", "keys and values are cached as fp8 with a stored scale per tensor", 4),
        ("kv_cache_heads", "keys and values are cached as fp8 with a stored scale per head", 4),
        ("SpinQuant", "rotations R1, R2 are in the weights", 0),
        ("SpinQuant_online", "activations are rotated at run time by R3, R4", 2),
        ("QuIP", "activations are rotated at run time by v", 2),
        ("QuIP_outputs", "activations are rotated at run time by u, v", 4),
    ],
)
def test_what_happens_beside_weights_is_read_and_passed_on(name, says, tensors, theirs, tmp_path):
    [extra] = open_checkpoint(theirs / name).extras
    assert extra.says == says and len(extra.tensors) == tensors and not extra.missing
    out = open_checkpoint(qlab.convert(theirs / name, "compressed-tensors", tmp_path / "out").path)
    assert all(
        torch.equal(out.tensor(part), open_checkpoint(theirs / name).tensor(part))
        for part in extra.tensors
    )
    assert out.extras[0].tensors == extra.tensors


@pytest.mark.parametrize("name", ["SpinQuant", "SpinQuant_online", "QuIP", "QuIP_outputs"])
def test_we_compute_what_its_rotated_models_compute(name, theirs):
    recorded = load_file(theirs / f"{name}.logits.safetensors")
    model, tokens, expected = open_checkpoint(theirs / name), recorded["tokens"], recorded["logits"]
    reading = read(model, qlab.from_ids(model, tokens))
    ours = head(reading.skeleton, tokens, reading.hidden)
    assert (ours - expected).norm() < 1e-4 * expected.norm()
    lowered = qlab.lower(theirs / name, dtype=torch.float32, dense_cache=True)(tokens).logits
    assert (lowered - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", RECIPES)
def test_it_reads_what_we_write(name, ours):
    decoded = weights(ours / name)
    assert_equal(load_file(ours / f"{name}.dense.safetensors"), decoded)
    assert len(decoded) == (12 if name == "mixed" else 14)


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_it_writes_goes_through_our_codec_and_back_into_its_reader(name, theirs, ours):
    assert_equal(
        load_file(ours / f"{name}.dense.safetensors"),
        load_file(theirs / f"{name}.dense.safetensors"),
    )
    theirs_said, ours_said = (
        json.loads((at / name / "config.json").read_text())["quantization_config"]
        for at in (theirs, ours)
    )
    assert theirs_said["version"] != ours_said["version"]
