"""Graphs that are called without torch, which would look up every tensor of the model for it anew.

A compiled function finds the inputs of its graph by hundreds of attributes, and guards each. In a
model that is served all of them stay as they are, but for the few that a step is handed. So a call
of a known form hands its own tensors to the graph, and those of the call before beside them.

Two calls have one form where nothing that torch guards can differ: the same module and cache, equal
values, and tensors of equal shapes, strides, dtypes and places. What the graph gets beside the
tensors that are handed has to be the same objects in two calls one after the other, so that nothing
that is made of them is taken for something that stays.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlab.generation.cache import Rows

MOST = 1024  # forms that are known of one program, each of which lists the inputs of a graph
PLAIN = (bool, int, float, str, type(None))

Graph = Callable[..., Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a graph was called with, and what it gave."""

    graph: Graph
    inputs: tuple[Any, ...]
    outputs: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class _Form:
    """Calls of one form. inputs: of the graph. own: (place among the inputs, number of the tensor
    that is handed) of those that are another tensor in every call."""

    graph: Graph
    inputs: list[Any]
    own: list[tuple[int, int]]

    def __call__(self, handed: Sequence[Tensor]) -> Any:
        inputs = self.inputs.copy()
        for place, number in self.own:
            inputs[place] = handed[number]
        return self.graph(*inputs)[0]


class Direct:
    """A program that torch compiles, whose graph is called directly where that is the same.

    Args:
        program: the compiled function of a module and of what the module is called with. Its graph
            is `watched` when it is made.
    """

    def __init__(self, program: Callable[..., Any]):
        self._program = program
        self._forms: dict[Hashable, _Form] = {}
        self._last: _Call | None = None
        self._before: dict[nn.Module, _Call] = {}

    def watched(self, graph: Graph) -> Graph:
        """A graph whose calls are looked at."""

        def watching(*inputs: Any) -> Sequence[Any]:
            outputs = graph(*inputs)
            self._last = _Call(graph=graph, inputs=inputs, outputs=outputs)
            return outputs

        return watching

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handed: list[Tensor] = []
        key = (module, _form((args, kwargs), handed))
        form = self._forms.get(key)
        if form is not None:
            return form(handed)
        # while another thread traces, torch runs a compiled function as it is, or refuses to
        with torch._dynamo.config.patch(error_on_nested_fx_trace=False):
            y = self._program(module, *args, **kwargs)
        call, self._last = self._last, None
        if call is not None and _is_all(call.outputs, y):
            self._learn(key, handed, call)
        return y

    def _learn(self, key: tuple[nn.Module, Hashable], handed: list[Tensor], call: _Call) -> None:
        """Keep the form of a call, if all else of it stayed since the call before."""
        before = self._before.get(key[0])
        number = {id(tensor): i for i, tensor in enumerate(handed)}
        own = [(p, number[id(x)]) for p, x in enumerate(call.inputs) if id(x) in number]
        inputs = list(call.inputs)
        for place, _ in own:
            inputs[place] = None
        if (
            before is not None
            and before.graph is call.graph
            and len(self._forms) < MOST
            and all(_stayed(x, y) for x, y in zip(inputs, before.inputs))
        ):
            self._forms[key] = _Form(graph=call.graph, inputs=inputs, own=own)
        self._before[key[0]] = _Call(graph=call.graph, inputs=call.inputs, outputs=())


def _stayed(x: Any, before: Any) -> bool:
    """Whether an input is no tensor, hence part of the form or handed, or the same tensor."""
    return x is before or not isinstance(x, Tensor)


def _is_all(outputs: Sequence[Any], y: Any) -> bool:
    """Whether a program gives what its graph gives, and so leaves nothing else behind."""
    return len(outputs) == 1 and outputs[0] is y


def _form(value: Any, handed: list[Tensor]) -> Hashable:
    """All of a value that a graph may depend on but the numbers in its tensors, which are added to
    those that are handed. Nothing is equal to the form of what is unknown, or of a cache with
    states, which a call changes beside what it gives."""
    if isinstance(value, Tensor):
        first = next((i for i, other in enumerate(handed) if other is value), len(handed))
        handed.append(value)
        return first, value.shape, value.stride(), value.dtype, value.device, type(value)
    if isinstance(value, Rows):
        tensors = [_form(x, handed) for x in (value.reads, value.writes, value.start)]
        return value.pool, *tensors, object() if value.layers else None
    if isinstance(value, tuple | list):
        return type(value), tuple(_form(inner, handed) for inner in value)
    if isinstance(value, Mapping):
        return tuple((name, _form(inner, handed)) for name, inner in value.items())
    return (type(value), value) if isinstance(value, PLAIN) else object()
