"""Tiny random models of every family, built from configs: hidden 64, two to four blocks, vocabulary
128."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

_DENSE = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_HEADS = {k: v for k, v in _DENSE.items() if k != "num_key_value_heads"}
_MLA = _HEADS | dict(
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)
_SLIDING = dict(
    sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4
)

FAMILIES: dict[str, dict] = {
    "llama": _DENSE,
    "mistral": _DENSE,
    "qwen2": _DENSE,
    "qwen3": _DENSE | dict(head_dim=16),
    "gemma2": _DENSE | _SLIDING | dict(head_dim=16),
    "gemma3_text": _DENSE | _SLIDING | dict(head_dim=16),
    "phi3": _DENSE,
    "olmo2": _DENSE,
    "opt": _HEADS | dict(ffn_dim=128, word_embed_proj_dim=64),
    "gpt_neox": _HEADS,
    "gpt2": dict(
        vocab_size=128,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=128,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
MIXTURES: dict[str, dict] = {
    "mixtral": _DENSE | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _DENSE
    | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "deepseek_v3": _MLA
    | dict(
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        moe_intermediate_size=32,
    ),
}
# What the other families lack: weights multiplied transposed, rotary pairs of neighbours, filters
# over time.
OTHERS: dict[str, dict] = {
    "falcon": dict(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "glm": _DENSE | dict(head_dim=16),
    "lfm2": _DENSE | dict(layer_types=["full_attention", "conv"], block_auto_adjust_ff_dim=False),
}
# Families that write out what others call: attentions with windows and heads in one axis, or with
# scores beside those of sinks; norms that subtract a mean.
WRITTEN_OUT: dict[str, dict] = {
    "cohere": _DENSE,
    "bloom": dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, bos_token_id=1),
    "xglm": dict(
        vocab_size=128,
        d_model=64,
        ffn_dim=128,
        num_layers=2,
        attention_heads=4,
        max_position_embeddings=128,
    ),
    "gpt_oss": _DENSE
    | dict(
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
# Families whose blocks hand on keys and values, or use weights in ways that qlab does not read.
UNLIKE: dict[str, dict] = {
    "gemma4_text": _DENSE
    | dict(
        head_dim=16,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=8,
    ),
    "granitemoe": _DENSE
    | dict(
        num_local_experts=4, num_experts_per_tok=2
    ),  # experts of other names in the files, as they lie
    "olmo_hybrid": _HEADS
    | dict(
        num_key_value_heads=4,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),  # filters in parts
    "llama4_text": _DENSE
    | dict(
        head_dim=16,
        intermediate_size_mlp=128,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=16,
    ),
}
# Families with recurrent states beside attention, or in its place.
RECURRENT: dict[str, dict] = {
    "jamba": _DENSE
    | dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        num_experts=2,
        num_experts_per_tok=1,
        use_mamba_kernels=False,
        mamba_d_state=8,
    ),
    "mamba2": dict(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon_h1": _DENSE
    | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, head_dim=16),
    "qwen3_next": _DENSE
    | dict(
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
}
_ROPE = dict(
    rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    bos_token_id=1,
    eos_token_id=2,
)
_TOKENS = dict(
    image_token_id=127, video_token_id=126, vision_start_token_id=125, vision_end_token_id=124
)
# Decoders of the dense families behind a small vision tower; token 127 stands for an image's patch.
VISION: dict[str, dict] = {
    "llava": dict(
        text_config=dict(model_type="llama", **_DENSE),
        image_token_index=127,
        vision_config=dict(
            model_type="clip_vision_model",
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            projection_dim=32,
        ),
    ),
    "qwen2_vl": _TOKENS
    | dict(
        text_config=_DENSE | _ROPE,
        vision_config=dict(
            depth=2,
            embed_dim=32,
            hidden_size=64,
            num_heads=2,
            mlp_ratio=2,
            patch_size=14,
            in_channels=3,
        ),
    ),
    "qwen2_5_vl": _TOKENS
    | dict(
        text_config=_DENSE | _ROPE,
        vision_config=dict(
            depth=2,
            hidden_size=32,
            out_hidden_size=64,
            intermediate_size=64,
            num_heads=2,
            patch_size=14,
            fullatt_block_indexes=[1],
            window_size=56,
        ),
    ),
}

# The release of transformers that brought a family, where it was not 5.0.
ALL = FAMILIES | MIXTURES | OTHERS | WRITTEN_OUT | UNLIKE | RECURRENT | VISION
SINCE = {"olmo_hybrid": "5.3", "gemma4_text": "5.5"}


def tiny(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of the family in fp32, with every weight (norms and biases too) moved off its
    initial value.

    A test of a family that the installed transformers is too old for is skipped.
    """
    if Version(transformers.__version__) < Version(SINCE.get(family, "5.0")):
        pytest.skip(
            f"{family} came with transformers {SINCE[family]}, and {transformers.__version__} is "
            "installed"
        )
    config = AutoConfig.for_model(
        family,
        **(ALL[family] | overrides),
    )
    torch.manual_seed(seed)
    maker = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    model = maker.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim > 1 else 0.2))
    return model
