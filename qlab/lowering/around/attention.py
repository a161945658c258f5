"""Attention of one new token over a cache on a CPU.

    p = softmax(scale * q . k + mask),  y = sum p v,  over the kv heads h, the g query heads of
                                                      each, and the positions l

torch's fused attention repeats keys and values for every query head of a group, which at one token
is most of a step. Here each key and value is read once, in place: by a kernel, or where there is
none in a form that the compiler turns into two loops. The bits of a row do not depend on positions
behind its last one, nor on rows beside it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qlab.errors import warn

NAME = "qlab_one_token"
# Arguments that are already in the mask, or that concern outputs.
UNDERSTOOD = {"is_causal", "position_ids", "use_cache", "sliding_window", "output_attentions"}


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let a model on the CPU that uses torch's attention use this one for single tokens; others
    keep theirs."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
        if why_not() is not None:
            warn(f"attention of single tokens is slow: {why_not()}")


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
    q_bhgd = query.reshape(b, key.shape[1], -1, d)
    mask = None if attention_mask is None else attention_mask[:, :, :, : key.shape[2]]
    y_bhgd = _attend(q_bhgd, key, value, mask, scale)
    return y_bhgd.to(query.dtype).reshape(b, 1, heads, value.shape[-1]), None


def _attend(
    q_bhgd: Tensor, k_bhld: Tensor, v_bhld: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    q_bhgd = (q_bhgd.float() * scale).contiguous()
    if is_plain(q_bhgd, k_bhld, v_bhld) and why_not() is None:
        from qlab_kernels.one_token import attend, takes

        if takes(k_bhld, v_bhld, mask):
            return attend(q_bhgd, k_bhld, v_bhld, mask)
    return in_torch(q_bhgd, k_bhld, v_bhld, mask)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are numbers, of which nobody wants a gradient, nor a program that runs where
    the kernels of this machine are not."""
    is_learning = any(t.requires_grad and torch.is_grad_enabled() for t in tensors)
    return not is_learning and not torch.compiler.is_exporting() and not _is_recorded()


def _is_recorded() -> bool:
    """Whether this thread records what it runs. Dynamo does not ask: its graph would look at the
    answer whenever it is called, which torch then gives for all threads."""
    return not torch.compiler.is_dynamo_compiling() and torch._C._len_torch_dispatch_stack() > 0


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Why there is no kernel here; None where there is one."""
    from qlab_kernels.one_token import why_not

    return why_not()


def in_torch(q_bhgd: Tensor, k_bhld: Tensor, v_bhld: Tensor, mask: Tensor | None) -> Tensor:
    """y [b, h, g, d] in fp32, of q that is scaled already. A row that reads no position is NaN."""
    # `as_strided` needs a real buffer, so Inductor computes q once here instead of redoing its
    # rotary embedding for every cached position.
    q_bhgd = q_bhgd.as_strided(q_bhgd.shape, q_bhgd.stride())
    s_bhgl = (q_bhgd[..., None, :] * k_bhld[:, :, None].float()).sum(-1)
    if mask is not None:
        s_bhgl = s_bhgl.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s_bhgl + mask
    p_bhgl = s_bhgl.softmax(-1)
    return (p_bhgl[..., None] * v_bhld[:, :, None].float()).sum(-2)


# Registered by importing this module, so that a model that was pickled finds it in another process.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
