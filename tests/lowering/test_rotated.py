"""A lowered model turns inputs and outputs as the directory says."""

import pytest
import torch
from families import tiny
from library import INT8, TOKENS, write_with_the_library
from rotations import CASES, assert_close
from tolerances import MODEL

import qlab
from qlab.errors import QlabError
from qlab.lowering import to_torchao

IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.mark.parametrize("inputs", [None, TOKENS])
@pytest.mark.parametrize("name", ["down", "shuffled", "inputs and outputs", "all", "changed"])
def test_a_lowered_model_computes_what_the_library_computes(name, inputs, tmp_path):
    plain = ["re:.*layers.0.mlp.*"]  # they are not quantized, and turned all the same
    expected = write_with_the_library(
        tiny("llama"), tmp_path / name, transforms=CASES[name], inputs=inputs, plain=plain
    )
    for dtype in (torch.float32, torch.bfloat16):
        computed = qlab.lower(tmp_path / name, dtype=dtype, dense_cache=True)(IDS).logits.float()
        assert_close(computed, expected, MODEL[torch.bfloat16 if inputs else dtype])


def test_a_state_holds_no_matrix_and_fits_the_same_directory(tmp_path):
    write_with_the_library(tiny("llama"), tmp_path / "all", transforms=CASES["all"])
    model, other = (qlab.lower(tmp_path / "all") for _ in range(2))
    state = model.state_dict()
    assert not any("rotation" in name for name in state)
    other.model.layers[0].mlp.down_proj.words.zero_()
    assert not torch.equal(other(IDS).logits, model(IDS).logits)
    other.load_state_dict(state)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_it_compiles_into_one_graph(tmp_path):
    write_with_the_library(tiny("llama"), tmp_path / "quip", transforms=CASES["inputs and outputs"])
    model = qlab.lower(tmp_path / "quip")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(IDS, use_cache=False).logits, model(IDS).logits, MODEL[torch.bfloat16])


def test_modules_share_a_matrix(tmp_path):
    write_with_the_library(tiny("llama"), tmp_path / "down", transforms=CASES["down"])
    first, second = (
        layer.mlp.down_proj.input_rotation for layer in qlab.lower(tmp_path / "down").model.layers
    )
    assert first is second


def test_torchao_refuses_by_name(tmp_path):
    four = INT8 | {"num_bits": 4}
    write_with_the_library(
        tiny("llama"),
        tmp_path / "down",
        transforms=CASES["down"],
        weights=four,
        plain=["re:.*(attn|gate|up).*"],
    )
    with pytest.raises(
        QlabError,
        match=(
            r"down_proj: torchao's int4 tensors take inputs as they come, .* neither rotated nor "
            r"rounded"
        ),
    ):
        to_torchao(tmp_path / "down")
