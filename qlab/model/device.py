"""The device on which a model is worked on."""

import torch

from qlab.errors import QlabError, first_line


def name_of(device: torch.device) -> str:
    """The kind of the device, which decides how sums are rounded: 'cpu', or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def usable(device: torch.device | str) -> torch.device:
    """The device of this name; refuses what torch cannot compute on here."""
    try:
        where = torch.device(device)
        torch.ones(1, dtype=torch.float32, device=where).item()
    except Exception as error:  # unknown to torch, left out of its build, or not in this machine
        reason = first_line(error).split(". ")[0]
        raise QlabError(
            f"the device {str(device)!r} cannot be used here ({reason}); choose 'cpu', or one "
            "that torch finds"
        ) from error
    return where
