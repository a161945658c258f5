"""The list of blocks that a model is streamed through is found by what it is."""

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qlab.files.checkpoint import open_checkpoint
from qlab.model.skeleton import Skeleton


def test_a_model_that_calls_its_last_product_decoder_has_its_blocks(saved, monkeypatch):
    start = LlamaForCausalLM.__init__

    def named_decoder(self, config):
        start(self, config)
        self.decoder = nn.Linear(64, 128, bias=False)

    path = saved("llama", tie_word_embeddings=False)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", named_decoder)
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", PreTrainedModel.get_decoder)
    skeleton = Skeleton(open_checkpoint(path), torch.float32)
    assert isinstance(skeleton.model.get_decoder(), nn.Linear)
    assert list(skeleton.blocks) == ["model.layers.0", "model.layers.1"]
