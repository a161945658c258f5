"""Graphs that are called without torch, which would look up every tensor of the model for it anew.

A compiled function finds the inputs of its graph by hundreds of attributes, and guards each. In a
model that is served all of them stay as they are, but for the few that a step is handed. So a call
of a known form hands its own tensors to the graph, and those of the call before beside them.

Two calls have one form where nothing that torch guards can differ: the same module and cache, equal
values, and tensors of equal shapes, strides, dtypes and places. What the graph gets beside the
tensors that are handed has to be the same objects in two calls one after the other, so that nothing
that is made of them is taken for something that stays.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlab.generation.cache import Rows

MOST = 1 << 15  # forms that are known of one program
PLAIN = (bool, int, float, str, type(None))

Graph = Callable[..., Sequence[Any]]
Form = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a graph was called with, and what it gave."""

    graph: Graph
    inputs: tuple[Any, ...]
    outputs: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class _Lasting:
    """What stays of a graph's inputs from call to call.

    inputs: tensors of the model and of the cache, and None in the other places. own: (place among
    the inputs, number of the tensor that is handed) of those that are another tensor in every call.
    """

    graph: Graph
    inputs: list[Tensor | None]
    own: list[tuple[int, int]]

    def is_that_of(self, other: "_Lasting") -> bool:
        """Whether nothing of it is another object."""
        return (
            self.graph is other.graph
            and self.own == other.own
            and all(x is y for x, y in zip(self.inputs, other.inputs))
        )


@dataclass(frozen=True, kw_only=True)
class _Known:
    """Calls of one form. numbers: (place, value) of the inputs that are no tensors."""

    lasting: _Lasting
    numbers: list[tuple[int, Any]]

    def __call__(self, handed: Sequence[Tensor]) -> Any:
        inputs: list[Any] = self.lasting.inputs.copy()
        for place, number in self.numbers:
            inputs[place] = number
        for place, which in self.lasting.own:
            inputs[place] = handed[which]
        return self.lasting.graph(*inputs)[0]


class Direct:
    """A program that torch compiles, whose graph is called directly where that is the same.

    Args:
        program: the compiled function of a module and of what the module is called with. Its graph
            is `watched` when it is made.
    """

    def __init__(self, program: Callable[..., Any]):
        self._program = program
        self._known: dict[Form, _Known] = {}
        self._last: _Call | None = None
        self._lasting: dict[nn.Module, _Lasting] = {}  # of the call before

    def watched(self, graph: Graph) -> Graph:
        """A graph whose calls are looked at."""

        def watching(*inputs: Any) -> Sequence[Any]:
            outputs = graph(*inputs)
            self._last = _Call(graph=graph, inputs=inputs, outputs=outputs)
            return outputs

        return watching

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handed: list[Tensor] = []
        form = (module, *_form((args, kwargs), handed))
        known = self._known.get(form)
        if known is not None:
            return known(handed)
        # while another thread traces, torch runs a compiled function as it is, or refuses to
        with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            y = self._program(module, *args, **kwargs)
        call, self._last = self._last, None
        if call is not None and _is_all(call.outputs, y):
            self._learn(module, form, handed, call)
        return y

    def _learn(self, module: nn.Module, form: Form, handed: list[Tensor], call: _Call) -> None:
        """Keep the form of a call, if all that lasts is what it was in the call before."""
        number = {id(tensor): i for i, tensor in enumerate(handed)}
        own = [(p, number[id(x)]) for p, x in enumerate(call.inputs) if id(x) in number]
        numbers = [(p, x) for p, x in enumerate(call.inputs) if not isinstance(x, Tensor)]
        inputs = list(call.inputs)
        for place, _ in (*own, *numbers):
            inputs[place] = None
        lasting = _Lasting(graph=call.graph, inputs=inputs, own=own)
        before = self._lasting.get(module)
        if before is None or not before.is_that_of(lasting):
            self._lasting[module] = lasting
        elif len(self._known) < MOST:
            self._known[form] = _Known(lasting=before, numbers=numbers)


def _is_all(outputs: Sequence[Any], y: Any) -> bool:
    """Whether a program gives what its graph gives, and so leaves nothing else behind."""
    return len(outputs) == 1 and outputs[0] is y


def _form(value: Any, handed: list[Tensor]) -> Iterator[Any]:
    """All of a value that a graph may depend on but the numbers in its tensors, which are added to
    those that are handed. Nothing is equal to the form of what is unknown, or of a cache with
    states, which a call changes beside what it gives."""
    if isinstance(value, Tensor):
        yield next((i for i, other in enumerate(handed) if other is value), len(handed))
        handed.append(value)
        yield value.ndim
        yield from (*value.shape, *value.stride(), value.dtype, value.device, type(value))
    elif isinstance(value, Rows):
        yield value.pool
        yield object() if value.layers else None
        yield from _form((value.reads, value.writes, value.start), handed)
    elif isinstance(value, tuple | list):
        yield from (type(value), len(value))
        for inner in value:
            yield from _form(inner, handed)
    elif isinstance(value, Mapping):
        yield from (type(value), *value)
        yield from _form([*value.values()], handed)
    else:
        yield from (type(value), value) if isinstance(value, PLAIN) else (object(),)
