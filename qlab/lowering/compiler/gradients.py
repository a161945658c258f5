"""Operators that are called without their gradients, which are Python, in compiled graphs."""

from typing import Any

import torch


def drop_gradients(graph: Any) -> None:
    """Let products with activations rounded to int8 call the compiled library alone: a compiled
    graph has its gradients in graphs of their own."""
    ops = torch.ops.qlab
    for node in graph.find_nodes(op="call_function", target=ops.int4_int8_mm.default):
        node.target = ops.int4_int8_forward.default
