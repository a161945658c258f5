"""A transform_config is computed as compressed-tensors computes it, carried on, and refused by name
where it is not."""

from functools import reduce

import pytest
import torch
from compressed_tensors.transform import TransformConfig
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from library import INT8, TOKENS, prepare_with_the_library, write_with_the_library
from model_folders import bits_equal, change, random_tokens, tensors
from rotations import CASES, assert_close, group, logits, rotated

import qlab
from qlab.algebra.online import MatMul
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec
from qlab.codecs import CODECS
from qlab.directories.inspect import inspect
from qlab.directories.verify import verify
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.model.online import at_input
from qlab.model.skeleton import Skeleton

CODEC = CODECS["compressed-tensors"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("weights", [None, INT8])
def test_we_compute_what_the_library_computes(name, weights, tmp_path):
    plain = write_with_the_library(tiny("llama"), tmp_path / "plain", weights=weights)
    expected = write_with_the_library(
        tiny("llama"), tmp_path / name, transforms=CASES[name], weights=weights
    )
    assert_close(logits(tmp_path / name), expected)
    assert weights or ((plain - expected).norm() < 1e-3 * plain.norm()) == (name != "changed")


def test_a_rotation_comes_before_the_rounding_and_later_layers_share_its_matrix(tmp_path):
    options = {"inputs": TOKENS, "transforms": CASES["in one matrix"]}
    name = "model.layers.1.mlp.up_proj"
    theirs = prepare_with_the_library(tiny("llama"), **options).get_submodule(name)
    write_with_the_library(tiny("llama"), tmp_path / "v", **options)
    model = open_checkpoint(tmp_path / "v")
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    ops = at_input(Skeleton(model, torch.float32), name)
    y = reduce(lambda value, op: op(value), ops, x) @ dense(model.leaf(f"{name}.weight")).T
    assert torch.allclose(y, theirs(x), atol=1e-4)
    assert f"{name}.v_input.weight" not in model.stored and not model.rotations(
        "lm_head", "input", 64
    )


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(1, 3), st.integers(0, 99))
def test_a_narrow_matrix_is_a_block_diagonal_one(power, blocks, seed):
    generator, n = torch.Generator().manual_seed(seed), 2**power
    x = torch.randn(2, 3, n * blocks, generator=generator)
    M = torch.randn(n, n, generator=generator, dtype=torch.float64)
    whole = (x.double() @ torch.block_diag(*[M] * blocks)).float()
    assert MatMul(M)(x).dtype == x.dtype and torch.allclose(MatMul(M)(x), whole, rtol=1e-5)


def test_converting_carries_it_on_and_other_formats_refuse(tmp_path):
    expected = write_with_the_library(tiny("llama"), tmp_path / "all", transforms=CASES["all"])
    out = qlab.convert(tmp_path / "all", "compressed-tensors", tmp_path / "out").path
    before, after = tensors(tmp_path / "all"), tensors(out)
    moved = [name for name in before if ".R" in name]
    assert len(moved) == 2 and all(bits_equal(before[name], after[name]) for name in moved)
    said = open_checkpoint(out).raw["quantization_config"]["transform_config"]
    assert TransformConfig.model_validate(said).config_groups.keys() == CASES["all"].keys()
    assert_close(logits(out), expected)
    with pytest.raises(
        QlabError,
        match=r"^gptq cannot hold the transform_config of .* \(activations are rotated .* R3, R4\)",
    ):
        qlab.convert(tmp_path / "all", "gptq", tmp_path / "gptq", requantize=parse_spec("int4-g32"))


def test_what_is_in_the_weights_already_goes_into_every_format(tmp_path):
    write_with_the_library(tiny("llama").half(), tmp_path / "R2", transforms=CASES["fused alone"])
    assert open_checkpoint(qlab.convert(tmp_path / "R2", "gptq", tmp_path / "gptq").path).quantized
    assert inspect(tmp_path / "R2").extras == {
        "transform_config": "rotations R2 are in the weights; 0 tensors"
    }


def test_it_is_shown_and_verified(tmp_path):
    write_with_the_library(tiny("llama"), tmp_path / "all", transforms=CASES["all"])
    tiny("llama").save_pretrained(tmp_path / "reference")
    assert inspect(tmp_path / "all").extras == {
        "transform_config": "activations are rotated at run time by R3, R4; 2 tensors"
    }
    verdict = verify(tmp_path / "all", tmp_path / "reference")
    assert len(verdict.extras) == 2 and not verdict.extra and not verdict.faults
    change(
        tmp_path / "all",
        model__layers__0__mlp__down_proj__R4_input__weight=lambda M: M.fill_(torch.nan),
    )
    assert verify(tmp_path / "all", tmp_path / "reference").faults == [
        "model.layers.0.mlp.down_proj.R4_input.weight holds NaN or Inf"
    ]


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            None,
            "shares the .128, 128. matrix of transform_config's group R4 with others, and the "
            "files hold 0",
        ),
        (lambda M: M.fill_(torch.inf), "R4_input.weight holds NaN or Inf"),
        (lambda M: M[:64, :64].clone(), "the files hold 0"),
    ],
)
def test_a_damaged_matrix_is_refused_by_name(edit, message, tmp_path):
    write_with_the_library(tiny("llama"), tmp_path / "down", transforms=CASES["down"])
    change(tmp_path / "down", model__layers__0__mlp__down_proj__R4_input__weight=edit)
    with pytest.raises(QlabError, match=message):
        read(open_checkpoint(tmp_path / "down"), random_tokens(tmp_path / "down", 1, 8))


QUERIES, LINEAR = ("re:.*attn$", "q_attn", False), ("Linear", "input", False)


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"config_groups": {"R": group("fourier", LINEAR)}},
            "group R is .*qlab reads objects of type hadamard",
        ),
        (
            {"config_groups": {"R": group("hadamard", ("Linear", "attn_output", True))}},
            "location 'attn_output'",
        ),
        (
            {"config_groups": {"R": group("hadamard", ("LlamaMLP", "output", True))}},
            "targets the class 'LlamaMLP' at its output",
        ),
        (
            {"config_groups": {"R": group("hadamard", QUERIES, head_dim=16)}},
            "transforms queries and keys",
        ),
        (
            {
                "config_groups": {
                    "R": group("random-matrix", QUERIES, ("re:.*attn$", "k_cache", False))
                }
            },
            "transforms queries and keys",
        ),
        (
            {"config_groups": {"R": group("hadamard", QUERIES, ("re:.*attn$", "k_cache", True))}},
            "transforms queries and keys",
        ),
        (
            {"config_groups": {"R": group("hadamard", ("LlamaMLP", "input", False))}},
            "targets the class 'LlamaMLP'",
        ),
        (
            {"config_groups": {"R": group("hadamard", ("re:(", "input", False))}},
            "no names or regular expressions",
        ),
        (
            {"config_groups": {"R": group("hadamard", LINEAR, precision="torch.int8")}},
            "precision 'torch.int8'",
        ),
        ({"config_groups": {"R": group("hadamard", LINEAR, head_dim="16")}}, "head_dim '16'"),
        ({"config_groups": {"R": group("hadamard", LINEAR) | {"apply": "x"}}}, "apply 'x'"),
        ({"config_groups": ["R"]}, "no object of config_groups"),
        ({"groups": {}}, "no object of config_groups"),
    ],
)
def test_what_qlab_does_not_compute_is_refused_by_name(config, message):
    with pytest.raises(QlabError, match=message):
        CODEC.extras({"transform_config": config}, [])


def test_two_rotations_of_one_input_are_refused_since_their_order_is_nowhere(tmp_path):
    both = {
        "a": rotated("hadamard", "re:.*down_proj$"),
        "b": rotated("random-hadamard", "re:.*down_proj$"),
    }
    write_with_the_library(tiny("llama"), tmp_path / "both", transforms=both)
    with pytest.raises(
        QlabError,
        match=r"down_proj has an input that a and b of transform_config rotate, in an order",
    ):
        logits(tmp_path / "both")


def test_a_head_dim_that_does_not_divide_the_channels_is_refused(tmp_path):
    config = {"config_groups": {"R": group("hadamard", LINEAR, head_dim=24)}}
    [extra] = CODEC.extras({"transform_config": config}, ["m.R_input.weight"])
    with pytest.raises(
        QlabError, match=r"m has 64 input channels, which the head_dim 24 .* does not divide"
    ):
        extra.ops("m", "input", 64, lambda name: torch.eye(24))


@pytest.mark.parametrize("location", ["input", "output"])
def test_a_head_that_is_turned_is_refused_by_name(location, tmp_path):
    head = {"type": "hadamard", "apply": [{"targets": ["lm_head"], "location": location}]}
    write_with_the_library(tiny("llama"), tmp_path / "head", transforms={"H": head})
    with pytest.raises(
        QlabError,
        match=r"^lm_head.weight has inputs or outputs that are rounded or rotated at run time",
    ):
        logits(tmp_path / "head")
