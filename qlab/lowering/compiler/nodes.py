"""Nodes of a graph that a pass makes, with the values that later passes read off them."""

from typing import Any

import torch

aten = torch.ops.aten


def contiguous(graph: Any, x: Any) -> Any:
    """x with contiguous strides. aten's kernel takes no other input, and the eager operator gives
    no other output."""
    if x.meta["val"].is_contiguous():
        return x
    return call(graph, aten.clone.default, (x,), memory_format=torch.contiguous_format)


def call(graph: Any, target: Any, args: tuple, **kwargs: Any) -> Any:
    """A new node with the value that later passes read off it."""
    node = graph.call_function(target, args, kwargs)
    fakes = torch.utils._pytree.tree_map(
        lambda a: a.meta["val"] if hasattr(a, "meta") and hasattr(a, "op") else a, args
    )
    tensors = [t for t in torch.utils._pytree.tree_leaves(fakes) if isinstance(t, torch.Tensor)]
    with tensors[0].fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*fakes, **kwargs)
    return node


def replace(graph: Any, old: Any, new: Any) -> None:
    new.meta = {**old.meta, **new.meta}
    old.replace_all_uses_with(new)
    graph.erase_node(old)
