"""Weights that are made dense once for several runs of a segment."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.leaf import Fetched, Structured


@dataclass(frozen=True)
class _Once:
    """A leaf that is made dense once in each dtype, and shared by all runs from then on."""

    leaf: Structured
    made: dict[torch.dtype | None, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> torch.Size:
        return self.leaf.shape

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        if dtype not in self.made:
            self.made[dtype] = self.leaf.dense(dtype)
        return self.made[dtype]

    def bits(self) -> float:
        return self.leaf.bits()


pytree.register_pytree_node(_Once, lambda once: ([once.leaf], None), lambda parts, _: _Once(*parts))


def dense_once(graph: ModuleGraph) -> ModuleGraph:
    """The segment for several runs, whose weights are made dense in the first one and stay so, but
    for those of experts, of which one is dense at a time, and those that lie elsewhere."""

    def once(leaf: Any) -> Any:
        stays = isinstance(leaf, Tensor | Fetched) or len(leaf.shape) != 2
        return leaf if stays else _Once(leaf)

    return replace(graph, params={name: once(leaf) for name, leaf in graph.params.items()})
