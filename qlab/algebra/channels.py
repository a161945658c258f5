"""Where a producer's output channels go: their numbers, carried as labels through a traced program.

Each operation on labelled values has a rule (`RULES`) that gives the labels of its result. Views
move labels, a product with something unlabelled keeps them, and attention copies them from values
to outputs, where under grouped queries one label reaches several channels. An operation without a
rule, or to which its rule does not apply, *leaks* the labels: a scale cannot move through it.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
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
    """Runs a program on meta tensors, with the producer's channel numbers beside every value.

    rules: what each operation does to labels. labels: node -> a tensor of channel numbers in the
    shape of its value, or several. leaked: the channels that no scale can move through. reached:
    origin of sites -> the labels [k] of its channels. heads: the channels whose rows are mixed over
    tokens together, one tuple for each head of an attention.
    """

    def __init__(self, code: Code, producer: str, rules: "Mapping[Any, Rule] | None" = None):
        super().__init__(nn.Module(), graph=code.graph)
        self.producer = producer
        self.rules = RULES if rules is None else rules
        self.heads: set[tuple[int, ...]] = set()
        self.sites = {s.weight: s for s in code.sites}
        self.code = code
        self.labels: dict[fx.Node, Any] = {}
        self.leaked: set[int] = set()
        self.reached: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, *placed(args, kwargs, torch.device("meta")))

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        labelled = [node for node in n.all_input_nodes if node in self.labels]
        if n.name == self.producer:
            self.labels[n] = torch.arange(value.shape[-1]).expand(value.shape)
        elif n.op == "output" or (labelled and n.op == "call_function"):
            result = self._follow(n, value) if n.op == "call_function" else None
            if result is not None:
                self.labels[n] = result
            elif n.target not in HARMLESS and not self._asks_dtype(n) and not self._reaches_site(n):
                for node in labelled:
                    self.leak(self.labels[node])
        return value

    def leak(self, labels: Any) -> None:
        """Note that no scale can move on from here."""
        for t in labels if isinstance(labels, list | tuple) else [labels]:
            self.leaked |= {c for c in t.unique().tolist() if c != NONE}

    def _asks_dtype(self, n: fx.Node) -> bool:
        """Whether all that a node takes of labelled values is the dtype."""
        return n.target is aten.type_as.default and n.args[0] not in self.labels

    def _follow(self, n: fx.Node, value: Any) -> Any:
        """The labels of a node's value, or None where they leak."""
        rule = self.rules.get(n.target)
        if rule is None:
            return None
        return rule(self, n, [self._label_of(argument) for argument in n.args], value)

    def _label_of(self, argument: Any) -> Any:
        return self.labels.get(argument) if isinstance(argument, fx.Node) else None

    def _reaches_site(self, n: fx.Node) -> bool:
        """Whether the labels are those of a site's input, the same for every token."""
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


# ------------------------------------------------------------------ rules
# (walk, node, labels of each argument or None, value) -> labels of the value, or None: they leak
Rule = Callable[[Labels, fx.Node, Sequence[Any], Any], Any]


def _item(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """One of the outputs of an operation that has several."""
    return labels[0][n.args[1]]


def _elementwise(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """f(s x) = s f(x) for every number by itself."""
    if not labels or labels[0] is None or _labelled(labels[1:]):
        return None
    return labels[0].expand(value.shape)


def _view(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """Labels move as the numbers do."""
    if not labels or labels[0] is None:
        return None
    args, kwargs = walk.fetch_args_kwargs_from_env(n)
    return n.target(labels[0], *args[1:], **kwargs)


def _factor(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """A product of which one factor is labelled."""
    factors = _labelled(labels)
    return factors[0].expand(value.shape) if len(factors) == 1 else None


def _dividend(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """A quotient whose dividend alone is labelled."""
    return None if _labelled(labels[1:]) else _factor(walk, n, labels, value)


def _sum(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """A sum of two terms that carry the same labels."""
    terms = _labelled(labels)
    same = labels[0] is not None and len(terms) > 1 and torch.equal(terms[0], terms[1])
    return terms[0] if same else None


def _joined(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """Parts side by side, of which some may have no labels."""
    (parts, *rest), kwargs = walk.fetch_args_kwargs_from_env(n)
    nodes = n.args[0]
    assert isinstance(nodes, list | tuple)
    unlabelled = [torch.full(part.shape, NONE, dtype=torch.long) for part in parts]
    joined = [walk.labels.get(node, none) for node, none in zip(nodes, unlabelled)]
    return n.target(joined, *rest, **kwargs)


def _contracted(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """An einsum of one labelled operand, where all terms of each sum carry the same label.

    They do if the mean of the squared labels is the square of their mean.
    """
    (equation, operands, *_), _ = walk.fetch_args_kwargs_from_env(n)
    labelled = [node for node in n.args[1] if node in walk.labels]
    if len(labelled) > 1:
        return None

    def mean(power: int) -> Tensor:
        """Of the labels' powers, over the terms of each sum."""
        ones = [torch.ones(operand.shape, dtype=torch.float64) for operand in operands]
        powers = [
            walk.labels[node].double() ** power if node in labelled else one
            for node, one in zip(n.args[1], ones)
        ]
        return torch.einsum(equation, powers) / torch.einsum(equation, ones)

    return mean(1).long() if torch.equal(mean(1) ** 2, mean(2)) else None


def _gathered(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """Rows in another order, where every row carries the same labels."""
    rows = labels[0]
    if rows is None or len(n.args[1]) != 1:
        return None
    return rows[:1].expand(value.shape) if (rows == rows[:1]).all() else None


def _mixed(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """P @ V with labelled V."""
    if labels[0] is not None or len(_labelled(labels)) != 1:
        return None
    return _over_tokens(walk, _labelled(labels)[0], value.shape)


def _attended(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """Attention with labelled values. Labels of queries and keys, as a fused projection gives
    them, end in the softmax."""
    queries, keys, values = labels[:3]
    if values is None:
        return None
    for scored in _labelled([queries, keys]):
        walk.leak(scored)
    queries_per_value = value.shape[-3] // values.shape[-3]
    return _over_tokens(walk, values.repeat_interleave(queries_per_value, dim=-3), value.shape)


def _over_tokens(walk: Labels, labels: Tensor, shape: torch.Size) -> Tensor | None:
    """Labels of a mixture of rows V: those of V, if every row carries the same ones."""
    rows = labels[..., :1, :]
    if not (labels == rows).all():
        return None
    walk.heads |= {tuple(head) for head in rows.flatten(0, -2).unique(dim=0).tolist()}
    return rows.expand(shape)


def _scaled(walk: Labels, n: fx.Node, labels: Sequence[Any], value: Any) -> Any:
    """A product with a number, or a quotient by one."""
    numbers = not isinstance(n.args[1], fx.Node) and labels[0] is not None
    return labels[0] if numbers else None


def _labelled(labels: Sequence[Any]) -> list[Any]:
    return [each for each in labels if each is not None]


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(HOMOGENEOUS, _elementwise),
    **dict.fromkeys(LAYOUT, _view),
    **dict.fromkeys(PRODUCTS, _mixed),
    operator.getitem: _item,
    aten.mul.Tensor: _factor,
    aten.div.Tensor: _dividend,
    aten.add.Tensor: _sum,
    aten.cat.default: _joined,
    aten.stack.default: _joined,
    aten.einsum.default: _contracted,
    aten.index.Tensor: _gathered,
    aten.scaled_dot_product_attention.default: _attended,
}
# What commutes with every mixture of the channels of a head: x M before it is x M behind it.
LINEAR: Mapping[Any, Rule] = {
    **dict.fromkeys(SAME_VALUES | {aten.neg.default}, _elementwise),
    **dict.fromkeys(LAYOUT, _view),
    **dict.fromkeys(PRODUCTS, _mixed),
    operator.getitem: _item,
    aten.mul.Tensor: _scaled,
    aten.div.Tensor: _scaled,
    aten.add.Tensor: _sum,
    aten.cat.default: _joined,
    aten.stack.default: _joined,
    aten.index.Tensor: _gathered,
    aten.scaled_dot_product_attention.default: _attended,
}
