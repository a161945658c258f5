"""Sizes that decide which operations a segment runs.

A loop over tokens, or over chunks of them, is unrolled in a program, and a branch on a length is taken
once: such a program is for the traced size alone, and its trace does not always say so. A size that
is fixed beforehand is a plain number while a segment is traced, and numbers take far less time there
than the terms of a symbol.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode

from qlab.graph import tensors_of
from qlab.on_tensors import OnTensors, without_values

FEW, MANY = 8, 1032  # of which chunks of up to 1,024 make different numbers


def deciding_sizes(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> frozenset[int]:
    """The sizes of a segment's inputs, beside those of their last axes, that decide which operations it runs.

    None of them is a size with which alone the segment runs, as that of its channels.
    """
    floats = [t for t in tensors_of(args, kwargs) if t.is_floating_point()]
    sizes = sorted({n for t in floats for n in t.shape[:-1] if n > 1})
    together = _decide(sizes, sizes, module, args, kwargs)
    if together is False:
        return frozenset()
    return frozenset(n for n in sizes if _decide([n], sizes if together else [n], module, args, kwargs))


def _decide(sizes: Sequence[int], small: Sequence[int], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool | None:
    """Whether other functions run with few instead of these sizes than with many; None where the segment runs with neither.

    small: the sizes that are few meanwhile, so that other loops are short.
    """
    few, fewer = _Noted(), {n: FEW + i for i, n in enumerate(small)}
    if not _runs(fewer, few, module, args, kwargs):
        return None
    many = _Compared(few.called)
    ran = _runs(fewer | {n: MANY + i for i, n in enumerate(sizes)}, many, module, args, kwargs)
    if many.differ:
        return True
    return many.compared < len(few.called) if ran else None


def _runs(instead: Mapping[int, int], mode: TorchFunctionMode, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a segment runs to its end, on shapes alone, with other sizes than those of its inputs."""
    others = tuple(_resized(t, instead) for t in tensors_of(args, kwargs))
    try:
        copied, fakes = without_values(module, others)
        shapes_alone = detect_fake_mode(fakes)
        assert shapes_alone is not None  # every segment is called with hidden states
        with torch.no_grad(), shapes_alone, mode:
            OnTensors(copied, args, kwargs)(*fakes)
    except Exception:  # whatever the segment's own forward raises
        return False
    return True


def _resized(t: Tensor, instead: Mapping[int, int]) -> Tensor:
    return torch.empty([instead.get(n, n) for n in t.shape], dtype=t.dtype, device="meta")


class _Noted(TorchFunctionMode):
    """Takes down the functions of torch that a segment calls. What these do inside, as copies for a layout, is no choice of the
    segment's."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.called.append(func)
        return func(*args, **(kwargs or {}))


class _Compared(TorchFunctionMode):
    """Compares the functions that a segment calls with others, and stops where they differ: a loop is not run to its end."""

    def __init__(self, others: Sequence[Any]):
        super().__init__()
        self.others, self.compared, self.differ = others, 0, False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if self.compared == len(self.others) or self.others[self.compared] != func:
            self.differ = True
            raise ValueError("another function than before")
        self.compared += 1
        return func(*args, **(kwargs or {}))
