"""Where a producer's output channels go: their numbers, carried as labels through a traced program.

Views move labels, attention copies them from values to outputs (under grouped queries one label
reaches several channels), a product with something unlabelled keeps them, and any other operation
*leaks* them.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlab.algebra.graph import LAYOUT, SAME_VALUES, WEIGHT_OPS, Code, aten, behind_casts, placed

HOMOGENEOUS = SAME_VALUES | {
    aten.relu.default,
    aten.neg.default,
    aten.leaky_relu.default,
    aten.abs.default,
}
PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
HARMLESS = frozenset(
    {aten.sym_size.int, aten.new_empty.default, aten.new_zeros.default, aten.empty_like.default}
)
NONE = -1  # the label of a channel that this producer does not feed


class Labels(fx.Interpreter):
    """Carries a producer's channel numbers forward beside meta values of every node."""

    def __init__(self, code: Code, producer: str):
        super().__init__(nn.Module(), graph=code.graph)
        self.producer = producer
        self.sites = {s.weight: s for s in code.sites}
        self.code = code
        self.labels: dict[fx.Node, Any] = {}
        self.leaked: set[int] = set()
        self.reached: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *placed(args, kwargs, torch.device("meta")))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        labelled = [a for a in n.all_input_nodes if a in self.labels]
        if n.name == self.producer:
            self.labels[n] = torch.arange(value.shape[-1]).expand(value.shape)
        elif n.op == "output" or (labelled and n.op == "call_function"):
            out = self._follow(n, value) if n.op == "call_function" else None
            if out is not None:
                self.labels[n] = out
            elif n.target not in HARMLESS and not self._reaches_site(n):
                for a in labelled:
                    self._leak(self.labels[a])
        return value

    def _leak(self, labels: Any) -> None:
        for t in labels if isinstance(labels, list | tuple) else [labels]:
            self.leaked |= {c for c in t.unique().tolist() if c != NONE}

    def _reaches_site(self, n: fx.Node) -> bool:
        if n.target not in WEIGHT_OPS:
            return False
        x_at, w_at, _, _ = WEIGHT_OPS[n.target]
        site = self.sites.get(self.code.params.get(behind_casts(n.args[w_at]).name, ""))
        if site is None or n.args[x_at] not in self.labels:
            return False
        rows = self.labels[n.args[x_at]].flatten(0, -2)
        if not (rows == rows[0]).all():
            return False
        if site.origin in self.reached and not torch.equal(self.reached[site.origin], rows[0]):
            return False
        self.reached[site.origin] = rows[0].clone()
        return True

    def _follow(self, n: fx.Node, value: Any) -> Any:
        """Labels of the node's output, or None where the operation is not homogeneous in the
        labelled operand."""
        args = [self.labels.get(a) if isinstance(a, fx.Node) else None for a in n.args]
        first = args[0] if args else None
        others = [a for a in args[1:] if a is not None]
        if n.target is operator.getitem:
            return first[n.args[1]]
        if n.target in HOMOGENEOUS and first is not None and not others:
            return first.expand(value.shape)
        if n.target in LAYOUT and first is not None:
            rest, kwargs = self.fetch_args_kwargs_from_env(n)
            return n.target(first, *rest[1:], **kwargs)
        if (
            n.target in (aten.mul.Tensor, aten.div.Tensor)
            and len(others) + (first is not None) == 1
        ):
            return (
                None
                if n.target is aten.div.Tensor and others
                else (first if not others else others[0]).expand(value.shape)
            )
        if (
            n.target is aten.add.Tensor
            and first is not None
            and others
            and torch.equal(first, others[0])
        ):
            return first
        if n.target in (aten.cat.default, aten.stack.default):
            return self._concatenate(n)
        if n.target is aten.einsum.default:
            return self._contract(n)
        if (
            n.target is aten.index.Tensor and first is not None and len(n.args[1]) == 1
        ):  # rows, in another order
            return first[:1].expand(value.shape) if (first == first[:1]).all() else None
        if n.target in PRODUCTS and first is None and len(others) == 1:
            return _mixed_over_tokens(others[0], value.shape)
        if n.target is aten.scaled_dot_product_attention.default and args[2] is not None:
            for scored in args[
                :2
            ]:  # queries and keys of a fused projection go into the softmax; its values go on
                if scored is not None:
                    self._leak(scored)
            heads = value.shape[-3] // args[2].shape[-3]
            return _mixed_over_tokens(args[2].repeat_interleave(heads, dim=-3), value.shape)
        return None

    def _concatenate(self, n: fx.Node) -> Tensor:
        (parts, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = n.args[0]
        assert isinstance(inputs, list | tuple)
        labels = [
            self.labels.get(node, torch.full(v.shape, NONE, dtype=torch.long))
            for node, v in zip(inputs, parts)
        ]
        return n.target(labels, *rest, **kwargs)

    def _contract(self, n: fx.Node) -> Tensor | None:
        """Labels of a sum of products with one labelled operand, where all terms of a sum carry the
        same one."""
        (equation, operands, *_), _ = self.fetch_args_kwargs_from_env(n)
        labelled = [node for node in n.args[1] if node in self.labels]
        if len(labelled) > 1:
            return None

        def mean(power: int) -> Tensor:  # of the labels' powers over the terms of each sum
            ones = [torch.ones(value.shape, dtype=torch.float64) for value in operands]
            powers = [
                self.labels[node].double() ** power if node in labelled else one
                for node, one in zip(n.args[1], ones)
            ]
            return torch.einsum(equation, powers) / torch.einsum(equation, ones)

        return mean(1).long() if torch.equal(mean(1) ** 2, mean(2)) else None


def _mixed_over_tokens(labels: Tensor, shape: torch.Size) -> Tensor | None:
    """Labels of P @ V: a mixture over tokens keeps V's channels if every token carries the same
    ones."""
    same = (labels == labels[..., :1, :]).all()
    return labels[..., :1, :].expand(shape) if same else None
