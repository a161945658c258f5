"""Attention of one new token over a static cache on a CPU, in a form that the compiler turns into
two loops.

torch's fused attention repeats keys and values for every query head of a group when it is compiled,
and packs them again for each call: at one token that is most of a decode step. Here each key and
value is read once, in place.

    p = softmax(scale * q . k + mask),  y = sum p v,  over the kv heads h, the g query heads of
                                                      each, and the positions l
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qlab_one_token"
# Arguments that are already in the mask, or that concern outputs.
UNDERSTOOD = {"is_causal", "position_ids", "use_cache", "sliding_window", "output_attentions"}


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model on the CPU that uses torch's attention use this one for single tokens; others
    keep theirs."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """q [b, h * g, 1, d], k and v [b, h, l, d], mask [b, 1, 1, l] of bool or to be added -> [b, 1,
    h * g, d].

    Everything that is not one token without dropout goes to torch's attention.
    """
    others = {name for name, argument in more.items() if argument is not None} - UNDERSTOOD
    if query.shape[2] != 1 or key.shape[2] == 1 or dropout or others:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    b, heads, _, d = query.shape
    scale = 1 / math.sqrt(d) if scaling is None else scaling
    q_bhgd = (query.reshape(b, key.shape[1], -1, d).float() * scale).contiguous()
    # `as_strided` needs a real buffer, so Inductor computes q once here instead of redoing its
    # rotary embedding for every cached position.
    q_bhgd = q_bhgd.as_strided(q_bhgd.shape, q_bhgd.stride())
    s_bhgl = (q_bhgd[..., None, :] * key[:, :, None].float()).sum(-1)
    if attention_mask is not None:
        mask = attention_mask[:, :, :, : key.shape[2]]
        s_bhgl = s_bhgl.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s_bhgl + mask
    p_bhgl = s_bhgl.softmax(-1)
    y_bhgd = (p_bhgl[..., None] * value[:, :, None].float()).sum(-2)
    return y_bhgd.to(query.dtype).reshape(b, 1, heads, value.shape[-1]), None


# Registered by importing this module, so that a model that was pickled finds it in another process.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
