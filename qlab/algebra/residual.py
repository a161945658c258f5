"""The residual stream of a segment in another basis: what an orthogonal matrix R may turn.

f'(h R) = f(h) R, where weights that read the stream take R behind the gain of the norm before them,
and weights and tables that add to it take R from behind. A norm that subtracts the mean over
channels leaves what R does to that alone: R then has to keep the vector of ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qlab.algebra.basis import Gain, Lacking, Stream
from qlab.algebra.graph import Code, ModuleGraph, Site
from qlab.algebra.groups import Nothing
from qlab.algebra.online import MatMul
from qlab.algebra.qtensor import Leaf
from qlab.algebra.wires import full_name, wires
from qlab.errors import QlabError

ROWS = 4096  # of a table or a weight, turned at a time


@dataclass(frozen=True)
class Frame(MatMul):
    """The turn into the basis of a segment, where its hidden states enter, or back where they
    leave. Between two segments of one basis the turns undo each other, so no file holds them."""


@dataclass(frozen=True, kw_only=True)
class Orthogonal:
    """Orthogonal matrices R [k, k] at what enters and leaves a segment.

    size: k. centred: whether R has to keep the vector of ones. readers: path of a site that reads
    the stream -> the gain of the norm before it, or None. writers: paths of the sites that add to
    it. tables: paths of the tables that it begins with.
    """

    size: int
    centred: bool
    readers: Mapping[str, Lacking]
    writers: frozenset[str]
    tables: frozenset[str]

    def apply(self, graph: ModuleGraph, R: Tensor) -> ModuleGraph:
        """The segment in the basis R: what it makes of h R is what it made of h, times R."""
        leaves: dict[str, Leaf] = {}
        R = R.double()
        for site in graph.code.sites:
            if site.path in self.readers or site.path in self.writers:
                leaves.update(self._turned(graph, site, R))
        for gain in {gain for gain in self.readers.values() if gain is not None}:
            leaves.update(_left_of(graph, gain, R))
        for path in self.tables:
            leaves[path] = _rows_turned(_tensor(graph, path), 1.0, R, torch.float32)
        turned = graph.update(leaves).inserting("enter", Frame(R.float()))
        return turned.inserting("leave", Frame(R.mT.float()))

    def _turned(self, graph: ModuleGraph, site: Site, R: Tensor) -> dict[str, Leaf]:
        W_ok = graph.weight_ok(site)
        leaves: dict[str, Leaf] = {}
        if site.path in self.readers:
            gain = self.readers[site.path]
            factor: Tensor | float = 1.0 if gain is None else _factor(graph, gain)
            kept = torch.float64 if site.path in self.writers else torch.float32
            W_ok = _rows_turned(W_ok, factor, R, kept)
        if site.path in self.writers:
            W_ok = R.mT @ W_ok.double()
            if site.bias:
                leaves[site.bias] = (_tensor(graph, site.bias).double() @ R).float()
        turned = W_ok.float()
        leaves[site.weight or ""] = turned.mT if site.layout.endswith("k o") else turned
        return leaves


@lru_cache(maxsize=32)
def residual(code: Code) -> Orthogonal | Nothing:
    """What may turn the residual stream of a program; nothing, with the operation that stands in
    the way, where it is not only added to, normed and multiplied by weights."""
    named = wires(code)
    if "enter" not in named or "leave" not in named:
        return Nothing("it shows no hidden states that enter and leave")
    stream = Stream(code, named["enter"].node, named["leave"].node)
    for node in code.graph.nodes:
        if not stream.follow(node):
            stop = str((stream.stop or node).target).removeprefix("aten.").partition(".")[0]
            return Nothing(f"the operation {stop} is not the same in another basis")
    return Orthogonal(
        size=int(named["enter"].channels),
        centred=stream.centred,
        readers=stream.readers,
        writers=frozenset(stream.writers),
        tables=stream.tables,
    )


def _rows_turned(W: Tensor, factor: Tensor | float, R: Tensor, dtype: torch.dtype) -> Tensor:
    """W diag(factor) R in fp64, a part of the rows at a time, since those of tables and heads are a
    vocabulary. Differentiable."""
    parts = W.split(ROWS)
    return torch.cat([((part.double() * factor) @ R).to(dtype) for part in parts])


def _left_of(graph: ModuleGraph, gain: Gain, R: Tensor) -> dict[str, Leaf]:
    """What stays with a norm whose readers took its gain: b / g in the basis R."""
    leaves: dict[str, Leaf] = {}
    if gain.weight is not None:
        leaves[gain.weight] = torch.full_like(_tensor(graph, gain.weight), 1 - gain.offset)
    if gain.bias is not None:
        b_k, g_k = _tensor(graph, gain.bias).double(), _factor(graph, gain)
        if ((g_k == 0) & (b_k != 0)).any():
            raise QlabError(
                f"{full_name(graph.path, gain.weight or '')} is 0 where {gain.bias} is not, so no "
                "bias in another basis stands for it; leave rotate_residual out"
            )
        shift_k = torch.where(b_k == 0, 0.0, b_k / torch.where(g_k == 0, 1.0, g_k))
        # as wide as the gain, beside which a norm reads it
        leaves[gain.bias] = (shift_k @ R).to(_tensor(graph, gain.bias).dtype)
    return leaves


def _factor(graph: ModuleGraph, gain: Gain) -> Tensor:
    """g [k] in float64."""
    assert gain.weight is not None
    return _tensor(graph, gain.weight).double() + gain.offset


def _tensor(graph: ModuleGraph, path: str) -> Tensor:
    leaf = graph.params[path]
    assert isinstance(leaf, Tensor)  # of norms, biases and tables, which no step rounds
    return leaf
