"""Weights that several blocks share are one weight: read wherever they are used, rounded once, and
written once."""

import re

import pytest
import torch
from families import tiny
from logits import IDS
from model_folders import random_tokens, refused, tensors
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, each_weight, keep, rules
from qlab.directories.convert import convert
from qlab.directories.verify import verify
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import evaluate, read
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import lower
from qlab.methods.awq import awq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

INT8, INT4 = parse_spec("int8-g32"), parse_spec("int4-g32")
SHARED = re.compile(r"model\.layers\.[12]\.(mlp|adapters)\.")


@pytest.fixture(params=["once", "twice"])
def source(request, monkeypatch, tmp_path):
    """A llama of three blocks with one multilayer perceptron and one list of adapters, of which
    every block runs one; the files hold them once, or for every block."""
    start, forward = LlamaDecoderLayer.__init__, LlamaDecoderLayer.forward

    def held_by_all(self, config, layer_idx):
        start(self, config, layer_idx)
        self.adapters = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(3)])
        self.index = layer_idx

    def run(self, hidden_states, **kwargs):
        return forward(self, self.adapters[self.index](hidden_states), **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", held_by_all)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", run)
    tied = {
        f"layers.{i}.{part}": f"layers.0.{part}" for i in (1, 2) for part in ("mlp", "adapters")
    }
    monkeypatch.setattr(LlamaModel, "_tied_weights_keys", tied, raising=False)
    path = tmp_path / "model"
    tiny("llama", num_hidden_layers=3, tie_word_embeddings=True).half().save_pretrained(path)
    state = tensors(path)
    assert not any(map(SHARED.match, state))
    if request.param == "twice":
        first = {
            name: t for name, t in state.items() if re.match(r"model\.layers\.0\.(mlp|ad)", name)
        }
        state |= {
            name.replace(".0.", f".{i}.", 1): t.clone() for name, t in first.items() for i in (1, 2)
        }
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def test_blocks_that_share_weights_are_read_and_rounded_once(source, tmp_path, door):
    model, data = open_checkpoint(source), random_tokens(source, 2, 16)
    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    with torch.no_grad():
        reading = read(model, data)
    planned = plan(model, rtn(INT8))
    assert not any("mlp" in name for name in planned.unquantized)
    out = quantize(model, rtn(INT8), None, tmp_path / "out").path
    assert {name.rpartition(".")[0] for name in tensors(out)} == {
        name.rpartition(".")[0] for name in tensors(source) if not SHARED.match(name)
    }
    assert verify(out, source).faults == []
    assert 0 < evaluate(open_checkpoint(out), reading, data).kl < 1e-3
    again = convert(out, "gptq_v2", tmp_path / "again").path
    assert verify(again, source).faults == []
    for planned in (out, again):
        lowered = lower(planned, dtype=torch.float32, dense_cache=True)
        for other in (lowered, AutoModelForCausalLM.from_pretrained(planned, dtype=torch.float32)):
            assert (logits(other) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("method", [gptq, awq])
def test_a_method_that_would_make_two_of_a_shared_weight_is_refused_before_work(
    method, source, tmp_path
):
    model, data = open_checkpoint(source), random_tokens(source, 2, 16)
    words = "model.layers.1.mlp.", "model.layers.0.mlp.", "are one weight", "rtn or hqq"
    refused(lambda: quantize(model, method(INT8), data, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
    others = rules({"*.mlp.*": rtn(INT8), "*": method(INT8)})
    out = quantize(model, others, data, tmp_path / "out").path
    assert verify(out, source).faults == []


@pytest.mark.parametrize("other", [rtn(INT4), keep()])
def test_two_rules_for_a_shared_weight_are_refused(other, source):
    recipe = rules({"*.2.mlp.*": other, "*": rtn(INT8)})
    refused(lambda: plan(open_checkpoint(source), recipe), "model.layers.2.mlp", "one weight")


def test_what_becomes_two_in_another_way_is_refused_when_it_is_known(source, tmp_path):
    seen = []

    def scaled(W_ok, stats, spec):
        seen.append(W_ok)
        return W_ok * (1 + len(seen) / 64), {}

    recipe = at("*.mlp.*", each_weight("scaled", scaled, None)) + at("*attn*", rtn(INT8))
    act = lambda: quantize(open_checkpoint(source), recipe, None, tmp_path / "out")
    refused(act, "model.layers.1.mlp.", "are one", "makes two of it")
    assert not (tmp_path / "out" / "config.json").exists()
