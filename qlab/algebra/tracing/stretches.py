"""Long stretches of a segment between two products with weights, each as one operation of its
program.

A loop over tokens, or over chunks of them, is thousands of operations, and none of them multiplies
by a weight. Such a stretch runs as it is: the module's own code, which is given what the products
before the stretch gave and is left where the next one begins. The products themselves, and all that
is between them elsewhere, stay operations of the program.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from qlab.algebra.graph import open_symbols
from qlab.algebra.tracing.as_it_is import gather
from qlab.algebra.tracing.on_meta import META, called_on_meta
from qlab.algebra.tracing.on_tensors import OnTensors
from qlab.algebra.tracing.survey import Survey, gives_tensors
from qlab.errors import QlabError

PRIMES = (10007, 10009, 10037, 10039, 10061, 10067)  # which no other sizes are multiples of


@torch.library.custom_op("qlab::stretch", mutates_args=())
def stretch(
    given: list[Tensor], sizes: Sequence[int], dtype: torch.dtype, index: int, call: int, leaf: int
) -> Tensor:
    """Stands, while a segment is traced, for a tensor that a call inside a stretch gives."""
    raise NotImplementedError


@stretch.register_fake
def _(
    given: list[Tensor], sizes: Sequence[int], dtype: torch.dtype, index: int, call: int, leaf: int
) -> Tensor:
    return given[0].new_empty(sizes, dtype=dtype)


class Stretched(OnTensors):
    """The segment as it is to be traced: its long stretches run on the meta device, where nothing
    of them is taken down."""

    def __init__(self, segment: nn.Module, args: tuple, kwargs: dict[str, Any], surveyed: Survey):
        super().__init__(segment, args, kwargs)
        self.surveyed = surveyed

    def forward(self, *tensors: Tensor) -> Any:
        weights = {**dict(self.segment.named_parameters()), **dict(self.segment.named_buffers())}
        tracing = _Tracing(self.surveyed, tensors, weights)
        with tracing:
            out = super().forward(*tensors)
        return tracing.traced(out)


class _Tracing(TorchFunctionMode):
    """Hands calls inside of stretches tensors of the meta device, and calls behind them what
    `stretch` stands for."""

    def __init__(self, surveyed: Survey, inputs: Sequence[Tensor], weights: Mapping[str, Tensor]):
        super().__init__()
        self.surveyed, self.inputs, self.weights = surveyed, inputs, weights
        sizes: list[Any] = [d for t in inputs for d in t.shape]
        symbols = {d.node.expr: d for d in sizes if open_symbols(d)}
        self.numbers = dict(zip(symbols, PRIMES, strict=False))
        self.symbols = {
            self.numbers[expr]: d for expr, d in symbols.items() if expr in self.numbers
        }
        self.products: list[Tensor] = []
        self.number = 0
        self.twins: dict[int, Tensor] = {}
        self.twin_of: dict[int, Tensor] = {}
        self.call_of: dict[int, tuple[int, int]] = {}
        self.standing: dict[int, Tensor] = {}
        self.alive: list[Any] = []  # so that the id of a tensor stays its own

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        number, kwargs = self.number, kwargs or {}
        if self.surveyed.within(number) is not None:
            out = self._inside(number, func, args, kwargs)
        else:
            args, kwargs = self.traced((args, kwargs))
            out = func(*args, **kwargs)
        if gives_tensors(out):
            self.number += 1
            if number in self.surveyed.products:
                self.products.append(out)
        return out

    def _inside(self, number: int, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = pytree.tree_map(self._on_meta, (args, kwargs))
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            out = called_on_meta(func, args, kwargs)
        for leaf, value in enumerate(pytree.tree_leaves(out)):
            if isinstance(value, Tensor) and id(value) not in self.twin_of:
                self.call_of.setdefault(id(value), (number, leaf))
                self.alive.append(value)
        if isinstance(out, torch.Size):
            return torch.Size([self._size(n) for n in out])
        return self._size(out) if type(out) is int else out

    def _on_meta(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return self._number(leaf)
        if not isinstance(leaf, Tensor) or id(leaf) in self.call_of or id(leaf) in self.twin_of:
            return leaf
        if id(leaf) not in self.twins:
            sizes, strides = ([self._number(n) for n in at] for at in (leaf.shape, leaf.stride()))
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                twin = torch.empty_strided(sizes, strides, dtype=leaf.dtype, device=META)
            self.twins[id(leaf)], self.twin_of[id(twin)] = twin, leaf
            self.alive.append(leaf)
        return self.twins[id(leaf)]

    def _number(self, size: Any) -> int:
        return int(size.node.expr.subs(self.numbers)) if open_symbols(size) else int(size)

    def _size(self, number: int) -> Any:
        """The size that a number of the meta device stands for."""
        for prime, symbol in self.symbols.items():
            if number and number % prime == 0:
                return symbol * (number // prime)
        return number

    def traced(self, tree: Any) -> Any:
        """The same with tensors of the trace in the place of those of the meta device."""
        if any(twin._version for twin in self.twins.values()):
            raise ValueError("a stretch changes what was made before it")
        return pytree.tree_map_only(Tensor, self._traced, tree)

    def _traced(self, t: Tensor) -> Tensor:
        if id(t) in self.twin_of:
            return self.twin_of[id(t)]
        if id(t) not in self.call_of:
            return t
        if id(t) not in self.standing:
            call, leaf = self.call_of[id(t)]
            index = self.surveyed.within(call)
            assert index is not None
            before = sum(number < call for number in self.surveyed.products)
            weights = [self.weights[name] for name in self.surveyed.needed(index)]
            given = [*self.inputs, *weights, *self.products[:before]]
            self.standing[id(t)] = torch.ops.qlab.stretch(
                given, [self._size(n) for n in t.shape], t.dtype, index, call, leaf
            )
        return self.standing[id(t)]


class Stretch:
    """(inputs, weights, what the products before gave) -> what the calls inside a stretch give that
    is used behind it."""

    __name__ = "stretch"

    def __init__(
        self,
        on_tensors: OnTensors,
        surveyed: Survey,
        index: int,
        leaving: Sequence[tuple[int, int]],
    ):
        self.on_tensors, self.surveyed, self.leaving = on_tensors, surveyed, leaving
        self.names, self.stop = surveyed.needed(index), surveyed.stretches[index].stop

    def __call__(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor], products: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        parameters = {f"segment.{name}": weight for name, weight in zip(self.names, weights)}
        again = _Again(
            self.surveyed, self.stop, products, {call for call, _ in self.leaving}, inputs[0].device
        )
        try:
            with again:
                functional_call(self.on_tensors, parameters, tuple(inputs))
        except _Enough:
            pass
        return tuple(again.gave[call][leaf] for call, leaf in self.leaving)


class _Enough(Exception):
    """The end of a stretch was reached."""


class _Again(TorchFunctionMode):
    """Runs a segment to the end of a stretch, with what the products gave in their places."""

    def __init__(
        self,
        surveyed: Survey,
        stop: int,
        products: Sequence[Tensor],
        leaving: set[int],
        device: torch.device,
    ):
        super().__init__()
        self.surveyed, self.stop, self.leaving, self.device = surveyed, stop, leaving, device
        self.products = iter(products)
        self.gave: dict[int, list[Any]] = {}
        self.number = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        number = self.number
        if number >= self.stop:
            raise _Enough
        if self.surveyed.products.get(number) is func:
            self.number += 1
            return next(self.products)
        out = func(*args, **(kwargs or {}))
        out = list(out) if isinstance(out, Iterator) else out
        if isinstance(out, torch.device):
            return self.device  # weights of products lie nowhere here
        if not gives_tensors(out):
            return out
        self.number += 1
        if number in self.surveyed.products:
            raise QlabError(
                "a block runs other operations than those it was traced with; open its model "
                "again in this process"
            )
        if number in self.leaving:
            self.gave[number] = pytree.tree_leaves(out)
        return out


def gather_stretches(graph: fx.Graph, on_tensors: OnTensors, surveyed: Survey, inputs: int) -> None:
    """Make of all that `stretch` stands for in a program one operation for each stretch. inputs:
    how many tensors the program takes."""
    for index in range(len(surveyed.stretches)):
        standing = [
            node
            for node in graph.nodes
            if node.target is torch.ops.qlab.stretch.default and node.args[3] == index
        ]
        if not standing:
            continue
        names = surveyed.needed(index)
        given, products = standing[0].args[0], inputs + len(names)
        weights = given[inputs:products]
        calls = [(node.args[4], node.args[5]) for node in standing]
        run = Stretch(on_tensors, surveyed, index, calls)
        arguments = (given[:inputs], weights, given[products:])
        node = gather(graph, standing, run, arguments, range(len(standing)))
        node.meta["unread"] = {
            weight: surveyed.unread[name]
            for weight, name in zip(weights, names)
            if name in surveyed.unread
        }
