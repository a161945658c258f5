"""Operations of inserts that say nothing of them beforehand, made and run once before any work: on
random rows, with statistics of random rows, in one block of each structure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.called import Failed
from qlab.algebra.edges import run_ops
from qlab.algebra.graph import Code, ModuleGraph, Op, open_symbols
from qlab.algebra.running import keys_of, select
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import stat_of
from qlab.algebra.transform import Stage
from qlab.algebra.views import Folded, OnWires
from qlab.algebra.wires import Wire, full_name, open_wires
from qlab.driver.job import Job
from qlab.driver.sites import Sites
from qlab.errors import QlabError, first_line

TOKENS = 8  # of rows where there is no calibration data


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Random rows as the model has them: so many tokens, in this dtype, on this device. shapes:
    full name of a site -> that of its weight."""

    tokens: int
    dtype: torch.dtype
    device: torch.device
    shapes: Mapping[str, torch.Size]

    def drawn(self, *shape: int) -> Tensor:
        source = torch.Generator().manual_seed(0)
        x = torch.randn(shape, generator=source, dtype=torch.float32)
        return x.to(self.device, self.dtype)

    def value(self, wire: Wire, graph: ModuleGraph) -> tuple[Tensor, Tensor | None]:
        """The value of a wire, and where the rows of each expert end."""
        channels = self._channels(wire, graph)
        if wire.of_attention:
            width = channels // int(wire.heads)
            last = (self.tokens, width) if wire.layout == "h n d" else (width, self.tokens)
            return self.drawn(1, int(wire.heads), *last), None
        if wire.site is None or not wire.site.route:
            return self.drawn(1, self.tokens, channels), None
        experts = self.shapes[graph.where(wire.site)][0]
        ends = (torch.arange(experts, device=self.device) + 1) * self.tokens // experts
        return self.drawn(self.tokens, channels), ends

    def _channels(self, wire: Wire, graph: ModuleGraph) -> int:
        if not open_symbols(wire.channels):
            return int(wire.channels)
        if wire.site is None and wire.kind not in ("enter", "leave"):
            return self.tokens  # a number for each token, as scores of attentions are
        # of hidden states, whose program is for any width
        return self.shapes[graph.where(graph.code.sites[0])][-1]


def tried(
    job: Job, sites: Sites, dtype: torch.dtype, device: torch.device
) -> dict[str, tuple[Op, ...]]:
    """Full name of a site -> the operations of undeclared inserts on its input, those that no later
    step may fold. Refuses operations that fail on rows of the wire's shape, return another shape or
    write to what they are given."""
    tokens = job.data.longest if job.data is not None else TOKENS
    rows = _Rows(tokens=tokens, dtype=dtype, device=device, shapes=sites.shapes)
    made: dict[str, tuple[Op, ...]] = {}
    for i, stage in enumerate(job.recipe):
        if not isinstance(stage.view, OnWires) or stage.view.operations:
            continue
        folded = any(isinstance(later.view, Folded) for later in job.recipe[i + 1 :])
        for name, ops in _of_stage(stage, sites, rows).items():
            owner, _, kind = name.rpartition(":")
            if kind == "in" and not folded:
                made[owner] = (*made.get(owner, ()), *ops)
    return made


def _of_stage(stage: Stage, sites: Sites, rows: _Rows) -> dict[str, tuple[Op, ...]]:
    """Full name of a wire -> what the stage puts there."""
    of_code: dict[Code, Mapping[str, tuple[Op, ...]]] = {}
    found: dict[str, tuple[Op, ...]] = {}
    for path, code in sites.codes.items():
        chosen = select(stage, ModuleGraph(code, {}, path))
        wires = open_wires(chosen)
        if wires and code not in of_code:
            of_code[code] = _of_block(stage, chosen, rows)
        names = {wire.name for wire in wires} & of_code.get(code, {}).keys()
        found |= {full_name(path, name): of_code[code][name] for name in names}
    return found


def _of_block(stage: Stage, graph: ModuleGraph, rows: _Rows) -> Mapping[str, tuple[Op, ...]]:
    """Wire -> what the stage puts there. Nothing where it cannot be made of random statistics."""
    try:
        inserts = stage.apply(graph, dict(_statistics(stage, graph, rows)))[0].inserts
    except QlabError:
        if stage.needs:  # what it refuses may be in the numbers, which are drawn here
            return {}
        raise
    except Exception:  # whatever `make` raises is said where it meets the model
        return {}
    for wire in open_wires(graph):
        if wire.of_attention and (open_symbols(wire.heads) or open_symbols(wire.channels)):
            continue  # its program is for any number of heads
        for op in inserts.get(wire.name, ()):
            _try(stage, replace(wire, path=graph.path), op, *rows.value(wire, graph))
    return inserts


def _try(stage: Stage, wire: Wire, op: Op, x: Tensor, ends: Tensor | None) -> None:
    try:
        run_ops(wire, (op,), x, ends)
    except Failed as failed:
        if stage.needs:
            return
        error = failed.__cause__
        assert isinstance(error, Exception)
        raise QlabError(
            f"the stage {stage.name!r} put an operation on {wire.where} that fails on "
            f"{tuple(wire.rows(x).shape)} in {x.dtype}: {type(error).__name__}: "
            f"{first_line(error)}; mend what `make` returns"
        ) from error


def _statistics(stage: Stage, graph: ModuleGraph, rows: _Rows) -> Iterator[tuple[Any, Any]]:
    """The statistics that a stage asks for, of random rows."""
    wires = {wire.key: wire for wire in open_wires(graph)}
    for key, need in keys_of(stage, graph):
        x, ends = rows.value(wires[key], graph)
        x_nk = wires[key].rows(x).flatten(0, -2)
        keys = torch.arange(len(x_nk), device=x_nk.device)
        seen = Observation(x_nk, keys, ends, x_nk, segment=graph.path)
        yield (key, need), stat_of(need, ends is not None).lift(seen)
