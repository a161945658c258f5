"""Masks of rows that are at positions of their own: row r reads its own tokens alone, whatever is
beside it. The attention stays the model's.

    masked[r, q, l] = rule(start[r] + q, l)      rule: transformers' own, for windows and chunks too
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from qlab.lowering.around.attended import keep_written_out, written_out
from qlab.lowering.around.attention import use_grouped_attention

SUFFIX = "_of_rows"
EAGER = "eager"


def use_row_masks(model: PreTrainedModel) -> bool:
    """Let a model make masks for rows at positions of their own. False where it makes its masks in
    code of its own, so that rows have to run one at a time."""
    if model.device.type == "cpu":
        # its sums over positions do not change with what stands behind the last one
        use_grouped_attention(model)
    implementation = str(model.config.get_text_config()._attn_implementation)
    if implementation.endswith(SUFFIX):
        return True
    keep_written_out(model)
    name = implementation + SUFFIX
    is_eager = implementation.endswith(EAGER)
    plain = written_out if implementation == EAGER else AttentionInterface()[implementation]
    AttentionInterface.register(name, plain)
    AttentionMaskInterface.register(name, _added if is_eager else row_mask)
    model.set_attn_implementation(name)
    return model.config.get_text_config()._attn_implementation == name


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    device: Any = "cpu",
    **_: Any,
) -> Tensor:
    """bool [b, 1, q, l]: what the rule says of query q_offset[b] + q and key l, both counted in the
    tokens of their row."""
    assert mask_function is not None
    b = torch.arange(batch_size, device=device)[:, None, None, None]
    q = torch.arange(q_length, device=device)[None, None, :, None]
    q = q + (q_offset.reshape(-1, 1, 1, 1) if isinstance(q_offset, Tensor) else q_offset)
    keys = torch.arange(kv_length, device=device)[None, None, None, :] + kv_offset
    read = mask_function(b, torch.zeros_like(b), q, keys)
    return read.expand(batch_size, 1, q_length, kv_length)


def _added(*args: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Tensor:
    """The same as numbers to be added: 0 where a key is read, else the least of the dtype."""
    read = row_mask(*args, **more)
    least = torch.finfo(dtype).min
    return torch.zeros(read.shape, dtype=dtype, device=read.device).masked_fill(~read, least)
