"""Rounded inputs that qlab does not write, does not read or cannot hold are refused by name."""

import pytest
import torch
from families import tiny
from leaves import random_qtensor
from model_folders import directory

import qlab
from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import InputSpec, parse_input_spec, parse_spec, with_scale_dtype
from qlab.algebra.transform import chain, keep, rules
from qlab.codecs import CODECS
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.model.running import head

CODEC = CODECS["compressed-tensors"]


def logits(folder, ids):
    """What qlab computes of the directory."""
    reading = read(open_checkpoint(folder), qlab.from_ids(open_checkpoint(folder), ids))
    return head(reading.skeleton, ids, reading.hidden)


@pytest.mark.parametrize(
    "family, inputs, kept, message",
    [
        ("llama", "nvfp4", (), "the recipe observes absmax and no calibration text was given"),
        (
            "llama",
            "int8-b16x16",
            (),
            "q_proj, .* compressed-tensors has no inputs int8-b16x16: input_activations has "
            "strategy 'block'",
        ),
        (
            "llama",
            "int8-channel",
            ("*.o_proj",),
            "o_proj, .*o_proj: its input is rounded at run time and its weight is not",
        ),
    ],
)
def test_inputs_without_a_place_in_the_files_are_refused_before_work(
    family, inputs, kept, message, saved, tmp_path
):
    rounded = rules(
        {
            **dict.fromkeys(kept, keep()),
            "*": rtn(parse_spec("nvfp4" if inputs == "nvfp4" else "int8-channel")),
        }
    )
    with pytest.raises(QlabError, match=message):
        qlab.quantize(
            open_checkpoint(saved(family)),
            chain(rounded, quantize_inputs(parse_spec(inputs))),
            None,
            tmp_path / "out",
        )
    assert not list(tmp_path.iterdir())


def test_files_without_their_model_hold_no_rounded_inputs(saved, tmp_path):
    int8 = parse_spec("int8-channel")
    with pytest.raises(
        QlabError,
        match="the stage 'quantize_inputs' puts operations on inputs, of which nobody knows",
    ):
        qlab.quantize_files(saved(), chain(rtn(int8), quantize_inputs(int8)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_inputs_that_qlab_does_not_write_are_refused_by_name():
    with pytest.raises(QlabError, match="m has rounded inputs and an unquantized weight"):
        CODEC.config(
            {"m": None, "n": parse_spec("int8-channel")},
            {"m": InputSpec(parse_spec("int8-channel"))},
        )
    twice = (QuantizeInput(parse_spec("int8-channel")),) * 2
    with pytest.raises(QlabError, match="m: compressed-tensors rounds an input once"):
        CODEC.encode(
            "m",
            random_qtensor(with_scale_dtype(parse_spec("int8-channel"), torch.float32), 4, 32),
            twice,
        )


def test_a_head_with_rounded_inputs_is_refused_by_name(tmp_path):
    model = tiny("llama", tie_word_embeddings=False)
    spec = with_scale_dtype(parse_spec("fp8-channel"), torch.float32)
    codes = CODEC.encode("lm_head", encode(minmax, model.lm_head.weight.detach(), spec))
    directory(model, tmp_path, codes, CODEC.config({"lm_head": spec}, {"lm_head": InputSpec(spec)}))
    with pytest.raises(
        QlabError,
        match=r"lm_head\.weight has inputs or outputs that are rounded or rotated at run time",
    ):
        logits(tmp_path, torch.arange(3, 19).reshape(1, 16))


def int8_static(**edits):
    stored = {
        "m.input_scale": torch.tensor([0.02]),
        "m.input_zero_point": torch.tensor([3], dtype=torch.int8),
    }
    return {
        name: t
        for name, t in (stored | {f"m.{k}": v for k, v in edits.items()}).items()
        if t is not None
    }


@pytest.mark.parametrize(
    "text, edits, message",
    [
        ("int8-tensor-asym static", {"input_scale": None}, "m.input_scale is missing"),
        ("int8-tensor-asym static", {"input_zero_point": None}, "m.input_zero_point is missing"),
        ("int8-tensor-asym static", {"input_scale": torch.zeros(1)}, "m has an input scale of 0"),
        ("int8-tensor-asym static", {"input_scale": torch.ones(2)}, "input_scale is torch.float32"),
        (
            "int8-tensor static",
            {},
            "input_zero_point has no place where inputs are int8-tensor static",
        ),
        (
            "fp8-token",
            {"input_zero_point": None},
            "input_scale has no place where inputs are fp8-channel",
        ),
        (
            "nvfp4 static",
            {"input_zero_point": None, "input_scale": None},
            "input_global_scale is missing",
        ),
    ],
)
def test_stored_input_scales_are_checked(text, edits, message):
    with pytest.raises(QlabError, match=message):
        CODEC.decode_input("m", int8_static(**edits), parse_input_spec(text))


@pytest.mark.parametrize(
    "args, message",
    [
        ({"num_bits": 8, "strategy": "channel"}, "strategy 'channel'"),
        ({"num_bits": 8, "strategy": "token"}, "one stored scale per tensor"),
        ({"num_bits": 8, "group_size": 32, "strategy": "group"}, "one stored scale per tensor"),
        ({"num_bits": 8, "strategy": "token", "dynamic": "local"}, "'local'"),
        (
            {
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "dynamic": True,
            },
            "'tensor_group'",
        ),
        (
            {"num_bits": 8, "strategy": "block", "block_structure": [2, 2], "dynamic": True},
            "scale per tensor, token or group",
        ),
        ({"dynamic": "sometimes"}, "dynamic 'sometimes'"),
        ({"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}, "symmetric fp4"),
        (["int8"], "no QuantizationArgs"),
    ],
)
def test_inputs_that_qlab_does_not_round_are_refused_by_name(args, message):
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "group_size": -1},
        "input_activations": args,
    }
    config = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    }
    with pytest.raises(QlabError, match=f"config group group_0 input_activations .*{message}"):
        CODEC.inputs(config, ["m.weight_scale"])
