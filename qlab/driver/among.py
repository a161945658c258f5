"""Steps that measure and then choose among recipes for each weight: what none of their choices
allows is refused before anything is measured."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch

from qlab.algebra.bind import Bind, narrowed, over_budget
from qlab.driver.job import Job


class Planned(Protocol):
    """What is read of a plan."""

    @property
    def sites(self) -> Mapping[str, Mapping[str, Any]]: ...


def refuse_choices(job: Job, plan_of: Callable[[Job], Planned]) -> None:
    """Plan every choice of the job's binds in the place of its bind, which refuses what cannot
    work, and refuse a budget below that of the smallest ones."""
    for place, stage in enumerate(job.recipe):
        if not isinstance(stage, Bind) or not stage.among:
            continue
        rows = []
        for choice in stage.among:
            if any(step.spec for step in choice):  # one that keeps every weight asks for nothing
                parts = (*job.recipe[:place], *narrowed(stage, choice), *job.recipe[place + 1 :])
                rows.append(plan_of(replace(job, recipe=parts)).sites)
        if stage.budget is not None and len(rows) == len(stage.among):
            least = _least(stage, rows)
            if least > stage.budget:
                raise over_budget(stage.name, least, stage.budget)


def _least(stage: Bind, rows: list[Mapping[str, Mapping[str, Any]]]) -> float:
    """The bits per weight of the smallest choice of each weight that the bind is for."""
    chosen = [
        name for name in rows[0] if name in stage.scope and all(r[name]["spec"] for r in rows)
    ]
    sizes = {name: torch.Size(rows[0][name]["shape"]).numel() for name in chosen}
    bits = sum(sizes[name] * min(r[name]["bits_per_weight"] for r in rows) for name in chosen)
    return bits / max(sum(sizes.values()), 1)
