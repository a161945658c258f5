"""A head whose weight is rounded while it is loaded: its logits are those of the rounded weight,
and all else stays."""

import pytest
import torch
from families import tiny
from model_folders import refused

import qlab
from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import dense
from qlab.lowering.around.coded_head import code_head
from qlab.lowering.weights.modules import QLinear

IDS = torch.arange(3, 27).reshape(2, 12)
FAMILIES = ["llama", "gemma2", "gpt2", "qwen3_moe", "cohere"]


def head_of(model):
    return model.get_output_embeddings()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_rounded_weight(family, tied):
    spec = qlab.parse_spec("int8-channel")
    model, other = (tiny(family, tie_word_embeddings=tied).eval() for _ in range(2))
    other.load_state_dict(model.state_dict())
    W = head_of(other).weight.detach()
    other.get_output_embeddings().weight = torch.nn.Parameter(
        dense(encode(minmax, W, spec), torch.float32)
    )
    embedded = model.get_input_embeddings().weight.clone()
    code_head(model, spec, torch.float32, None)
    model.tie_weights()
    assert isinstance(head_of(model), QLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedded)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
        assert not torch.equal(head_of(model).dequantized(), W)


def test_a_large_weight_is_rounded_in_slabs_that_change_nothing(monkeypatch):
    spec, W = qlab.parse_spec("int4-g8-asym"), torch.randn(37, 16, dtype=torch.float32)
    model = tiny("llama", vocab_size=37, hidden_size=16, tie_word_embeddings=False)
    head_of(model).weight = torch.nn.Parameter(W)
    monkeypatch.setattr("qlab.lowering.around.coded_head.SLAB", 5 * 16)
    code_head(model, spec, torch.float32, None)
    whole = dense(encode(minmax, W, spec), torch.float32)
    assert torch.equal(head_of(model).dequantized(), whole)


def test_lowering_rounds_a_dense_head_and_keeps_one_with_codes(saved, tmp_path):
    recipe = qlab.chain(qlab.rtn("int4-g16"), qlab.outside(qlab.rtn("int4-g16")))
    folder = saved("llama", tie_word_embeddings=False)
    for name, steps in {"dense": qlab.rtn("int4-g16"), "coded": recipe}.items():
        qlab.quantize(folder, steps, None, tmp_path / name)
    lowered = {n: qlab.lower(tmp_path / n, head="int8-channel") for n in ("dense", "coded")}
    assert str(head_of(lowered["dense"]).spec) == "int8-channel"
    assert str(head_of(lowered["coded"]).spec) == "int4-g16"
    assert type(head_of(qlab.lower(tmp_path / "dense"))) is torch.nn.Linear


def test_activations_reach_the_kernel_of_the_head(saved, tmp_path):
    qlab.quantize(saved("llama"), qlab.rtn("int4-g32"), None, tmp_path / "out")
    model = qlab.lower(tmp_path / "out", activations="int8", head="int8-channel")
    assert head_of(model).kernel.name == "int4_int8"
    assert model.generate(IDS, max_new_tokens=3).shape == (2, 15)


def test_a_dense_directory_answers_with_a_rounded_head(saved):
    with qlab.pipeline(saved("llama"), head="int8-channel") as pipe:
        assert isinstance(head_of(pipe.engine.model), QLinear)
        assert len(pipe([5, 6, 7], temperature=0, max_tokens=4).tokens) == 4


def test_what_cannot_be_rounded_is_refused(saved):
    model = tiny("llama")

    def code(of, spec):
        return lambda: code_head(of, qlab.parse_spec(spec), torch.float32, None)

    refused(code(model, "int8-tensor"), "rows", "int8-channel")
    refused(code(model, "int8-g7"), "groups of 7")
    refused(code(model.model, "int8-channel"), "LlamaModel", "no head")
    model.set_output_embeddings(torch.nn.Identity())
    refused(code(model, "int8-channel"), "Identity")
    refused(lambda: qlab.lower(saved("llama"), head="int9"), "int9")
