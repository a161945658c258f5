"""The keys of a GGUF file that describe its model. Each key `<architecture>.<key>` is read, changes
no logit, or is refused.

READ      keys whose values the config that is made of the file must have. A key that a file leaves
          out has the value that engines assume: as many key heads as query heads, heads that share
          the width evenly and are rotated whole, a rotary base of 10000.
NEUTRAL   keys with which some engine computes, and the values that change nothing.
NO_LOGIT  keys with which no engine computes logits.

`told` is the inverse: the keys that say a config, with those of `MORE` that engines read of the
architecture; `retold` makes settings of them again.

Rotary scaling is `rope.scaling.*`, or the older `rope.scale_linear`: linear and yarn are read.
Source: llama.cpp, gguf 0.19.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlab.codecs.gguf_models import WINDOW, Model
from qlab.errors import QlabError

Settings = dict[str, Any]
# key -> its name in a config
READ = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    WINDOW: "sliding_window",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
TOLD = {key: name for key, name in READ.items() if key != WINDOW}
SLIDING_THETA = "sliding_rope_theta"  # that of blocks with a window, where it is another
# key that engines read of some architectures -> its names in configs
MORE: Mapping[str, tuple[str, ...]] = {
    WINDOW: ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.freq_base_swa": (SLIDING_THETA,),
}
# keys that engines read as floats, whatever a config.json writes
REAL = {
    "attention.layer_norm_rms_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "rope.freq_base",
    "rope.freq_base_swa",
}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
}
# use_parallel_residual: Qwen1.5's own files say true, and its residuals are not parallel; engines
# read the key of other architectures only.
NO_LOGIT = {"pooling_type", "rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual"}
TYPE, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
LENGTH, FAST, SLOW = (
    f"rope.scaling.{key}" for key in ("original_context_length", "yarn_beta_fast", "yarn_beta_slow")
)
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # what engines and transformers assume
ROTARY = {TYPE, FACTOR, OLD_FACTOR, LENGTH, FAST, SLOW}
NEEDED = ("block_count", "context_length", "embedding_length", "attention.head_count")


@dataclass(frozen=True)
class Said:
    """What a GGUF file says of its model.

    values: (key, its name in a config, its value) of all keys that are read, with the values that
    engines assume for missing ones. head_size: channels of a query. rotary: the scaling of rotary
    positions in the terms of transformers' `rope_parameters`; empty where there is none.
    """

    values: tuple[tuple[str, str, Any], ...]
    head_size: int
    rotary: Mapping[str, Any]


def said(path: Path, arch: str, fields: Mapping[str, Any]) -> Said:
    """What the keys of a file mean. fields: all of its keys and values. Refuses keys and values
    that a config made of the file does not hold."""
    prefix = f"{arch}."
    keys = {
        key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)
    }
    for key, value in keys.items():
        _check(path, f"{arch}.{key}", key, value)
    missing = [key for key in NEEDED if key not in keys]
    if missing:
        raise QlabError(f"{path} does not say its {arch}.{missing[0]}; download it again")
    complete = _with_assumed(keys)
    values = tuple((f"{arch}.{key}", READ[key], value) for key, value in complete.items())
    return Said(values, complete["attention.key_length"], _rotary(path, arch, keys))


def _check(path: Path, name: str, key: str, value: Any) -> None:
    """Refuse a key that qlab does not know, and a value that no config holds."""
    if key in NEUTRAL and value not in NEUTRAL[key]:
        raise QlabError(
            f"{path} says {name} {value!r:.40}, which no config made of the file holds; "
            "quantize the model from its safetensors files"
        )
    if key not in READ.keys() | NEUTRAL.keys() | NO_LOGIT | ROTARY:
        raise QlabError(
            f"{path} says {name} {value!r:.40}, a key that qlab does not know and that may change "
            "the model; quantize it from its safetensors files"
        )
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in READ.keys() | ROTARY - {TYPE} and not number:
        raise QlabError(
            f"{path} says {name} {value!r:.40}, where qlab reads one number for all blocks; "
            "quantize the model from its safetensors files"
        )


def _with_assumed(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are read, with the values that engines assume for missing ones."""
    present = {key: keys[key] for key in READ if key in keys}
    heads = keys["attention.head_count"]
    size = present.setdefault("attention.key_length", keys["embedding_length"] // max(heads, 1))
    assumed = {
        "attention.head_count_kv": heads,
        "attention.value_length": size,
        "attention.sliding_window": 0,
        "rope.dimension_count": size,
        "rope.freq_base": 10000.0,
    }
    return assumed | present


def _rotary(path: Path, arch: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """The scaling of rotary positions. A factor of 0 means none; a factor without a type is
    linear."""
    kind = keys.get(TYPE, "linear")
    factor = float(keys.get(FACTOR, keys.get(OLD_FACTOR, 0))) or 1.0
    if kind not in ("none", "linear", "yarn") or factor < 0:
        raise QlabError(
            f"{path} says {arch}.{TYPE} {kind!r:.40} with a factor of {factor:g}; qlab reads "
            "none, linear and yarn with positive ones: quantize the model from its safetensors "
            "files"
        )
    if kind == "none" or factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": keys.get(LENGTH, keys["context_length"]),
        "beta_fast": float(keys.get(FAST, YARN["beta_fast"])),
        "beta_slow": float(keys.get(SLOW, YARN["beta_slow"])),
    }


def told(model: Model, settings: Mapping[str, Any]) -> dict[str, int | float | str]:
    """The keys of a file without the architecture's name in front, and their values. settings: of a
    config (`flat`); other scalings than linear and yarn have no keys."""
    keys = {key: settings[name] for key, name in TOLD.items()}
    for key in model.keys:
        value = settings.get(_name_of(key, settings))
        if value is not None:
            keys[key] = value
    keys |= {key: float(keys[key]) for key in REAL & keys.keys()}
    kind = settings.get("rope_type")
    if kind not in ("linear", "yarn"):
        return keys
    keys |= {TYPE: kind, FACTOR: float(settings["factor"])}
    if kind == "yarn":
        length = settings.get("original_max_position_embeddings")
        keys |= {
            LENGTH: length or settings["max_position_embeddings"],
            FAST: float(settings.get("beta_fast") or YARN["beta_fast"]),
            SLOW: float(settings.get("beta_slow") or YARN["beta_slow"]),
        }
    return keys


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config and of its rotary positions in one mapping, with the size of heads
    that engines understand where none is stated."""
    rotary = config["rope_parameters"]
    own = {**config, **rotary.get("full_attention", rotary)}
    if "sliding_attention" in rotary:
        own[SLIDING_THETA] = rotary["sliding_attention"]["rope_theta"]
    width = own["hidden_size"] // own["num_attention_heads"]
    return {**own, "head_dim": own.get("head_dim") or width}


def retold(path: Path, model: Model, keys: Mapping[str, Any], known: Collection[str]) -> Settings:
    """The settings that keys of `told` say of a config that knows settings by these names: what is
    not among them is the class's default. Heads scale their scores by their own size."""
    missing = [key for key in TOLD if key not in keys]
    if missing:
        raise QlabError(f"{path} does not say its {model.arch}.{missing[0]}; convert it again")
    said = {name: keys[key] for key, name in TOLD.items()}
    said |= {_name_of(key, known): keys[key] for key in model.keys if key in keys}
    sliding_theta = said.pop(SLIDING_THETA, None)
    said = {"sliding_window": None, "query_pre_attn_scalar": said["head_dim"], **said}
    rotary = {
        "rope_type": "default",
        "rope_theta": keys["rope.freq_base"],
        **_rotary(path, model.arch, keys),
    }
    if sliding_theta is not None:
        sliding = {"rope_type": "default", "rope_theta": sliding_theta}
        rotary = {"full_attention": rotary, "sliding_attention": sliding}
    named = {name: value for name, value in said.items() if name in known}
    return {**named, **model.assumed, "rope_parameters": rotary}


def _name_of(key: str, settings: Collection[str]) -> str:
    """The first name of a key of `MORE` that the settings have."""
    return next((name for name in MORE[key] if name in settings), MORE[key][0])
