"""Tiny random models of every family, built from configs: hidden 64, two to four blocks, vocabulary 128."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_DENSE = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_HEADS = {k: v for k, v in _DENSE.items() if k != "num_key_value_heads"}
_MLA = _HEADS | dict(num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
_SLIDING = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4)

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
    "gpt2": dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2),
}  # fmt: skip
MIXTURES: dict[str, dict] = {
    "mixtral": _DENSE | dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": _DENSE | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "deepseek_v3": _MLA | dict(num_hidden_layers=3, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=3, n_group=2,
                               topk_group=1, n_shared_experts=1, moe_intermediate_size=32),
}  # fmt: skip


def tiny(family: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random model of the family in fp32, with every weight (norms and biases too) moved off its initial value."""
    config = AutoConfig.for_model(family, **((FAMILIES | MIXTURES)[family] | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.ndim > 1 else 0.2))
    return model
