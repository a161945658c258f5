"""How much memory the cache of an engine takes, and how many tokens a request."""

import psutil
import torch
from transformers import PreTrainedModel

from qlab.errors import QlabError

SHARE = 0.25  # of the memory that is free, which the cache may take
LONGEST = 4096  # tokens of a request, where a model takes more and nobody asked for it


def free_bytes(device: torch.device) -> int:
    """The memory that is free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def longest(model: PreTrainedModel, asked: int | None) -> int:
    """How many tokens a request may have of which nobody, or somebody, said how many."""
    has = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is None:
        return min(has or LONGEST, LONGEST)
    if asked < 1 or (has and asked > has):
        raise QlabError(f"max_length is {asked}; the model takes from 1 to {has} tokens")
    return asked
