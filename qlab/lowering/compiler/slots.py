"""Attention of one token over keys and values that a graph takes from the slots of a cache."""

from typing import Any

import torch

aten = torch.ops.aten


def read_slots(graph: Any) -> int:
    """Let the kernel read keys and values where they lie, and not a copy of them; the number of
    attentions that do.

    one_token(q, slots_k[at].transpose(1, 2), slots_v[at].transpose(1, 2)) -> one_token(q, slots_k,
    slots_v, at)
    """
    from qlab_kernels.one_token import OPERATOR

    count = 0
    for node in graph.find_nodes(op="call_function", target=OPERATOR):
        q, k, v, _, mask, path = node.args
        keys, values = _slots(k), _slots(v)
        if keys is None or values is None or keys[1] is not values[1]:
            continue
        node.args = (q, keys[0], values[0], keys[1], mask, path)
        # Inductor hands an operator tensors with the strides that are noted here
        fakes = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in node.args]
        node.meta["eager_input_vals"] = tuple(fakes), {}
        for view in (k, v):
            _erase_unused(graph, view)
        count += 1
    return count


def _slots(x: Any) -> tuple[Any, Any] | None:
    """(slots [n, h, d], at [b, l]) of which x is slots[at].transpose(1, 2), or None."""
    if x.target is not aten.permute.default or list(x.args[1]) != [0, 2, 1, 3]:
        return None
    taken = x.args[0]
    if taken.target is not aten.index.Tensor or len(taken.args[1]) != 1:
        return None
    slots, (at,) = taken.args
    value, places = slots.meta["val"], at.meta["val"]
    is_read = value.stride(-1) == 1 and places.dtype == torch.int64 and places.is_contiguous()
    return (slots, at) if value.ndim == 3 and places.ndim == 2 and is_read else None


def _erase_unused(graph: Any, view: Any) -> None:
    for node in (view, view.args[0]):
        if node.users:
            return
        graph.erase_node(node)
