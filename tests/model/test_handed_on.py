"""What blocks hand on beside hidden states reaches the blocks that take it, by whatever way, or is
refused before any work."""

from types import SimpleNamespace

import pytest
import torch
from model_folders import random_tokens, refused, tensors
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from qlab.algebra.spec import parse_spec
from qlab.algebra.tracing.taken_apart import put_together, take_apart, take_over
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import evaluate, read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.running import head

INT8 = parse_spec("int8-g16")
block = LlamaDecoderLayer.forward


class Past:
    """An object of the model's own kind, in which blocks leave what later ones take."""


class Keyed(dict):
    """A dictionary that pytrees do not know."""


def in_object(past, value=None):
    before = getattr(past, "left", 0)
    past.left = before if value is None else (value,)
    return before


def in_dictionary(past, value=None):
    before = past.get("left", 0)
    past["left"] = before if value is None else (value,)
    return before


def in_list(past, value=None):
    before = past[-1] if past else 0
    past += [] if value is None else [(value,)]
    return before


def nested(past, value=None):
    return in_dictionary(past.setdefault("inner", {}), value)


WAYS = {
    "an object": (Past, in_object),
    "a dictionary": (dict, in_dictionary),
    "a dictionary of its own kind": (Keyed, in_dictionary),
    "a list": (list, in_list),
    "a dictionary inside one": (dict, nested),
}


@pytest.fixture
def streams(monkeypatch):
    """streams(way, loop=...): llamas, whose blocks hand on a second stream beside the hidden
    states."""

    def use(way, between=lambda past, hidden: None):
        make, leave = WAYS[way]

        def forward(self, hidden_states, past=None, position_embeddings=None, **kwargs):
            taken = leave(past)
            out = block(
                self, hidden_states, position_embeddings=position_embeddings, attention_mask=None
            )
            leave(past, torch.tanh(hidden_states))
            return out if taken == 0 else out + taken[0]

        def model(self, input_ids, **kwargs):
            hidden, past = self.embed_tokens(input_ids), make()
            positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
            for layer in self.layers:
                hidden = layer(hidden, past=past, position_embeddings=positions)
                between(past, hidden)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

        monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
        monkeypatch.setattr(LlamaModel, "forward", model)

    return use


def logits(source, data):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(
            input_ids=data.ids, use_cache=False
        ).logits


def assert_read(source):
    """qlab's reading of a directory gives the logits of its model."""
    data = random_tokens(source)
    with torch.no_grad():
        reading = read(open_checkpoint(source), data)
        assert torch.allclose(
            head(reading.skeleton, data.ids, reading.hidden),
            logits(source, data),
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("way", WAYS)
def test_a_second_stream_is_handed_on_by_whatever_way(way, streams, saved):
    streams(way)
    assert_read(saved("llama", num_hidden_layers=3))


def test_statistics_and_drift_are_of_what_the_blocks_really_hand_on(streams, saved, tmp_path):
    streams("an object")
    source = saved("llama", num_hidden_layers=3)
    model, data = open_checkpoint(source), random_tokens(source)
    paths = {
        method: quantize(model, method(INT8), data, tmp_path / method.__name__).path
        for method in (gptq, gptaq)
    }
    for path in paths.values():
        assert evaluate(open_checkpoint(path), model, data).kl < 1e-3
    alone = {
        name: t
        for name, t in tensors(
            quantize(model, gptq(INT8), data, tmp_path / "r", inputs="reference").path
        ).items()
    }
    moved = {
        name.split(".")[2]
        for name, t in tensors(paths[gptq]).items()
        if not torch.equal(t, alone[name])
    }
    assert {"1", "2"} <= moved


def test_keys_and_values_of_another_block_are_its_own(saved, tmp_path):
    source = saved("gemma4_text")
    assert_read(source)
    model, data = open_checkpoint(source), random_tokens(source)
    written = quantize(model, gptq(INT8), data, tmp_path / "out").path
    assert evaluate(open_checkpoint(written), model, data).kl < 0.05
    assert len(quantize(model, rtn(INT8), None, tmp_path / "rtn").sites) == 32


@pytest.mark.parametrize(
    "between",
    [
        lambda past, hidden: setattr(past, "left", (past.left[0] * 2,)),
        lambda past, hidden: setattr(past, "left", (hidden * 2,)),
    ],
)
def test_what_a_model_computes_between_its_blocks_is_refused_before_any_work(
    between, streams, saved, tmp_path
):
    streams("an object", between)
    source = saved("llama", num_hidden_layers=3)
    model, data = open_checkpoint(source), random_tokens(source)
    for act in (
        lambda: evaluate(model, model, data),
        lambda: quantize(model, gptq(INT8), data, tmp_path / "out"),
    ):
        refused(
            act,
            "model.layers.1 is called with a tensor (4, 32, 64)",
            "computes of what earlier blocks return",
        )
    assert not list(tmp_path.iterdir())


class Memory(torch.nn.Module):
    """A module that all blocks hold."""


@pytest.mark.parametrize(
    "keep, name",
    [
        (lambda layer, t: setattr(layer.memory, "left", t), "Memory.left"),
        (lambda layer, t: layer.notes.append(t), "list.0"),
        (lambda layer, t: setattr(layer.self_attn.config, "left", t), "LlamaConfig.left"),
        (lambda layer, t: setattr(Memory, "left", t), "Memory.left"),
    ],
)
def test_what_a_block_leaves_in_attributes_for_another_is_refused_before_any_work(
    keep, name, monkeypatch, saved, tmp_path
):
    original_init, (memory, notes) = LlamaModel.__init__, (Memory(), [])
    Memory.left = None

    def init(self, config):
        original_init(self, config)
        for layer in self.layers:
            layer.memory, layer.notes = memory, notes

    def forward(self, hidden_states, **kwargs):
        keep(self, hidden_states * 2)
        return block(self, hidden_states, **kwargs)

    source = saved("llama", num_hidden_layers=3)
    monkeypatch.setattr(LlamaModel, "__init__", init)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    model, data = open_checkpoint(source), random_tokens(source)
    for act in (
        lambda: evaluate(model, model, data),
        lambda: quantize(model, gptq(INT8), data, tmp_path / "out"),
    ):
        refused(act, f"model.layers.0 leaves a tensor in {name}, which model.layers.1 holds too")
    assert not list(tmp_path.iterdir())


def test_what_a_block_leaves_for_itself_is_its_own(monkeypatch, saved):
    def forward(self, hidden_states, **kwargs):
        self.left = block(self, hidden_states, **kwargs)
        return self.left

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert_read(saved("llama", num_hidden_layers=3))


def test_what_is_taken_apart_is_put_together_again():
    x, y, inner = torch.ones(1), torch.zeros(2), SimpleNamespace(deep=Keyed(a=1))
    whole = {"one": [x, (y, None)], "two": Keyed(t=x, n=3), "three": inner}
    leaves, form = take_apart(whole)
    assert [id(t) for t in leaves if isinstance(t, torch.Tensor)] == [id(x), id(y), id(x)]
    again = put_together(leaves, form)
    assert (
        again["one"][0] is x
        and again["one"][1][0] is y
        and type(again["two"]) is Keyed
        and again["two"]["t"] is x
    )
    assert again["three"].deep == {"a": 1} and again["three"] is not inner
    assert take_apart(again)[1] == form
    again["three"].deep["a"], again["two"]["new"] = y, x
    take_over(whole, again)
    assert whole["three"] is inner and inner.deep["a"] is y and whole["two"]["new"] is x


def test_a_block_that_numbers_decide_is_read_and_no_graph_of_it_is_shown(saved, monkeypatch, capfd):
    def forward(self, hidden_states, **kwargs):
        chosen = (hidden_states[..., 0] > 0).nonzero()
        return block(self, hidden_states, **kwargs) + (1.0 if len(chosen) == 0 else 0.0)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    assert_read(saved("llama"))
    assert "torch.ops" not in capfd.readouterr().err
