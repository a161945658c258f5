"""How much attention every token receives, of the attentions that a traced program shows.

An error in the key or value of a token reaches every token that attends to it. With P the
probabilities of a head, the errors that a value's error e_t makes in the outputs have the squared
length sum_i P_it^2 |e_t|^2, so a_t = sum_i P_it^2, the mean over heads, weighs the token as an
input of what makes keys and values. The first token of a window often receives more than all
others together, and is one row among hundreds in the second moment.

Legend: P_qk the probabilities of one head, queries q by keys k; a_n what each token receives.
Source: RSQ (Sung et al. 2025), which weighs tokens by the attention that they receive.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from qlab.algebra.attention import ATTENTION, attended
from qlab.algebra.graph import WEIGHT_OPS, Code, ModuleGraph, aten, by_source, weight_of
from qlab.algebra.interpret import values_at
from qlab.algebra.wires import Wire

Values = Callable[[Sequence[tuple[str, str | None]]], Sequence[Any]]


def received(
    graph: ModuleGraph, sources: Iterable[str], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """source -> a_n of its tokens, of those sources whose sites make what an attention reads.

    Sources that feed none, and attentions over other tokens than the source has, are left out.
    """
    return received_by(graph.code, sources, lambda ends: values_at(graph, ends, args, kwargs))


def received_by(code: Code, sources: Iterable[str], values: Values) -> dict[str, Tensor]:
    """The same from what gives values of nodes, each in front of the operation beside it."""
    feeding = attentions_fed(code)
    readers = {name for source in sources for name in feeding.get(source, ())}
    totals_n = {name: _received(code, name, values) for name in sorted(readers)}
    result: dict[str, Tensor] = {}
    for source in sources:
        for name in feeding.get(source, ()):
            before_n = result.get(source)
            result[source] = totals_n[name] if before_n is None else before_n + totals_n[name]
    return result


@lru_cache(maxsize=32)
def attentions_fed(code: Code) -> Mapping[str, tuple[str, ...]]:
    """source -> the nodes of the attentions that read what its sites make."""
    source_of = {site.weight: site.source for site in code.sites}
    fed: dict[str, tuple[str, ...]] = {}
    for node in code.graph.nodes:
        for operand in attended(node):
            for maker in _sites_behind(operand.node, node):
                source = source_of.get(weight_of(code, maker))
                if source is not None and node.name not in fed.get(source, ()):
                    fed[source] = (*fed.get(source, ()), node.name)
    return fed


def makers(code: Code, wire: Wire) -> frozenset[str]:
    """The weights whose products an attention reads by a wire."""
    nodes = {node.name: node for node in code.graph.nodes}
    readers = [nodes[name] for name, _ in wire.edges]
    behind = [maker for reader in readers for maker in _sites_behind(nodes[wire.node], reader)]
    weights = {weight_of(code, maker) for maker in behind}
    return frozenset(weight for weight in weights if weight is not None)


@lru_cache(maxsize=32)
def next_is_attention(code: Code, source: str) -> bool:
    """Whether a run that has reached a source meets no other before the attentions it feeds."""
    places = {node.name: i for i, node in enumerate(code.graph.nodes)}
    last = max((places[name] for name in attentions_fed(code).get(source, ())), default=-1)
    others = by_source(code.sites).keys() - {source}
    return not any(places[source] < places[other] < last for other in others)


def _sites_behind(value: fx.Node, attention: fx.Node) -> Iterator[fx.Node]:
    """The products with weights from which a value of an attention comes, without those behind
    them."""
    seen, waiting = {attention}, [value]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in WEIGHT_OPS:
            yield node
        else:
            waiting += node.all_input_nodes


def _received(code: Code, name: str, values: Values) -> Tensor:
    """a_n of one attention."""
    (node,) = (n for n in code.graph.nodes if n.name == name)
    if node.target is not ATTENTION:  # written out: its probabilities are a value
        (P,) = values([(name, None)])
        query = attended(node)[0].node.meta["val"]
        if query.ndim > P.ndim:  # windows and heads lie in one axis of the probabilities
            P = P.unflatten(0, (-1, query.shape[-3]))
        return P.float().square().sum(-2).mean(-2).flatten()
    read = node.all_input_nodes
    env = dict(zip(read, values([(value.name, name) for value in read])))
    given = fx.map_arg((node.args, node.kwargs), env.__getitem__)
    heads = [P_qk.float().square().sum(-2) for P_qk in probabilities(*given[0], **given[1])]
    return torch.stack(heads).mean(0).flatten()


def probabilities(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Iterator[Tensor]:
    """The probabilities of scaled_dot_product_attention, head by head, [..., q, k]. Of `value`, of
    dropout and of whether heads share keys nothing is read that the shapes do not say."""
    heads, shared = query.shape[-3], query.shape[-3] // key.shape[-3]
    if mask is not None and mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    for head in range(heads):
        q, k = query[..., head, :, :], key[..., head // shared, :, :]
        own = mask
        if mask is not None and mask.ndim > 2:
            own = mask[..., head if mask.shape[-3] > 1 else 0, :, :]
        q, k = q.unsqueeze(-3), k.unsqueeze(-3)
        own = own.unsqueeze(-3) if own is not None and own.ndim > 2 else own
        _, P = aten._scaled_dot_product_attention_math.default(
            q, k, k[..., :1], own, 0.0, is_causal, scale=scale
        )
        yield P.squeeze(-3)
