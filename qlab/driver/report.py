"""What a run measured: the rows of its sites, and the peak of its memory."""

import threading
from typing import Any

import psutil
import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.leaf import Structured, proper
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import described
from qlab.algebra.transform import Transform
from qlab.algebra.views import EachWeight, Uncovered
from qlab.files.certificate import DISTANCES
from qlab.files.record import spec_entries


def describe(recipe: Transform) -> list[dict[str, str]]:
    """The stages of a recipe in words."""
    return [
        {
            "stage": s.name,
            "spec": described(s.spec) if s.spec else "",
            "detail": s.detail,
            "scope": str(s.scope),
        }
        for s in recipe
        if not isinstance(s.view, Uncovered)
    ]


def stored_bits(leaf: Tensor | Structured, dtype: torch.dtype) -> float:
    """Bits per weight of a leaf, as a file of this dtype holds it."""
    if isinstance(leaf, Tensor):
        return 8 * dtype.itemsize
    if isinstance(leaf, QTensor):
        return leaf.spec.bits_per_weight(leaf.shape, dtype)
    return leaf.bits() / leaf.shape.numel()


def site_rows(graph: ModuleGraph) -> dict[str, dict[str, Any]]:
    """Per site: spec, shape [o, k], bits per weight and what the stages noted (errors, losses,
    damping, tokens)."""

    def row(site: Site) -> dict[str, Any]:
        assert site.weight is not None
        leaf = graph.params[site.weight]
        codes = proper(leaf)
        operations = graph.online.get(site.path, ())
        rounded = [op.input_spec for op in operations if isinstance(op, QuantizeInput)]
        return {
            **graph.notes.get(site.path, {}),
            **spec_entries(
                codes.spec if isinstance(codes, QTensor) else None,
                rounded[0] if rounded else None,
                dtype=graph.dtype,
            ),
            "shape": list(leaf.shape),
            "bits_per_weight": stored_bits(leaf, graph.stored_dtype(site.weight)),
        }

    return {graph.where(site): row(site) for site in graph.code.sites}


def known_distances(recipe: Transform, graph: ModuleGraph, site: Site) -> dict[str, float] | None:
    """How far a solved weight is from the one in the files, as a certificate says it, where one
    step alone made it: then its errors were measured there. Nothing is measured of a raw stage."""
    path, leaf = graph.where(site), graph.params[site.weight or ""]
    if not isinstance(leaf, QTensor) or leaf.perm is not None or site.route is not None:
        return None
    steps = [stage for stage in recipe if not isinstance(stage.view, Uncovered)]
    # one that sees more than a weight may move what it does not touch, as a scale its producer
    moving = [s.view for s in steps if s.touches(path, site) or not isinstance(s.view, EachWeight)]
    if len(moving) != 1 or not isinstance(moving[0], EachWeight) or not moving[0].by_expert:
        return None
    return {key: graph.notes[site.path][key] for key in DISTANCES}


class PeakMemory:
    """The largest resident set of this process while the context lasts, sampled every 10 ms, in
    bytes."""

    def __enter__(self) -> "PeakMemory":
        self.process, self.done = psutil.Process(), threading.Event()
        self.bytes = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.01):
            self.bytes = max(self.bytes, self.process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, self.process.memory_info().rss)
