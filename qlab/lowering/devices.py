"""The devices of lowered models: which have kernels, and what they are called in figures and in
keys of the config cache."""

import platform
import re
from pathlib import Path

import torch

from qlab.errors import QlabError
from qlab.model.device import name_of

# dtypes of activations that some kernel takes
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def device_named(device: torch.device | str) -> torch.device:
    """A device that has kernels; refuses others by name."""
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise QlabError(f"{device!r} is no device; lower to 'cpu' or 'cuda'") from error
    if where.type not in ("cpu", "cuda"):
        raise QlabError(f"there are no int4 kernels for {where.type}; lower to 'cpu' or 'cuda'")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count() > 0:
        raise QlabError(
            f"there is no {where} here; torch finds {torch.cuda.device_count()} of them, counted "
            "from 0"
        )
    if where.type == "cuda" and not torch.cuda.is_available():
        raise QlabError(
            "torch finds no CUDA device here; lower to 'cpu', or install a CUDA build of torch "
            "on a machine with a GPU"
        )
    return where


def device_label(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device.type == "cuda":
        return name_of(device)
    model = re.search(r"model name\s*: (.+)", file_text("/proc/cpuinfo"))
    return f"{model[1] if model else platform.machine()}, {torch.get_num_threads()} threads"


def file_text(path: str) -> str:
    """What a file of the system says, or nothing where it cannot be read."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
