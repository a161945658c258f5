"""What a recipe will do to a model, and whether it can, before anything runs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from qlab.algebra.block import BLOCK_IO
from qlab.algebra.spec import Float, Spec
from qlab.algebra.stats import name_of, stat_of
from qlab.algebra.transform import Transform
from qlab.codecs import CODECS, quantization_of
from qlab.data.calibration import Data
from qlab.driver.admissible import (
    Admission,
    check_specs,
    check_tiles,
    refuse_misfits,
    refuse_unrounded,
)
from qlab.driver.among import refuse_choices
from qlab.driver.duration import passes_of_learning, work_of
from qlab.driver.effects import (
    online_of,
    refuse_unheld,
    refuse_unheld_leaves,
    refuse_unheld_values,
    refuse_without_effect,
)
from qlab.driver.expense import expenses, undeclared
from qlab.driver.foreseen import Measured, foreseen
from qlab.driver.framed import refuse_unturnable
from qlab.driver.job import CODEC, Job
from qlab.driver.lending import sharing_expenses
from qlab.driver.measuring import measuring
from qlab.driver.observe import Inputs, inputs_named
from qlab.driver.outcome import rows_of, unquantized
from qlab.driver.per_rank import memory_of_rank
from qlab.driver.planned import Plan
from qlab.driver.reach import check_scope, refuse_unread, specs_of, warn_of_crossed
from qlab.driver.report import describe
from qlab.driver.schedule import Row, rounds, schedule, warn_of_unseen
from qlab.driver.sharded import can_be_sharded
from qlab.driver.shared import refuse_dividing
from qlab.driver.sites import Sites, sites_of
from qlab.driver.tried import tried
from qlab.driver.turned import refuse_late_turns, refuse_lost_turns
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.headers import refuse_missing
from qlab.model.linears import by_module
from qlab.model.running import check_length
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import refuse_uncounted
from qlab.process.surroundings import undisturbed

MOST_RANKS = 100_000


@undisturbed
@torch.no_grad()
def plan(
    model: Checkpoint,
    recipe: Transform,
    data: Data | None = None,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    calibrate_all_experts: bool = False,
    skeleton: Skeleton | None = None,
    codec: str = CODEC,
    target: str | None = None,
    memory: int | None = None,
    offload: str | Path | None = None,
    ranks: int = 1,
) -> Plan:
    """What `quantize` would do with the same arguments, and what it would cost. Runs no block.

    Args:
        model: The model that is to be quantized.
        recipe: The stages, applied to each block in their order.
        data: Calibration tokens, or samples of images and text; None for recipes that need no
            statistics.
        inputs: See `quantize`.
        dtype: See `quantize`.
        device: See `quantize`.
        calibrate_all_experts: See `quantize`.
        skeleton: The model without its weights, where the caller has built it already.
        codec: The format that is to be written, a name in `qlab.codecs.CODECS`.
        target: The engine that is to load the directory, a name in `qlab.codecs.engines`, or None.
        memory: A bound in bytes into which the statistics of experts are to fit, some experts at a
            time; `Plan.check` says whether they do. None sets no bound.
        offload: See `quantize`; of a plan it changes the memory.
        ranks: The processes that are to share the run, as torchrun starts them. Memory is that of
            the one that needs most, and the bound is for each of them.

    Returns:
        The stages, the weights with their specs, the weights that stay, the passes over the data,
        the bits per weight, the predicted peak of memory in bytes and an estimate of the seconds.

    Raises:
        QlabError: What cannot work, by the name of its site or pattern: groups that do not divide,
            a pattern without a site, a site without a rule, a weight that is rounded twice, inputs
            that a reparametrization would split, and what the format or the engine does not hold,
            with the nearest spec that it does.

    Example:
        >>> import qlab
        >>> plan = qlab.plan(qlab.open("demo"), qlab.rtn("int4-g64"))
        >>> plan.bits_per_weight, plan.passes
        (4.25, 0)
    """
    job = Job(
        model=model,
        recipe=recipe,
        data=data,
        inputs=inputs,
        calibrate_all_experts=calibrate_all_experts,
        dtype=dtype,
        device=device,
        memory=memory,
        codec=codec,
        target=target,
        offload=offload,
    )
    return plan_of(job, skeleton, ranks)


def plan_of(
    job: Job, skeleton: Skeleton | None = None, ranks: int = 1, process: int | None = None
) -> Plan:
    """The plan of a job for so many ranks. skeleton: the model around its blocks, where one is
    there. process: bytes of the largest process of them, so that all plan alike; None stands for
    those of this one."""
    if not 1 <= ranks <= MOST_RANKS:
        raise QlabError(f"ranks is {ranks}; give the number of processes, from 1 to {MOST_RANKS}")
    _refuse_job(job)
    skeleton = skeleton or Skeleton(job.model, job.dtype or job.model.running_dtype, job.device)
    _refuse_model(job, skeleton)
    refuse_choices(job, lambda choice: plan_of(choice, skeleton, ranks, process))
    sites = sites_of(skeleton, job.recipe, job.data)
    specs = _checked_specs(job, skeleton, sites)
    measured = foreseen(job, sites)
    fitting = _fitting(job, skeleton, sites, measured, ranks, process)
    rows = schedule(job, sites, measured)
    warn_of_unseen(rows)
    warn_of_crossed(job.recipe, sites)
    passes = _passes(job, sites, rows)
    work = work_of(job, sites, skeleton.dtype, passes, measured)
    learning = passes_of_learning(job)
    of_blocks = expenses(job, sites, passes, learning, ranks, skeleton.dtype.itemsize)
    if fitting.is_sharded:
        of_blocks += sharing_expenses(job, skeleton, sites, ranks)
    of_pass = sum(e.operations for e in of_blocks if e.stage == "forward") / max(passes, 1)
    return Plan(
        stages=describe(job.recipe),
        schedule=rows,
        sites=rows_of(job, sites, specs),
        unquantized=unquantized(skeleton, sites, specs),
        passes=passes,
        tokens=job.observed.count if job.observed is not None else 0,
        statistics=job.statistics,
        memory=fitting.memory,
        experts_at_once=fitting.experts_at_once,
        is_sharded=fitting.is_sharded,
        work=work if skeleton.device.type == "cpu" else None,
        ranks=ranks,
        expenses=(*of_blocks, *measuring(job, sites, measured, ranks, of_pass)),
        blocks=len(sites.codes),
        undeclared=undeclared(job),
    )


def _refuse_job(job: Job) -> None:
    """Refuse what can be refused without the model: names that are unknown, a model that is
    quantized already, a recipe that rounds nothing and one that cannot be observed."""
    inputs_named(job.inputs)
    if job.codec is not None and job.codec not in CODECS:
        raise QlabError(f"the codec {job.codec!r} is unknown; qlab writes {', '.join(CODECS)}")
    _refuse_quantized(job.model)
    if job.codec is not None and not job.measures:
        refuse_unrounded(job.recipe, job.codec)
    needs = {need for stage in job.recipe for need in stage.needs} - {BLOCK_IO}
    for need in sorted(needs, key=name_of):
        stat_of(need, experts=False)  # refuses names that no statistic has
    if job.statistics and job.data is None:
        raise QlabError(
            f"the recipe observes {', '.join(job.statistics)} and no calibration text was given"
        )


def _refuse_quantized(model: Checkpoint) -> None:
    if any(spec and not isinstance(spec, Float) for spec in model.quantized.values()):
        raise QlabError(f"{model.path} is quantized already; start from the unquantized model")
    online = [extra for extra in model.extras if extra.online]
    if online:
        raise QlabError(
            f"{model.path} has a {online[0].key} ({online[0].says}) that belongs to its present "
            "weights; start from the unquantized model"
        )


def _refuse_model(job: Job, skeleton: Skeleton) -> None:
    """Refuse files without all of the model, and samples that are too long for it."""
    refuse_missing(skeleton.names)
    refuse_uncounted(skeleton)
    if job.data is not None:
        check_length(skeleton, job.data.longest)


def _checked_specs(job: Job, skeleton: Skeleton, sites: Sites) -> dict[str, Spec | None]:
    """Site -> what it is rounded to (None: it stays); refuses what the recipe, the format or the
    engine does not allow."""
    specs = specs_of(job.recipe, sites.sites)
    for stage in job.recipe:
        refuse_unread(stage, sites.unread)
        check_scope(stage, sites)
    refuse_misfits(job.recipe, sites)
    refuse_dividing(skeleton, job.recipe, sites, specs)
    unknown = job.measures and not any(specs.values())  # what a bind will return
    if job.codec is None or unknown:
        check_tiles(specs, sites)
    else:
        dtype = skeleton.checkpoint.dtype
        admission = Admission(codec=job.codec, dtype=dtype, target=job.target)
        check_specs(specs, sites, skeleton, admission)
        # refuses now what no configuration could say when all is written
        quantization_of(CODECS[job.codec], by_module(skeleton, specs))
    refuse_lost_turns(job.recipe)
    if job.inputs == "quantized" and not job.calibrate_all_experts:
        refuse_late_turns(job.recipe, sites.codes)
    refuse_without_effect(job.recipe, sites.sites, job.inputs)
    refuse_unturnable(skeleton, job.recipe, sites.codes, sites.sites)
    made = tried(job, sites, skeleton.dtype, skeleton.device)
    if job.codec is not None:
        online = {**made, **online_of(job.recipe, sites)}
        refuse_unheld(online, specs, sites.sites, job.codec, job.target)
        refuse_unheld_leaves(job.recipe, sites.sites, job.codec)
        refuse_unheld_values(job.recipe, sites.codes, job.codec, job.target)
    return specs


class _Fitting(NamedTuple):
    """The memory that is predicted, and what makes it so: of how many experts statistics are held
    at a time, and whether each rank has some rows of a block's weights."""

    memory: dict[str, int]
    experts_at_once: int | None = None
    is_sharded: bool = False


def _fitting(
    job: Job,
    skeleton: Skeleton,
    sites: Sites,
    measured: Measured,
    ranks: int,
    process: int | None,
) -> _Fitting:
    """The first of these that fits: all experts at once; ever fewer of them; a block that is
    sharded. The last of them where that takes less."""
    experts = 0
    if all(map(job.source_by_source, sites.codes.values())):
        fused = [sites.shapes[name][0] for name, site in sites.sites.items() if site.route]
        experts = max(fused, default=0)
    predict = partial(memory_of_rank, job, skeleton, sites, measured, ranks, process=process)
    at_once, memory = None, predict(experts_at_once=None)
    while job.memory is not None and sum(memory.values()) > job.memory and experts > 1:
        experts = at_once = -(-experts // 2)
        memory = predict(experts_at_once=at_once)
    whole = _Fitting(memory, at_once)
    if job.memory is None or sum(memory.values()) <= job.memory or ranks == 1:
        return whole
    if not all(can_be_sharded(job, path, code) for path, code in sites.codes.items()):
        return whole
    sharded = _Fitting(predict(experts_at_once=None, is_sharded=True), is_sharded=True)
    return min(whole, sharded, key=lambda fitting: sum(fitting.memory.values()))


def _passes(job: Job, sites: Sites, rows: Sequence[Row]) -> int:
    """Forward passes over the samples: where sources are not solved in order, a block is run
    whenever a step observes, and again when it is solved; the reference's pass comes on top."""
    if job.observed is None:
        return 0
    in_order = all(map(job.in_order, sites.codes.values()))
    observing = rounds(rows) if in_order else max(1, rounds(rows))
    return observing + 1 + job.runs_reference
