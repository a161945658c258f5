"""A segment that cannot be traced, as a program of one operation: the module itself, run with the
weights that it is given."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from qlab.algebra.graph import Code, is_matrix


class AsItIs:
    """(inputs, weights by name) -> the flat outputs of a module, whose own parameters may lie on
    the meta device."""

    __name__ = "as_it_is"

    def __init__(self, on_tensors: nn.Module, names: Sequence[str]):
        self.on_tensors, self.names = on_tensors, names

    def __call__(self, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Any, ...]:
        held = {f"segment.{name}": weight for name, weight in zip(self.names, weights)}
        return tuple(pytree.tree_leaves(functional_call(self.on_tensors, held, tuple(inputs))))


def runs_as_it_is(code: Code) -> bool:
    """Whether a program is the module itself: it does what that does, also where nothing tells
    beforehand what it is."""
    return any(isinstance(node.target, AsItIs) for node in code.graph.nodes)


def as_it_is(module: nn.Module, on_tensors: Any, tensors: Sequence[Tensor], why: str) -> Code:
    """The program of one operation, whose weights are no sites, because of `why`.

    The shapes of its outputs are read off a run on zeros: a size is that of an input where it
    equals one.
    """
    leaves = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    zeros = [
        torch.zeros((), dtype=t.dtype).expand(t.shape) if t.is_meta else t for t in leaves.values()
    ]  # which take no memory
    run = AsItIs(on_tensors, list(leaves))
    with torch.no_grad():
        returned = functional_call(
            on_tensors,
            {f"segment.{n}": z for n, z in zip(leaves, zeros)},
            tuple(torch.zeros(t.shape, dtype=t.dtype) for t in tensors),
        )
    flat, out_spec = pytree.tree_flatten(returned)
    fakes = _with_open_sizes(tensors)
    graph = fx.Graph()
    weights = [_placeholder(graph, f"w{i}", t) for i, t in enumerate(leaves.values())]
    inputs = [_placeholder(graph, f"x{i}", t) for i, t in enumerate(fakes)]
    node = graph.call_function(run, (inputs, weights))
    node.meta["val"] = outputs = tuple(
        _like(out, fakes) if isinstance(out, Tensor) else out for out in flat
    )
    graph.output(
        tuple(
            graph.call_function(_item, (node, i)) if isinstance(out, Tensor) else out
            for i, out in enumerate(flat)
        )
    )
    for item, value in zip(
        (n for n in graph.nodes if n.target is _item), (o for o in outputs if isinstance(o, Tensor))
    ):
        item.meta["val"] = value
    return Code(
        graph=graph,
        params={weight.name: name for weight, name in zip(weights, leaves)},
        constants={},
        inputs=tuple(tuple(1 if n == 1 else None for n in t.shape) for t in tensors),
        out_spec=out_spec.child(0),
        sites=(),
        outputs=outputs,
        left=on_tensors.after.left,
        unread={
            name: f"{tuple(p.shape)} {why}"
            for name, p in module.named_parameters()
            if is_matrix(p.shape)
        },
    )


def _item(outputs: tuple[Any, ...], index: int) -> Any:
    return outputs[index]


def _placeholder(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _with_open_sizes(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The inputs in shapes alone, with a symbol for every size but the channels': the same one for
    equal sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=True)
    fakes: list[Tensor] = []
    for t in tensors:
        sizes = [
            DimDynamic.STATIC if d == t.ndim - 1 and t.is_floating_point() else DimDynamic.DUCK
            for d in range(t.ndim)
        ]
        fakes.append(
            mode.from_tensor(
                t.to("meta"), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)
            )
        )
    return fakes


def _like(out: Tensor, fakes: Sequence[Tensor]) -> Tensor:
    sizes: list[Any] = [d for t in fakes for d in t.shape]
    known = {int(d.node.hint): d for d in sizes if isinstance(d, torch.SymInt)}
    return fakes[0].new_empty(
        [*(known.get(n, n) for n in out.shape[:-1]), *out.shape[-1:]], dtype=out.dtype
    )
