"""Products of few tokens with bytes, written out for Inductor: it calls aten's kernel from C++, and
an operator of qlab's through Python."""

from typing import Any

import torch

from qlab.lowering.compiler.nodes import call, contiguous, replace
from qlab.lowering.weights.int8 import INT8_TOKENS

aten = torch.ops.aten


def choose_bytes(graph: Any) -> int:
    """Write out the products whose number of tokens is known when they are compiled and which have
    no zero points; the number of them."""
    count = 0
    for node in graph.find_nodes(op="call_function", target=torch.ops.qlab.int8_mm.default):
        x, words, scales, zeros, _ = node.args
        m = x.meta["val"].shape[0]
        if zeros is not None or not isinstance(m, int) or not 0 < m <= INT8_TOKENS:
            continue
        with graph.inserting_before(node):
            # as_strided needs a real buffer with these strides, which aten's kernel reads
            form = (
                contiguous(graph, x),
                list(x.meta["val"].shape),
                [words.meta["val"].shape[1], 1],
            )
            rows = call(graph, aten.as_strided.default, form)
            new = call(graph, aten._weight_int8pack_mm.default, (rows, words, scales))
        replace(graph, node, new)
        count += 1
    return count
