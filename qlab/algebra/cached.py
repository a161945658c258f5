"""What a cache holds of an attention: its keys and values, or a latent of which they are made.

In latent attention (DeepSeek-V2, 2024) keys and values are a linear function of fewer channels than
hidden states have, and engines cache those.
"""

from collections.abc import Mapping
from typing import cast

from torch import fx

from qlab.algebra.graph import WEIGHT_OPS, Code
from qlab.algebra.wires import wires
from qlab.errors import QlabError
from qlab.process.shown import some


def refuse_latent(codes: Mapping[str, Code], scheme: str) -> None:
    """Refuse to round the keys and values of attentions that cache a latent. codes: block -> its
    program. scheme: how they would be rounded."""
    latent = [
        ".".join(filter(None, (path, owner)))
        for path, code in codes.items()
        for owner in latent_attentions(code)
    ]
    if latent:
        raise QlabError(
            f"{some(latent)} caches a latent of which keys and values are made, and not these, so "
            f"{scheme} is no scheme of its cache; leave the cache as it is"
        )


def latent_attentions(code: Code) -> list[str]:
    """The attentions of a program, by their owners' paths, whose keys or values are made of fewer
    channels than what enters the segment has."""
    there = wires(code)
    nodes = {node.name: node for node in code.graph.nodes}
    if "enter" not in there:
        return []
    hidden = there["enter"].channels
    return [
        wire.owner
        for wire in there.values()
        if wire.of_attention
        and wire.kind == "key"
        and any(width < hidden for width in _widths(nodes[wire.node]))
    ]


def _widths(value: fx.Node) -> list[int]:
    """How many channels the linears read that a value comes from, without those behind them."""
    seen: set[fx.Node] = set()
    waiting, widths = [value], []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in WEIGHT_OPS:
            x = cast(fx.Node, node.args[WEIGHT_OPS[node.target][0]])
            widths.append(int(x.meta["val"].shape[-1]))
        else:
            waiting += node.all_input_nodes
    return widths
