"""The statistics of what enters the sites of a segment, over all batches."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from qlab.algebra.experts import Rows, reaching
from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import inputs_of
from qlab.algebra.stats import STATS, Observation, Stats, stat_of
from qlab.algebra.transform import Transform
from qlab.driver.batches import Batch, Batches
from qlab.errors import QlabError

DRIFT = {"drift"}  # statistics that compare with the reference
Inputs = Literal["quantized", "reference"]  # what a block sees while it is calibrated


def inputs_named(text: str) -> Inputs:
    """One of the two; anything else is refused."""
    if text not in get_args(Inputs):
        raise QlabError(
            f"inputs {text!r} are unknown; choose {' or '.join(map(repr, get_args(Inputs)))}"
        )
    return cast(Inputs, text)


def runs_reference(recipes: Iterable[Transform], inputs: Inputs) -> bool:
    """Whether the reference runs beside the quantized model, since a recipe asks how far inputs are
    from its own."""
    return inputs == "quantized" and any(
        DRIFT & stage.needs for recipe in recipes for stage in recipe
    )


@dataclass(frozen=True)
class Reference:
    """The unquantized segment, and what it is called with in the unquantized model, batch by batch
    beside the quantized one's."""

    graph: ModuleGraph
    batches: Batches


def observe(
    graph: ModuleGraph,
    wanted: set[tuple[str, str]],
    batches: Iterator[Batch],
    calibrate_all_experts: bool = False,
    reference: Reference | None = None,
) -> Stats:
    """The statistics `wanted` {(source, name)} of a segment's inputs over all batches; experts' are
    of their own tokens, or, with `calibrate_all_experts`, of all tokens. reference: where the drift
    is measured from (None: there is none).

    Refuses NaN and Inf in activations, naming the sites they reach.
    """
    sources, drifting = (
        sorted({source for source, need in wanted if need in names}) for names in (STATS, DRIFT)
    )
    seen = Seen(graph, wanted)
    others = reference.batches() if reference and drifting else repeat(None)
    for (call, state), other in zip(batches, others):
        pairs = (
            inputs_of(reference.graph, drifting, *other[0].inputs(other[1]))
            if reference and other
            else {}
        )
        seen.add(inputs_of(graph, sources, *call.inputs(state), calibrate_all_experts), pairs)
    return seen.stats


class Seen:
    """Statistics as they grow, batch by batch; of experts, those of all or of some."""

    def __init__(
        self, graph: ModuleGraph, wanted: set[tuple[str, str]], experts: slice | None = None
    ):
        self.graph, self.wanted, self.experts = graph, wanted, experts
        self.tokens = dict.fromkeys((source for source, _ in wanted), 0)
        self.stats: dict[tuple[str, str], Any] = {}

    def add(self, inputs: Mapping[str, Rows], reference: Mapping[str, Rows] = {}) -> None:
        """One batch: source -> what reaches its sites, and what does in the reference where that is
        another model."""
        for source, rows in inputs.items():
            before = self.tokens[source]
            self.tokens[source] += (
                rows.x[..., 0].numel() if rows.tokens is None else int(rows.tokens.max()) + 1
            )
            rows = rows if self.experts is None else reaching(rows, self.experts)
            x_nk = rows.x.flatten(0, -2)
            if (
                not x_nk.sum().isfinite() and not torch.isfinite(x_nk).all()
            ):  # the sum is the cheaper question
                _refuse_nonfinite(self.graph, source, x_nk.dtype)
            numbers = (
                torch.arange(len(x_nk), device=x_nk.device) if rows.tokens is None else rows.tokens
            )
            pair = reference[source].x.flatten(0, -2) if source in reference else None
            observation = Observation(x_nk, numbers + before, rows.ends, pair)
            for name in sorted(n for s, n in self.wanted if s == source):
                stat, key = stat_of(name, rows.ends is not None), (source, name)
                state = stat.lift(observation)
                self.stats[key] = (
                    stat.combine(self.stats[key], state) if key in self.stats else state
                )


def _refuse_nonfinite(graph: ModuleGraph, source: str, dtype: torch.dtype) -> None:
    """Name what is to blame: the segment's own leaves where they hold NaN or Inf, else the sites
    that NaN or Inf reaches."""
    if bad := [
        n
        for n, leaf in graph.params.items()
        if isinstance(leaf, Tensor) and not torch.isfinite(leaf).all()
    ]:
        raise QlabError(
            f"{', '.join(f'{graph.path}.{n}' for n in bad)} holds NaN or Inf; repair the checkpoint"
        )
    at = ", ".join(graph.where(s) for s in graph.code.sites if s.source == source)
    raise QlabError(
        f"the activations that reach {at} hold NaN or Inf; check the model in this dtype ({dtype})"
    )
