"""Models whose hidden states have an axis of streams, before or behind those of windows and
tokens."""

import pytest
import torch
from model_folders import random_tokens, refused
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from qlab.algebra.spec import parse_spec
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import evaluate, read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.model.calls import windows_axis

INT8 = parse_spec("int8-g16")
block = LlamaDecoderLayer.forward


@pytest.fixture(params=[0, 2], ids=["before", "behind"])
def streams(request, monkeypatch):
    """llamas of two streams of hidden states; returns the axis of windows."""
    at = request.param

    def forward(self, hidden_states, position_embeddings=None, **kwargs):
        one, other = hidden_states.unbind(at)
        out = block(self, one, position_embeddings=position_embeddings, attention_mask=None)
        return torch.stack([out + other, torch.tanh(one)], at)

    def model(self, input_ids, **kwargs):
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        hidden = torch.stack([hidden, hidden], at)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=positions)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden.sum(at)))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    monkeypatch.setattr(LlamaModel, "forward", model)
    return 0 if at else 1


def test_streams_are_read_and_quantized_wherever_their_axis_is(streams, saved, tmp_path):
    source = saved("llama")
    model, data = open_checkpoint(source), random_tokens(source, samples=3, length=16)
    reading = read(model, data)
    assert reading.windows == streams and reading.tokens == (3, 16)
    assert evaluate(reading, model, data).kl == 0
    out = quantize(model, gptq(INT8), data, tmp_path / "out").path
    assert 0 < evaluate(open_checkpoint(out), reading, data).kl < 0.01


def test_the_axis_of_windows_is_known_or_the_states_are_refused():
    assert windows_axis(torch.zeros(8, 8, 8), (8, 8)) == 0
    assert windows_axis(torch.zeros(4, 2, 5, 8), (2, 5)) == 1
    assert windows_axis(torch.zeros(2, 5, 4, 8), (2, 5)) == 0
    refused(lambda: windows_axis(torch.zeros(4, 4, 4, 8), (4, 4)), "several places", "(4, 4, 4, 8)")
    refused(lambda: windows_axis(torch.zeros(10, 8), (2, 5)), "no place", "2 windows of 5 tokens")
