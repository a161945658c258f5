"""What the output of a linear is added to: the residual stream, of linears that write to it.

The program shows it where nothing but casts and layout lies between the product and the sum, and
where the other summand is there before the product's input is. Where a norm or a gate lies between,
nothing is known of it.
"""

from collections.abc import Mapping
from functools import lru_cache

from torch import fx

from qlab.algebra.graph import LAYOUT, SAME_VALUES, WEIGHT_OPS, Code, aten, by_source, weight_of

PASSED = LAYOUT | SAME_VALUES | {aten.dropout.default}


@lru_cache(maxsize=32)
def streams_joined(code: Code) -> Mapping[str, str]:
    """source -> the node whose value is added to what its only site makes."""
    places = {node.name: i for i, node in enumerate(code.graph.nodes)}
    products = {weight_of(code, n): n for n in code.graph.nodes if n.target in WEIGHT_OPS}
    joined: dict[str, str] = {}
    for source, sites in by_source(code.sites).items():
        product = products.get(sites[0].weight)
        if len(sites) > 1 or sites[0].route or product is None:
            continue
        other = _summand(product)
        if other is not None and places[other.name] <= places[source]:
            joined[source] = other.name
    return joined


def _summand(node: fx.Node) -> fx.Node | None:
    """The other summand of the sum that this value goes into."""
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor:
            others = [a for a in user.args[:2] if a is not node and isinstance(a, fx.Node)]
            same = bool(others) and not user.kwargs and _as_wide(others[0], node)
            return others[0] if same else None
        if user.target not in PASSED:
            return None
        node = user
    return None


def _as_wide(a: fx.Node, b: fx.Node) -> bool:
    return str(a.meta["val"].shape) == str(b.meta["val"].shape)
