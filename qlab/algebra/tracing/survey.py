"""What a segment calls of torch, in order: products with weights, and the long stretches between
them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.algebra.experts import EXPERT_OPS
from qlab.algebra.graph import SAME_VALUES, aten, is_matrix, tensors_of
from qlab.algebra.tracing.kept import Path, kept, tensors_held
from qlab.algebra.tracing.on_meta import called_on_meta, on_meta
from qlab.algebra.tracing.on_tensors import OnTensors

LONG, EDGE = 24, 20  # calls: of a long stretch, and around it up to the next products
PRODUCTS = frozenset(
    {
        F.linear,
        torch.addmm,
        torch.mm,
        torch.matmul,
        Tensor.addmm,
        Tensor.mm,
        Tensor.matmul,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
        *EXPERT_OPS,
        *(op.overloadpacket for op in EXPERT_OPS),
    }
)
UNTRACED = frozenset({torch.ops.qlab.untraced, torch.ops.qlab.untraced.default})


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a segment calls of torch that gives tensors, by number: what is asked of a tensor is not
    always a call.

    products: those with weights, and those of untraced modules. stretches: the long ones in
    between. taken: a parameter or buffer -> the first call that takes it in another way. unread: a
    matrix -> the operation inside a stretch that takes it other than number by number. kept: where
    in its attributes the segment leaves tensors.
    """

    products: Mapping[int, Any]
    stretches: tuple[range, ...]
    taken: Mapping[str, int]
    unread: Mapping[str, Any]
    kept: tuple[Path, ...]

    def within(self, call: int) -> int | None:
        """Of which stretch a call is a part."""
        return next((i for i, stretch in enumerate(self.stretches) if call in stretch), None)

    def needed(self, stretch: int) -> list[str]:
        """The parameters and buffers that are taken up to the end of a stretch."""
        return [name for name, call in self.taken.items() if call < self.stretches[stretch].stop]


def survey(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Survey | None:
    """What a segment calls on inputs of these shapes; None where it does not run on shapes
    alone."""
    copied, tensors = on_meta(module, tensors_of(args, kwargs))
    noted, before = _Noted(copied, tensors), tensors_held(copied)
    try:
        with torch.no_grad(), noted.judge, noted:
            OnTensors(copied, args, kwargs)(*tensors)
    except Exception:  # whatever the segment's own forward raises; `trace` names it
        return None
    between = [
        range(start + 1, stop) for start, stop in pairwise([-1, *noted.products, noted.number])
    ]
    all_stretches = (_long(calls, noted.writes, noted.last_use) for calls in between)
    stretches = tuple(filter(None, all_stretches))
    unread = {
        name: func
        for call, name, func in noted.judge.mixed
        if any(call in stretch for stretch in stretches)
    }
    return Survey(
        products=noted.products,
        stretches=stretches,
        taken=noted.taken,
        unread=unread,
        kept=kept(before, copied),
    )


def _long(
    between: range, writes: Sequence[tuple[int, int]], last_use: Mapping[int, int]
) -> range | None:
    """The stretch between two products, if it is long.

    It ends where fewest tensors are handed on. What its calls write to is made inside, and written
    to by no others.
    """
    if len(between) <= LONG + 2 * EDGE:
        return None
    start = between[EDGE]
    stop = min(
        between[-EDGE:],
        key=lambda at: sum(maker < at <= last_use.get(maker, -1) for maker in between),
    )
    crossing = True
    while crossing:
        crossing = False
        for call, maker in writes:
            if (start <= call < stop and maker < start) or (start <= maker < stop <= call):
                start, stop, crossing = min(start, maker), max(stop, call + 1), True
    return range(start, stop) if between.start <= start and stop <= between.stop else None


def gives_tensors(out: Any) -> bool:
    """Whether a call is counted."""
    return bool(_tensors_in(out))


def _tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Noted(TorchFunctionMode):
    """Takes down the calls of a segment on the meta device."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]):
        super().__init__()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.names = {id(t): frozenset({name}) for name, t in tensors.items()}
        self.judge = _Judge(module, inputs)
        self.alive: list[Tensor] = []  # so that the id of a tensor stays its own
        self.products: dict[int, Any] = {}
        self.taken: dict[str, int] = {}
        self.makers: dict[int, int] = {}
        self.gave: dict[int, int] = {}
        # Pairs of a call that writes to a tensor and the call that made the tensor.
        self.writes: list[tuple[int, int]] = []
        self.last_use: dict[int, int] = {}  # a call -> the last one that takes what it gave
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        number = self.judge.number = self.number
        taken = _tensors_in((args, kwargs))
        versions = [t._version for t in taken]
        out = called_on_meta(func, args, kwargs or {})
        self.writes += [
            (number, self.makers.get(_memory(t), -1))
            for t, v in zip(taken, versions)
            if t._version != v
        ]
        results = _tensors_in(out)
        self.alive += results
        if results:
            self.number += 1
            self._take_down(number, func, taken, results)
        return out

    def _take_down(
        self, number: int, func: Any, taken: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        for t in results:
            self.makers.setdefault(_memory(t), number)
            self.gave.setdefault(id(t), number)
        for t in taken:
            if id(t) in self.gave:
                self.last_use[self.gave[id(t)]] = number
        names = frozenset().union(*(self.names.get(id(t), ()) for t in taken))
        if func in UNTRACED or (names and func in PRODUCTS):
            self.products[number] = func
        # A cast or a transpose of weights: who takes its result takes the weights.
        elif names and all(id(t) in self.names for t in taken):
            self.names |= {id(t): names for t in results}
        else:
            for name in names:
                self.taken.setdefault(name, number)


def _memory(t: Tensor) -> int:
    return id(t if t._base is None else t._base)


class _Judge(TorchDispatchMode):
    """Notes which matrices are used in other ways than number by number, and by which call."""

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor]):
        super().__init__()
        self.number = 0
        self.names = {
            id(p): frozenset({name}) for name, p in module.named_parameters() if is_matrix(p.shape)
        }
        self.computed = {id(t) for t in inputs}
        self.alive: list[Tensor] = []  # so that the id of a tensor stays its own
        self.mixed: list[tuple[int, str, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        taken, results = _tensors_in((args, kwargs)), _tensors_in(out)
        self.alive += results
        names = frozenset().union(*(self.names.get(id(t), ()) for t in taken))
        if names and not _number_by_number(func, args):
            self.mixed += [(self.number, name, func) for name in names]
        if any(id(t) in self.computed for t in taken):
            self.computed |= {id(t) for t in results}
        elif names:
            self.names |= {id(t): names for t in results}
        return out


def _number_by_number(func: Any, args: tuple) -> bool:
    if func is aten.convolution.default:
        return args[1].shape[1] == 1  # a filter of each channel by itself
    views = any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )
    return views or func in SAME_VALUES or torch.Tag.pointwise in func.tags
