"""What enters the products of a program with its leaves."""

from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch

from qlab.algebra.graph import WEIGHT_OPS, Code, weight_of


@lru_cache(maxsize=32)
def input_dtypes(code: Code) -> Mapping[str, torch.dtype]:
    """Leaf -> the dtype of what a product multiplies it by, as the program was traced."""
    found: dict[str, torch.dtype] = {}
    for node in code.graph.nodes:
        leaf = weight_of(code, node) if node.target in WEIGHT_OPS else None
        if leaf is not None:
            found[leaf] = node.args[WEIGHT_OPS[node.target][0]].meta["val"].dtype
    return found


def behind(code: Code, leaves: Collection[str]) -> set[str]:
    """The leaves that a program multiplies by what depends on some of these."""
    reached, found = set[Any](), set[str]()
    for node in code.graph.nodes:
        if code.params.get(node.name) in leaves or reached & {*node.all_input_nodes}:
            reached.add(node)
        leaf = weight_of(code, node) if node.target in WEIGHT_OPS else None
        if leaf is not None and node.args[WEIGHT_OPS[node.target][0]] in reached:
            found.add(leaf)
    return found
