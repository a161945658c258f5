"""Which linears of a traced program decide where tokens go."""

from typing import cast

import torch
from torch import fx

from qlab.algebra.graph import WEIGHT_OPS
from qlab.algebra.tracing.as_it_is import AsItIs

aten = torch.ops.aten


def is_router(node: fx.Node) -> bool:
    """Whether a product decides the routing, weighs experts, or is a gate of one number per token:
    its weight is small, and every engine reads it as it is."""
    scores = node.meta["val"].shape[-1]
    if scores == 1:
        return True
    of_experts = scores in _counts(node.graph)
    ahead, seen = list(node.users), set()
    while ahead:
        user = ahead.pop()
        if user.target is torch.ops.qlab.route.default:
            return True
        if _ranks(user, scores) and (of_experts or _is_followed_by_untraced(user)):
            return True
        if user not in seen and user.target not in WEIGHT_OPS:
            seen.add(user)
            ahead += user.users
    return False


def _counts(graph: fx.Graph) -> list[int]:
    """How many matrices lie in each weight of three axes."""
    shapes = [n.meta["val"].shape for n in graph.nodes if n.op == "placeholder"]
    return [shape[0] for shape in shapes if len(shape) == 3 and isinstance(shape[0], int)]


def _ranks(node: fx.Node, scores: int) -> bool:
    """Whether a node takes the largest of so many scores of every token, as where all tokens run
    through all experts and the others weigh nothing."""
    if node.target is not aten.topk.default:
        return False
    ranked = cast(fx.Node, node.args[0])
    return ranked.meta["val"].shape[-1] == scores


def _is_followed_by_untraced(choice: fx.Node) -> bool:
    """Whether a choice reaches a module that runs as it is, whose experts nobody sees."""
    ahead, seen = list(choice.users), set()
    while ahead:
        user = ahead.pop()
        if isinstance(user.target, AsItIs):
            return True
        if user not in seen and user.target not in WEIGHT_OPS:
            seen.add(user)
            ahead += user.users
    return False
