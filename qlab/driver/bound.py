"""Binds of a recipe measured: what each returns takes its place, and what the steps in front of it
made is kept."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.bind import Bind, digest, marked, returned
from qlab.algebra.leaf import dense
from qlab.algebra.transform import keep
from qlab.driver.job import Job, Resolved
from qlab.driver.kept import Kept, solved_in_order
from qlab.driver.model import Model, loaded_around
from qlab.driver.outside import rounded_outside
from qlab.driver.plan import plan_of
from qlab.driver.ranks import Ranks
from qlab.errors import QlabError, first_line
from qlab.model.loading import drop_outside
from qlab.model.skeleton import Skeleton


def resolved(job: Job, ranks: Ranks) -> Job:
    """The job with plain stages alone: its binds are measured from the left, each on the model
    that the stages in front of it make. A job without binds is as it was. ranks: those that make
    that model together."""
    while job.measures:
        first = next(i for i, stage in enumerate(job.recipe) if isinstance(stage, Bind))
        job = _bound(job, first, ranks)
    return job


def _bound(job: Job, first: int, ranks: Ranks) -> Job:
    """The job with the bind at this place measured, and with the stages in front of it done."""
    bind = job.recipe[first]
    assert isinstance(bind, Bind)
    front = replace(job, recipe=job.recipe[:first], codec=None, target=None)
    begun, rounded = job.begun, dict[str, Tensor]()
    if front.recipe:
        skeleton = Skeleton(job.model, job.dtype or job.model.running_dtype, job.device)
        if job.done < first:
            begun = _kept(skeleton, front, bind, ranks)
        around = rounded_outside(skeleton, front.recipe)
        rounded = {name: dense(leaf, torch.float32) for name, leaf in around}
    wide = Skeleton(job.model, torch.float32, job.device)
    loaded = loaded_around(wide)
    model = Model(
        front,
        wide,
        begun,
        loaded=loaded,
        rounded=rounded,
        bind=bind,
        ranks=ranks if bind.divided else Ranks(),
    )
    started = time.perf_counter()
    value = _value(bind, model, ranks)
    seconds = {**job.seconds, f"{bind.name} {first}": time.perf_counter() - started}
    then = _called(bind, "then", lambda: returned(bind, value))
    drop_outside(wide)  # modules refer to each other, so that they outlive this
    recipe = (*front.recipe, marked(bind, value), *then, *job.recipe[first + 1 :])
    done = {"recipe": recipe, "stages": first + 1, "blocks": begun, "measured": seconds}
    return Resolved(**{**vars(job), **done})


def _value(bind: Bind, model: Model, ranks: Ranks) -> Any:
    """What is measured: by all ranks together, or by rank 0, which tells the others."""

    def measure() -> Any:
        return _called(bind, "measure", lambda: bind.measure(model))

    if not bind.divided:
        return ranks.first(measure)
    value = measure()
    told = ranks.all_told(digest(bind.name, value))
    other = next((rank for rank, theirs in enumerate(told) if theirs != told[0]), None)
    if other is not None:
        raise QlabError(
            f"the bind {bind.name!r} is divided among ranks, and rank {other} measured another "
            "value than rank 0; use machines with one kind of processor, and hand what is noted of "
            "windows to `model.of_all_windows`, or do without divided=True"
        )
    return value


def _kept(skeleton: Skeleton, front: Job, bind: Bind, ranks: Ranks) -> Kept:
    """The blocks behind the stages in front of a bind."""
    # stands for the stages behind the bind, for whom targets are kept
    behind = tuple(replace(stage, scope=bind.scope) for stage in keep())
    kept, experts_at_once = (
        Kept(front.recipe, front.offload),
        plan_of(front, skeleton).experts_at_once,
    )
    for block in solved_in_order(skeleton, front, experts_at_once, behind, ranks):
        kept.put(skeleton, block)
        del block
    return kept


def _called(bind: Bind, part: str, run: Callable[[], Any]) -> Any:
    """What a function of the bind returns. An error of its own is explained."""
    try:
        with torch.enable_grad():
            return run()
    except (QlabError, OSError, RecursionError, MemoryError):
        raise
    except Exception as error:  # whatever the function raises
        raise QlabError(
            f"the bind {bind.name!r} failed in {part}: {type(error).__name__}: "
            f"{first_line(error)}; mend that function"
        ) from error
