"""What may act on the input of a site so that its producer and its readers can undo it: a group.

It is read off the program. Labels of the producer's channels are carried to the input twice: by the
rules of what is homogeneous (a scale per channel passes), and by those of what is linear in each
head (a matrix per head passes). The group is what the stricter walk allows, else what the other
does, else nothing, with the operation that stands in the way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

from qlab.algebra.channels import HOMOGENEOUS, LINEAR, NONE, RULES
from qlab.algebra.folds import Fold, folds, walked
from qlab.algebra.graph import (
    LAYOUT,
    WEIGHT_OPS,
    Code,
    ModuleGraph,
    Site,
    aten,
    behind_casts,
    by_origin,
)
from qlab.algebra.qtensor import Leaf
from qlab.algebra.received import makers
from qlab.algebra.scope import matches
from qlab.algebra.wires import full_name, wires
from qlab.errors import QlabError


@dataclass(frozen=True)
class Nothing:
    """No change of basis can be undone before the input; `reason` names the operation."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """Positive scales of channels [k], which the producer takes."""

    fold: Fold


@dataclass(frozen=True, kw_only=True)
class General:
    """Invertible matrices [h, d, d], one for each of the h heads of the producer's values.

    heads_hd: the producer's channels of every head. copies_b: of every d neighbouring channels of
    the input, the head that they are (several queries share one). Scales are among the elements.
    """

    fold: Fold
    heads_hd: Tensor
    copies_b: Tensor

    @property
    def size(self) -> int:
        """Channels of a head."""
        return self.heads_hd.shape[1]

    def of_input(self, M_hdd: Tensor) -> Tensor:
        """The matrices [b, d, d] at the input."""
        return M_hdd[self.copies_b]

    def of_producer(self, M_nn: Tensor) -> Tensor | None:
        """The matrices [h, d, d] of the heads that are these at the input ([d, d], or [b, d, d]),
        or None where they are for other blocks, or copies of a head differ."""
        if M_nn.shape[-1] != self.size:
            return None
        M_bdd = M_nn.expand(len(self.copies_b), -1, -1)
        M_hdd = M_bdd.new_zeros(len(self.heads_hd), self.size, self.size)
        M_hdd[self.copies_b] = M_bdd
        return M_hdd if torch.equal(M_hdd[self.copies_b], M_bdd) else None

    def apply(self, graph: ModuleGraph, M_hdd: Tensor) -> Mapping[str, Leaf]:
        """The producer's leaves with the values x of every head turned to x M."""
        p = self.fold.producer
        leaf = graph.params[p.weight]
        if not isinstance(leaf, Tensor):
            raise QlabError(
                f"{graph.path}.{p.weight} is rounded already and cannot be rotated; rotate first"
            )
        M, channels = M_hdd.double(), self.heads_hd.to(leaf.device)
        W_ok = (leaf.mT if p.transposed else leaf).double().clone()
        W_ok[channels] = M.mT @ W_ok[channels]
        turned = W_ok.float()
        leaves: dict[str, Leaf] = {p.weight: turned.mT if p.transposed else turned}
        if p.bias:
            bias = graph.params[p.bias]
            assert isinstance(bias, Tensor)
            b = bias.double().clone()
            b[channels] = (b[channels][:, None] @ M)[:, 0]
            leaves[p.bias] = b.float()
        return leaves


Group = Nothing | Diagonal | General


@lru_cache(maxsize=32)
def groups(code: Code) -> Mapping[str, Group]:
    """Origin of sites -> what may act on their input."""
    return {origin: _group(code, origin) for origin in by_origin(code.sites)}


def _group(code: Code, origin: str) -> Group:
    fold = folds(code).get(origin)
    if fold is None:
        return Nothing(_stops(code, origin))
    heads = _heads(code, origin, fold)
    if heads is None:
        return Diagonal(fold=fold)
    blocks = fold.index_k.unflatten(0, (-1, heads.shape[1]))
    same = (blocks[:, None] == heads[None]).all(-1)
    if not same.any(1).all():
        return Diagonal(fold=fold)
    return General(fold=fold, heads_hd=heads, copies_b=same.int().argmax(1))


def _heads(code: Code, origin: str, fold: Fold) -> Tensor | None:
    """The producer's channels of every head [h, d], where every operation up to the input is linear
    in each head; None elsewhere."""
    is_matrix = fold.producer.rows and not _of_experts(code, fold.producer.weight)
    if not is_matrix:
        return None
    walk = walked(code, fold.producer.node, LINEAR)
    index = walk.reached.get(origin)
    if index is None or not torch.equal(index, fold.index_k):
        return None
    mine = set(index.tolist())
    heads = sorted(head for head in walk.heads if mine & {*head}) or [tuple(sorted(mine))]
    others = {c for other, i in walk.reached.items() if other != origin for c in i.tolist()}
    members = [c for head in heads for c in head]
    whole = len(members) == len(set(members)) and set(members) == mine
    alike = len({len(head) for head in heads}) == 1 and NONE not in mine
    if not whole or not alike or mine & (walk.leaked | others):
        return None
    return torch.tensor(heads, dtype=torch.int64)


def _of_experts(code: Code, weight: str) -> bool:
    return any(site.weight == weight and site.layout.startswith("e") for site in code.sites)


@lru_cache(maxsize=32)
def made_of(code: Code) -> Mapping[str, frozenset[str]]:
    """Origin of sites -> other names of what turns there: those of the values that its producer
    makes, "v_proj:out" and "self_attn:value" of what "o_proj:in" reads. Where the producer makes
    more than that, as fused queries, keys and values are, its output is none of them."""
    values = {
        maker: wire.name
        for wire in wires(code).values()
        if wire.kind == "value"
        for maker in makers(code, wire)
    }
    names: dict[str, frozenset[str]] = {}
    for origin, fold in folds(code).items():
        producer = fold.producer
        module = producer.weight.removesuffix(".weight")
        node = next(n for n in code.graph.nodes if n.name == producer.node)
        whole = len(fold.index_k.unique()) == node.meta["val"].shape[-1]
        aliases = [f"{module}:out"] if whole else []
        aliases += [values[producer.weight]] if producer.weight in values else []
        names[origin] = frozenset(aliases)
    return names


def turning_with(graph: ModuleGraph, sites: Sequence[Site], pattern: str) -> list[Site]:
    """The sites whose inputs are made of a value that the pattern matches, by its own name or that
    in the model."""
    aliases = made_of(graph.code)
    return [
        site
        for site in sites
        if any(
            matches(pattern, name) or matches(pattern, full_name(graph.path, name))
            for name in aliases.get(site.origin, ())
        )
    ]


@lru_cache(maxsize=32)
def chained(code: Code) -> Sequence[frozenset[str]]:
    """The paths of the sites whose inputs have to turn one after the other: what reads one wire
    produces another, as values of an attention are read behind it. Turns of two such chains touch
    no common leaf, and do not depend on each other."""
    chains: list[tuple[set[str], set[str]]] = []  # leaves, paths
    for origin, sites in by_origin(code.sites).items():
        fold = folds(code).get(origin)
        made_by = (fold.producer.weight, fold.producer.bias) if fold else ()
        leaves = {name for name in (*(site.weight for site in sites), *made_by) if name}
        paths = {site.path for site in sites}
        for chain in [chain for chain in chains if chain[0] & leaves]:
            chains.remove(chain)
            leaves, paths = leaves | chain[0], paths | chain[1]
        chains.append((leaves, paths))
    return [frozenset(paths) for _, paths in chains]


@lru_cache(maxsize=32)
def writers(code: Code) -> frozenset[str]:
    """The paths of the sites that write to what leaves the segment: whose outputs reach it without
    another site between. Routers are none of them."""
    leaving = wires(code).get("leave")
    if leaving is None:
        return frozenset()
    by_weight = {site.weight: site for site in code.sites}
    nodes = {node.name: node for node in code.graph.nodes}
    waiting, visited = [nodes[leaving.node]], {nodes[leaving.node]}
    paths: set[str] = set()
    while waiting:
        node = waiting.pop()
        weight = behind_casts(node.args[WEIGHT_OPS[node.target][1]]) if _multiplies(node) else None
        site = None if weight is None else by_weight.get(code.params.get(weight.name))
        if site is None:
            waiting += [ahead for ahead in node.all_input_nodes if ahead not in visited]
            visited |= {*node.all_input_nodes}
        elif not site.router:
            paths.add(site.path)
    return frozenset(paths)


def _multiplies(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in WEIGHT_OPS


def _stops(code: Code, origin: str) -> str:
    """What no scale passes on its way to an input: the nearest operation before it, in words."""
    waiting = [next(node for node in code.graph.nodes if node.name == origin)]
    while waiting:
        node = waiting.pop(0)
        if node.op == "placeholder":
            continue
        if node.target is aten.add.Tensor or node.target not in RULES:
            return _named(node)
        ahead = [node.args[0]] if node.target in HOMOGENEOUS | LAYOUT else node.all_input_nodes
        waiting += [a for a in ahead if isinstance(a, fx.Node)]
    return "it is what enters the segment"


def _named(node: fx.Node) -> str:
    target: Any = node.target
    name = str(getattr(target, "__name__", target)).removeprefix("aten.").partition(".")[0]
    if target in WEIGHT_OPS:
        return f"others read what the {name} before it gives"
    return f"the operation {name} stands before it"
