"""Sizes that decide which operations a segment runs.

A loop over tokens, or over chunks of them, is unrolled in a program, a branch on a length is taken
once, and symbols can hardly follow the sizes of what is filled up to whole chunks: such a program
is for the traced size alone, and its trace does not always say so. A size that is fixed beforehand
is a plain number while a segment is traced, and numbers take far less time there than the terms of
a symbol.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qlab.algebra.graph import tensors_of
from qlab.algebra.tracing.on_meta import called_on_meta, on_meta
from qlab.algebra.tracing.on_tensors import OnTensors, without_values

# Sizes that no chunk length divides, and of which chunks of up to 1,024 make different numbers.
FEW, MORE, MANY = (7, 18, 1033)
# Functions of torch, each with the shapes of its results.
Called = list[tuple[Any, tuple[torch.Size, ...]]]


def deciding_sizes(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], meta: bool = True
) -> frozenset[int]:
    """The sizes of a segment's inputs, beside those of their last axes, that decide which
    operations it runs, or how large in steps what these give is: a length that is filled up to
    whole chunks.

    None of them is a size with which alone the segment runs, as that of its channels. Where there
    are as many tokens as channels, the last axes of hidden states, which have three, stay as they
    are. meta: whether the segment runs on the meta device, where that costs least.
    """
    floats = [t for t in tensors_of(args, kwargs) if t.is_floating_point()]
    sizes = sorted({n for t in floats for n in t.shape[:-1] if n > 1})
    small = {n: FEW + i for i, n in enumerate(sizes)}
    channels = frozenset(t.shape[-1] for t in floats if t.ndim == 3).intersection(sizes)
    segment = module, args, kwargs, meta
    kept: frozenset[int] = frozenset()
    if _called(small, None, kept, *segment) is None:
        kept = channels
        if not channels or _called(small, None, kept, *segment) is None:
            small = {}
    return frozenset(n for i, n in enumerate(sizes) if _decides(n, i, small, kept, *segment))


def _decides(n: int, i: int, small: Mapping[int, int], *segment: Any) -> bool:
    """Whether other functions run with few instead of this size than with many, or their results
    grow in steps. small: the sizes that are few meanwhile, so that other loops are short."""
    few = _called({**small, n: FEW + i}, None, *segment)
    if few is None:
        return False
    many = _called({**small, n: MANY + i}, few, *segment)
    if many is None:
        return False
    if [func for func, _ in many] != [func for func, _ in few]:
        return True
    more = _called({**small, n: MORE + i}, few, *segment)
    return more is not None and not all(map(_even, few, more, many))


def _even(few: tuple, more: tuple, many: tuple) -> bool:
    """Whether what a function gives grows evenly with a size."""
    sizes = ([n for shape in shapes for n in shape] for _, shapes in (few, more, many))
    return all(
        (b - a) * (MANY - FEW) == (c - a) * (MORE - FEW) for a, b, c in zip(*sizes, strict=False)
    )


def _called(
    instead: Mapping[int, int],
    others: Called | None,
    kept: frozenset[int],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    meta: bool,
) -> Called | None:
    """What a segment calls with other sizes than those of its inputs, as far as `others` are the
    same; None where it does not run. kept: sizes that are those of channels, too."""
    noted = _Noted(others, called_on_meta if meta else _called_plainly)
    try:
        copied, tensors = (on_meta if meta else without_values)(
            module, tuple(_resized(t, instead, kept) for t in tensors_of(args, kwargs))
        )
        with torch.no_grad(), detect_fake_mode(tensors) or nullcontext(), noted:
            OnTensors(copied, args, kwargs)(*tensors)
    except _Differs:
        pass
    except Exception:  # whatever the segment's own forward raises
        return None
    return noted.called


def _called_plainly(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _resized(t: Tensor, instead: Mapping[int, int], kept: frozenset[int]) -> Tensor:
    shape = [instead.get(n, n) for n in t.shape]
    if t.ndim == 3 and t.shape[-1] in kept:
        shape[-1] = t.shape[-1]
    return torch.empty(shape, dtype=t.dtype, device="meta")


class _Differs(Exception):
    """Another function than before, after which a loop need not be run to its end."""


class _Noted(TorchFunctionMode):
    """Takes down the functions of torch that a segment calls, until they differ from others. What
    these do inside, as copies for a layout, is no choice of the segment's."""

    def __init__(self, others: Called | None, call: Callable[..., Any]):
        super().__init__()
        self.others, self.call = others, call
        self.called: Called = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        at = len(self.called)
        if self.others is not None and (at == len(self.others) or self.others[at][0] != func):
            self.called.append((func, ()))
            raise _Differs
        out = self.call(func, args, kwargs or {})
        self.called.append(
            (func, tuple(t.shape for t in pytree.tree_leaves(out) if isinstance(t, Tensor)))
        )
        return out
