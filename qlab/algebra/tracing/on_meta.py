"""A segment on the meta device, where operations cost least: what it calls and what comes of which
shape, and no values."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

META = torch.device("meta")


def on_meta(module: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the module and its inputs on the meta device."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.to(META), requires_grad=False) for p in module.parameters()
    }
    memo |= {id(b): b.to(META) for b in module.buffers()}
    return copy.deepcopy(module, memo), tuple(
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META) for t in tensors
    )


def called_on_meta(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What a function of torch gives on the meta device, whatever device it is told."""
    args = tuple(META if isinstance(x, torch.device) else x for x in args)
    named = {name: META if isinstance(x, torch.device) else x for name, x in kwargs.items()}
    if func in _device_constructors() and named.get("device") is None:
        named["device"] = META
    out = func(*args, **named)
    if isinstance(out, torch.device):
        return torch.device("cpu")  # for code that chooses by it
    return list(out) if isinstance(out, Iterator) else out


class OnMeta(TorchFunctionMode):
    """Runs every function on the meta device. note: is told what a tensor is made of where it is
    made of values alone."""

    def __init__(self, note: Callable[[str, Any], None]):
        super().__init__()
        self.note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        if func in _device_constructors():
            self.note(str(func), (args, kwargs or {}))
        return called_on_meta(func, args, kwargs or {})
