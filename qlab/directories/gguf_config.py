"""Whether the keys of a GGUF file say all that a config does.

    config --told--> keys of the file --retold--> a config of the same class, which has to be equal

What no key says has the default of its class in the second one, which stands for what engines
compute with under the architecture's name.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qlab.codecs import gguf, gguf_keys
from qlab.codecs.gguf_models import MODELS
from qlab.directories.settings import same_setting, settings_of
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import CONFIG, read_json
from qlab.model.ties import FLAG

SCALED = "llama3"  # the scaling of rotary positions that is a tensor of factors
# Of a config: what changes no number that a trained model computes. Heads are tied by tensors. The
# length that a model had first counts where rotary positions are scaled, which say it themselves.
UNUSED = (
    "architectures",
    "attention_dropout",
    "embd_pdrop",
    "initializer_range",
    "max_window_layers",
    "original_max_position_embeddings",
    "output_router_logits",
    "pretraining_tp",
    "resid_pdrop",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "use_sliding_window",
    FLAG,
)


def unsaid(config: Any, file: Path) -> dict[str, tuple[Any, Any]]:
    """Setting -> its value in a config, and in the one that the keys of a file say, where the two
    differ."""
    reader, arch = gguf.opened(file)
    model = MODELS[config.model_type]
    prefix, fields = f"{arch}.", gguf.fields(reader)
    keys = {key.removeprefix(prefix): v for key, v in fields.items() if key.startswith(prefix)}
    known = config.to_dict()
    settings = gguf_keys.retold(file, model, keys, {*known, *gguf_keys.flat(known)})
    rotary = known["rope_parameters"]
    factors = frequency_factors(config)
    stored = next((t.data for t in reader.tensors if t.name == gguf.SCALED_ROTARY), None)
    if factors is not None and stored is not None and np.array_equal(stored, factors.numpy()):
        settings["rope_parameters"] = {**rotary, "rope_theta": keys["rope.freq_base"]}
    try:
        made = AutoConfig.for_model(config.model_type, **settings)
    except Exception as error:  # whatever its checks of values run into
        raise QlabError(
            f"transformers makes no config of the keys of {file} ({first_line(error)}); convert "
            "the directory again"
        ) from error
    return unlike(config, made)


def frequency_factors(config: Any) -> Tensor | None:
    """What rotary frequencies are divided by, one factor of each; None where no tensor says it."""
    rotary = config.rope_parameters
    if rotary.get("rope_type") != SCALED or not MODELS[config.model_type].scaled:
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[SCALED](config, torch.device("cpu"))
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return 1.0 / rotary["rope_theta"] ** exponents / scaled


def refuse_contradiction(path: Path, folder: Path) -> None:
    """Refuse the config of a folder, which a file holds, where the file's keys say another."""
    empty = Checkpoint(
        path=folder, raw=read_json(folder / CONFIG), stored={}, codec=None, quantized={}
    )
    if empty.raw.get("model_type") not in MODELS:
        raise QlabError(
            f"{path} holds a config of a {empty.raw.get('model_type')!r:.60}, of which qlab writes "
            "no such file; convert the directory again"
        )
    differing = unsaid(empty.config, path)
    if differing:
        key, (ours, theirs) = next(iter(differing.items()))
        raise QlabError(
            f"{path} holds a config with {key} {ours!r:.60} and says {theirs!r:.60} itself; it was "
            "changed after it was written: convert the directory again"
        )


def unlike(config: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Setting -> both values, where two configs of one class say different things of the model.
    Settings that the class does not know say nothing."""
    known = type(config)().to_dict().keys() - set(UNUSED)
    ours, theirs = (_told(each.to_dict(), known) for each in (config, other))
    pairs = {key: (ours.get(key), theirs.get(key)) for key in sorted(ours.keys() | theirs.keys())}
    return {key: pair for key, pair in pairs.items() if not same_setting(*pair)}


def _told(config: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The settings of a config that are known, with what is assumed of heads and of rotary
    positions."""
    flat = gguf_keys.flat(config)
    rotary = config["rope_parameters"]
    if rotary.get("rope_type") == "yarn":
        stated = {key: value for key, value in rotary.items() if value is not None}
        rotary = {**gguf_keys.YARN, **stated}
    # no window is a window of none
    window = config.get("sliding_window") or None
    own = {"head_dim": flat["head_dim"], "rope_parameters": rotary, "sliding_window": window}
    settings = settings_of({**config, **own})
    return {key: value for key, value in settings.items() if key.partition(".")[0] in known}
