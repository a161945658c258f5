"""What a GGUF file of each architecture is to engines where no key and no tensor of it says so.

Only models whose logits an engine was measured to agree on stand here
(tests/directories/test_gguf_families.py). Source: llama.cpp, gguf 0.19.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Model:
    """arch: general.architecture. interleaved: whether the rows of q and k have the two halves of a
    rotation interleaved. adds_one: whether a norm's weight w is stored as 1 + w. keys: those that
    engines read beside `gguf_keys.READ`. assumed: settings of a config that engines take for
    granted, where the default of the config's class is another. scaled: whether engines read
    factors of rotary frequencies.
    """

    arch: str
    interleaved: bool = False
    adds_one: bool = False
    keys: tuple[str, ...] = ()
    assumed: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = False

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A dense tensor of the model as the file has it, but for the order of its rows."""
        return tensor.float() + 1 if self._is_shifted(name) else tensor

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of `stored`, but for bits of w below the last one of 1 + w in float32, in
        which the model computes the sum too."""
        return tensor - 1 if self._is_shifted(name) else tensor

    def _is_shifted(self, name: str) -> bool:
        return self.adds_one and name.endswith("norm.weight")


ROUTED = ("expert_count", "expert_used_count")
WINDOW = "attention.sliding_window"
MODELS: Mapping[str, Model] = {
    "llama": Model("llama", interleaved=True, scaled=True),
    "mistral": Model("llama", interleaved=True),
    "mixtral": Model("llama", interleaved=True, keys=ROUTED),
    "qwen2": Model("qwen2"),
    "qwen3": Model("qwen3"),
    "qwen3_moe": Model(
        "qwen3moe",
        keys=(*ROUTED, "expert_feed_forward_length"),
        assumed={"norm_topk_prob": True},
    ),
    "olmo2": Model("olmo2"),
    "phi3": Model("phi3"),
    "gemma2": Model(
        "gemma2",
        adds_one=True,
        keys=(WINDOW, "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3_text": Model("gemma3", adds_one=True, keys=(WINDOW, "rope.freq_base_swa")),
}
# The ones whose files by others qlab reads: transformers makes a config of their keys.
FOREIGN = ("llama", "qwen2", "qwen3")


def written_as(arch: str) -> Model:
    """The first model of an architecture; all of them order and shift weights alike."""
    return next(model for model in MODELS.values() if model.arch == arch)
