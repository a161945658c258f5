"""A module that cannot be traced, as one operation of a program: it runs its own code, with the
weights that it is given.

While a segment is traced, calls of such a module give `untraced` tensors, which stand for what the
module gives; `gather_untraced` makes one operation of them for each call.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from qlab.algebra.graph import Code, Given, Made
from qlab.algebra.tracing.on_meta import on_meta
from qlab.algebra.tracing.on_tensors import OnTensors
from qlab.algebra.tracing.results import Results, Shaped, named_leaves, read_results
from qlab.algebra.tracing.taken_apart import put_together, take_apart, take_over
from qlab.errors import QlabError, first_line


@dataclass(frozen=True)
class Untraced:
    """What is known of a module that cannot be traced. why: what to say of its weights."""

    results: Results
    why: str


UntracedModules = Mapping[str, Untraced]  # path in the segment -> what is known of the module


@torch.library.custom_op("qlab::untraced", mutates_args=())
def untraced(
    given: list[Tensor],
    numbers: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    path: str,
    call: int,
    result: int,
) -> Tensor:
    """Stands, while a segment is traced, for a tensor that a call of an untraced module gives.

    given: the tensors among the arguments of the call, and behind them the module's weights.
    """
    raise NotImplementedError


@untraced.register_fake
def _(
    given: list[Tensor],
    numbers: Sequence[int],
    sizes: Sequence[int],
    dtype: torch.dtype,
    path: str,
    call: int,
    result: int,
) -> Tensor:
    return given[0].new_empty(sizes, dtype=dtype)


class StandIn:
    """Takes the place of the forward of an untraced module."""

    def __init__(self, module: nn.Module, path: str, results: Results):
        self.module, self.path, self.results = module, path, results
        self.calls = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "StandIn":
        return StandIn(copy.deepcopy(self.module, memo), self.path, self.results)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, form = take_apart((args, kwargs))
        if not self.results.are_for(leaves, form):
            raise ValueError("a module that is called with arguments of several forms")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        given = [*tensors, *named_leaves(self.module).values()]
        numbers = [leaves[i] for i in self.results.numbers]
        values: list[Any] = list(self.results.gives)
        for i, value in enumerate(values):
            if isinstance(value, Shaped):
                shape = value.shape(leaves)
                values[i] = torch.ops.qlab.untraced(
                    given, numbers, shape, value.dtype, self.path, self.calls, i
                )
        self.calls += 1
        returned = self.results.out_spec.num_leaves
        self._leave((args, kwargs), tensors, values[returned:])
        return pytree.tree_unflatten(values[:returned], self.results.out_spec)

    def _leave(self, inputs: Any, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Make of the arguments what the module makes of them."""
        left = self.results.left
        if left is None:
            return
        leaves = list(left.leaves)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Given | Made):
                leaves[i] = (tensors if isinstance(leaf, Given) else results)[leaf.index]
        take_over(inputs, put_together(leaves, left.form))


def stood_in(segment: nn.Module, modules: UntracedModules) -> nn.Module:
    """A copy of a segment, with its own parameters and buffers, in which nothing runs of the
    untraced modules."""
    if not modules:
        return segment
    tensors = [*segment.parameters(), *segment.buffers()]
    copied = copy.deepcopy(segment, {id(t): t for t in tensors})
    for path, known in modules.items():
        module = copied.get_submodule(path)
        module.forward = StandIn(module, path, known.results)
    return copied


class Finder:
    """Finds the modules of a segment that cannot be traced, while it is traced.

    A module that raises is one, if what it gives can be read off runs of its own; otherwise the
    module that calls it is. The trace goes on behind it, so that one trace finds all.
    """

    def __init__(self, segment: nn.Module, modules: UntracedModules):
        self.segment, self.modules = segment, dict(modules)

    def watch(self, segment: nn.Module, refused: Exception | None = None) -> None:
        """Watch a copy of the segment. refused: what a trace raised that no module of it raises,
        so that it is the whole segment which cannot be traced."""
        for path, module in segment.named_modules():
            if not isinstance(module.forward, StandIn):
                module.forward = self._watched(path, module, refused if not path else None)

    def _watched(self, path: str, module: nn.Module, refused: Exception | None) -> Any:
        forward = module.forward

        @wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                if refused is not None:
                    raise refused
                return forward(*args, **kwargs)
            except Exception as error:  # whatever the module raises, or torch where it is traced
                self._found(path, args, kwargs, error)
            return StandIn(module, path, self.modules[path].results)(*args, **kwargs)

        return watched

    def _found(self, path: str, args: tuple, kwargs: dict[str, Any], error: Exception) -> None:
        """Take down what a module gives that raised this error; raises it where that cannot be
        read."""
        leaves, form = take_apart((args, kwargs))
        try:
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                module = on_meta(self.segment, ())[0].get_submodule(path)
                results = read_results(module, leaves, form, anyhow=not path)
        except Exception:  # whatever the module's own forward raises
            raise error from None
        reason = reason_of(error)
        why = f"is used in {type(module).__name__}, which torch.export cannot trace ({reason})"
        inside = f"{path}." if path else ""
        self.modules = {
            other: known for other, known in self.modules.items() if not other.startswith(inside)
        }
        self.modules[path] = Untraced(results, why)


def reason_of(error: Exception) -> str:
    """The first sentence of what an error says."""
    return first_line(error).partition(". ")[0]


class AsItIs:
    """(tensors among a call's arguments, sizes among them, weights) -> what the module gives: the
    leaves of what it returns, and the tensors that it leaves in its arguments."""

    __name__ = "as_it_is"

    def __init__(self, module: nn.Module, path: str, known: Untraced):
        self.module, self.path, self.known = module, path, known
        self.names = [f"segment.{name}" for name in named_leaves(module)]

    def __str__(self) -> str:
        return type(self.module).__name__

    def __call__(
        self, tensors: Sequence[Tensor], numbers: Sequence[int], weights: Sequence[Tensor]
    ) -> tuple[Any, ...]:
        results = self.known.results
        leaves = list(results.constants)
        for i, value in (*zip(results.tensors, tensors), *zip(results.numbers, numbers)):
            leaves[i] = value
        if tensors[0].is_meta:  # where shapes alone are asked for
            return tuple(
                tensors[0].new_empty(value.shape(leaves), dtype=value.dtype)
                if isinstance(value, Shaped)
                else value
                for value in results.gives
            )
        args, kwargs = put_together(leaves, results.form)
        on_tensors = OnTensors(self.module, args, kwargs)
        named = dict(zip(self.names, weights, strict=True))
        given = pytree.tree_leaves(functional_call(on_tensors, named, tuple(tensors)))
        if len(given) != len(results.gives):
            raise QlabError(
                f"{self.path or 'a block'} ({type(self.module).__name__}) gives other things than "
                "it was traced with; open its model again in this process"
            )
        return tuple(given)


def untraced_modules(code: Code) -> UntracedModules:
    """The modules that are operations of a program."""
    runs = [node.target for node in code.graph.nodes if isinstance(node.target, AsItIs)]
    return {run.path: run.known for run in runs}


def gather_untraced(graph: fx.Graph, segment: nn.Module, modules: UntracedModules) -> None:
    """Make of all that `untraced` stands for in a program one operation for each call."""
    calls: dict[tuple[str, int], list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target is torch.ops.qlab.untraced.default:
            path, call = node.args[4:6]
            calls.setdefault((path, call), []).append(node)
    for (path, _), standing in calls.items():
        known = modules[path]
        given, numbers = cast(tuple[list[fx.Node], list[fx.Node]], standing[0].args[:2])
        tensors = len(known.results.tensors)
        run = AsItIs(segment.get_submodule(path), path, known)
        arguments = (given[:tensors], numbers, given[tensors:])
        gather(graph, standing, run, arguments, [cast(int, node.args[6]) for node in standing])


def gather(
    graph: fx.Graph,
    standing: Sequence[fx.Node],
    run: Any,
    arguments: tuple,
    places: Sequence[int],
) -> fx.Node:
    """Put one operation in the place of nodes that stand for some of its results. places: which
    result each stands for."""
    with graph.inserting_before(standing[0]):
        node = graph.call_function(run, arguments)
        items = [graph.call_function(item, (node, place)) for place in places]
    node.meta["val"] = tuple(stand.meta["val"] for stand in standing)
    for stand, result in zip(standing, items, strict=True):
        result.meta["val"] = stand.meta["val"]
        stand.replace_all_uses_with(result)
        graph.erase_node(stand)
    return node


def item(results: tuple[Any, ...], index: int) -> Any:
    """One of the results of an operation."""
    return results[index]
