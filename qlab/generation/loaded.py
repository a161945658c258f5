"""The model of a directory as a pipeline runs it, and what its directory says of sampling."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from qlab.algebra.spec import Spec
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.generation.parallel import Group
from qlab.generation.sampling import Sampling
from qlab.lowering import lower
from qlab.lowering.around.coded_head import code_head
from qlab.lowering.devices import device_named
from qlab.lowering.part import lower_part
from qlab.lowering.weights.setting import Activations
from qlab.model.whole import load_whole


def loaded(
    checkpoint: Checkpoint,
    device: Any,
    dtype: torch.dtype,
    activations: Activations | None,
    head: Spec | None,
    group: Group | None,
    rounds: bool,
) -> PreTrainedModel:
    """The model of a directory, lowered where it is quantized; a rank's part of it in a group.
    rounds: whether its cache will be rounded, which the directory does not say."""
    is_coded = checkpoint.quantized or checkpoint.extras
    if activations is not None and not is_coded:
        raise QlabError(
            f"activations={activations!r} is for quantized models, and {checkpoint.path} is none; "
            "leave it away"
        )
    how: Any = {"activations": activations, "head": head}
    if group is not None:
        return lower_part(checkpoint, group.device, dtype, ranks=group, rounds=rounds, **how)
    if is_coded:
        return lower(checkpoint, device, dtype, **how)
    model: Any = load_whole(checkpoint, dtype)
    model = model.to(device_named(device)).eval()
    if head is not None:
        code_head(model, head, dtype, activations)
    return model


def defaults_of(config: GenerationConfig | None, tokenizer: Any) -> Sampling:
    """What the directory's generation_config.json asks for: its sampling where it samples, else
    the likeliest tokens; and the tokens that end a text."""
    ends = getattr(config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else [*(ends or ())]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    if config is None or not config.do_sample:
        return Sampling(temperature=0, stop_ids=tuple(ends))
    given = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    known = {name: value for name, value in given.items() if value is not None}
    return Sampling(stop_ids=tuple(ends), **known)
