"""The dequantized weight of a lowered linear, as it is shown to code that knows nn.Linear: it may
be read, and not be changed."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError

REFUSED = (
    "a quantized weight is held as codes and cannot be assigned or changed, so nothing can be "
    "merged into it; keep adapters beside it, or change the unquantized model and quantize that"
)
UPDATES = {"__setitem__", "__set__", "__delete__"}  # beside names that end in one underscore


class ReadOnly(Tensor):
    """A tensor that no caller owns. Functions that would change it or a view of it are refused; all
    others compute."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable,
        types: Iterable[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        written: Iterable[Any] = (kwargs.get("out"),)
        if name in UPDATES or (name.endswith("_") and not name.endswith("__")):
            written = args[:1] or kwargs.values()  # torch.nn.init names its arguments
        # grad = None and requires_grad = False change nothing.
        harmless = name == "__set__" and (args[1] is None or args[1] is False)
        if any(isinstance(tensor, cls) for tensor in written) and not harmless:
            raise QlabError(REFUSED)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result.as_subclass(cls) if _views(result, args) else result


def _views(result: Any, args: tuple) -> bool:
    """Whether the result lies in the memory of a read-only argument."""
    if type(result) is not Tensor or result.layout != torch.strided:
        return False
    readonly = [arg for arg in args if isinstance(arg, ReadOnly)]
    return any(result.untyped_storage()._cdata == arg.untyped_storage()._cdata for arg in readonly)
