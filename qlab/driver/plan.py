"""What a recipe will do to a model, and whether it can, before anything runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

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
from qlab.driver.duration import SPREAD, Work, said, work_of
from qlab.driver.effects import (
    online_of,
    refuse_unheld,
    refuse_unheld_leaves,
    refuse_unheld_values,
    refuse_without_effect,
)
from qlab.driver.foreseen import Measured, foreseen
from qlab.driver.framed import refuse_unturnable
from qlab.driver.job import CODEC, Job
from qlab.driver.memory import predict_memory
from qlab.driver.observe import Inputs, inputs_named
from qlab.driver.outcome import rows_of, unquantized
from qlab.driver.reach import check_scope, refuse_unread, specs_of, warn_of_crossed
from qlab.driver.report import describe
from qlab.driver.schedule import Row, rounds, schedule, warn_of_unseen
from qlab.driver.shared import refuse_dividing
from qlab.driver.sites import Sites, sites_of
from qlab.driver.tried import tried
from qlab.driver.turned import refuse_late_turns, refuse_lost_turns
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.record import bits_per_weight
from qlab.model.headers import refuse_missing
from qlab.model.linears import by_module
from qlab.model.running import check_length
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import refuse_uncounted
from qlab.process.shown import Shown, size, some
from qlab.process.surroundings import undisturbed

MiB = 1 << 20


@dataclass(frozen=True, repr=False, kw_only=True)
class Plan(Shown):
    """What a job would do, and what it would cost.

    Args:
        stages: The recipe in words.
        schedule: Its steps in the order in which they run, with what each sees and asks for.
        sites: Site -> its spec, shape, bits per weight and number of experts.
        unquantized: The weights that stay.
        passes: Forward passes over the calibration data, those of the unquantized model included.
        tokens: The number of calibration tokens.
        statistics: The names of the statistics that are observed.
        memory: What takes memory -> the predicted bytes.
        experts_at_once: The number of experts whose statistics are held at a time; None for all.
        work: The operations of the run, from which `seconds` estimates a time; None on a GPU.
    """

    stages: Sequence[Mapping[str, str]]
    schedule: Sequence[Row]
    sites: Mapping[str, Mapping[str, Any]]
    unquantized: Sequence[str]
    passes: int
    tokens: int
    statistics: Sequence[str]
    memory: Mapping[str, int]
    experts_at_once: int | None = None
    work: Work | None = None

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Between which times the run is expected to end, on this machine when nothing else runs on
        it, without the start of the process and the reading of texts. Probes of some milliseconds
        measure its rates when this is first asked for: qlab.driver.duration."""
        if self.work is None:
            return None
        estimate = self.work.seconds()
        return estimate * SPREAD[0], estimate * SPREAD[1]

    @property
    def _time(self) -> str:
        if self.seconds is None:
            return "none is estimated for a GPU"
        threads = torch.get_num_threads()
        with_them = (
            f"{threads} threads of this processor"
            if threads > 1
            else "one thread of this processor"
        )
        return (
            f"{said(self.seconds[0])} to {said(self.seconds[1])} with {with_them}, if nothing "
            "else runs on it"
        )

    @property
    def bits_per_weight(self) -> float:
        """Over all sites; those that stay unquantized count in full."""
        return bits_per_weight(self.sites)

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of the process."""
        return sum(self.memory.values())

    def check(self, memory: int | None) -> None:
        """Refuse a plan that needs more than `memory` bytes."""
        if memory is not None and self.peak_bytes > memory:
            largest = max(self.memory, key=lambda k: self.memory[k])
            raise QlabError(
                f"the plan needs {self.peak_bytes / MiB:.0f} MiB and the budget is "
                f"{memory / MiB:.0f} MiB (most of it: {largest}); give more memory, or fewer or "
                "shorter samples"
            )

    def summary(self) -> dict[str, str]:
        """Without the sites."""
        stages = [
            " ".join(filter(None, (s["stage"], s["spec"], f"({s['scope']})"))) for s in self.stages
        ]
        quantized = sum(row["spec"] is not None for row in self.sites.values())
        return {
            "stages": "; ".join(stages),
            "weights": f"{quantized} quantized, {self.bits_per_weight:.3f} bits per weight",
            "stays unquantized": some(self.unquantized) or "nothing",
            "passes": (
                f"{self.passes} over {self.tokens:,} tokens; statistics: "
                f"{', '.join(self.statistics) or 'none'}"
            ),
            "predicted peak memory": size(self.peak_bytes),
            "estimated time": self._time,
        }

    def json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "stages": list(self.stages),
            "schedule": [row.json() for row in self.schedule],
            "sites": dict(self.sites),
            "unquantized": list(self.unquantized),
            "passes": self.passes,
            "tokens": self.tokens,
            "statistics": list(self.statistics),
            "memory": dict(self.memory),
            "experts_at_once": self.experts_at_once,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds and list(self.seconds),
            "bits_per_weight": self.bits_per_weight,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = ("step", "spec", "settings", "sees", "where", "sites", "observes", "runs")
        table = Table(*heads, title="plan", title_justify="left")
        table.columns[0].no_wrap = True
        for row in self.schedule:
            observes = ", ".join(row.observes)
            table.add_row(
                row.step, row.spec, row.detail, row.sees, row.place, row.reached, observes, row.asks
            )
        yield table
        yield (
            f"{len(self.sites) - sum(r['spec'] is None for r in self.sites.values())} weights "
            f"quantized, {self.bits_per_weight:.3f} bits per weight"
        )
        for row in self.schedule:
            if row.unseen:
                yield f"{row.step} sees no attention in: {', '.join(row.unseen)}"
        yield f"stays unquantized: {', '.join(self.unquantized) or 'nothing'}"
        yield (
            f"{self.passes} passes over {self.tokens:,} tokens; statistics: "
            f"{', '.join(self.statistics) or 'none'}"
        )
        if self.experts_at_once:
            yield f"statistics of {self.experts_at_once} experts at a time"
        parts = ", ".join(f"{name} {size / MiB:.0f}" for name, size in self.memory.items())
        yield f"predicted peak memory: {self.peak_bytes / MiB:.0f} MiB ({parts})"
        yield f"estimated time: {self._time}"


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
        offload: See `quantize`; changes nothing of a plan.

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
    return plan_of(job, skeleton)


def plan_of(job: Job, skeleton: Skeleton | None = None) -> Plan:
    """The plan of a job. skeleton: the model around its blocks, where one is there."""
    _refuse_job(job)
    skeleton = skeleton or Skeleton(job.model, job.dtype or job.model.running_dtype, job.device)
    _refuse_model(job, skeleton)
    refuse_choices(job, lambda choice: plan_of(choice, skeleton))
    sites = sites_of(skeleton, job.recipe, job.data)
    specs = _checked_specs(job, skeleton, sites)
    measured = foreseen(job, sites)
    experts_at_once, memory = _fitting(job, skeleton, sites, measured)
    rows = schedule(job, sites, measured)
    warn_of_unseen(rows)
    warn_of_crossed(job.recipe, sites)
    passes = _passes(job, sites, rows)
    work = work_of(job, sites, skeleton.dtype, passes, measured)
    return Plan(
        stages=describe(job.recipe),
        schedule=rows,
        sites=rows_of(job, sites, specs),
        unquantized=unquantized(skeleton, sites, specs),
        passes=passes,
        tokens=job.observed.count if job.observed is not None else 0,
        statistics=job.statistics,
        memory=memory,
        experts_at_once=experts_at_once,
        work=work if skeleton.device.type == "cpu" else None,
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


def _fitting(
    job: Job, skeleton: Skeleton, sites: Sites, measured: Measured
) -> tuple[int | None, dict[str, int]]:
    """Of how many experts statistics are held at a time, and the memory that is predicted then:
    the experts are halved until the memory fits or one is left."""
    experts = 0
    if all(map(job.source_by_source, sites.codes.values())):
        fused = [sites.shapes[name][0] for name, site in sites.sites.items() if site.route]
        experts = max(fused, default=0)
    at_once, memory = None, predict_memory(job, skeleton, sites, None, measured)
    while job.memory is not None and sum(memory.values()) > job.memory and experts > 1:
        experts = at_once = -(-experts // 2)
        memory = predict_memory(job, skeleton, sites, at_once, measured)
    return at_once, memory


def _passes(job: Job, sites: Sites, rows: Sequence[Row]) -> int:
    """Forward passes over the samples: where sources are not solved in order, a block is run
    whenever a step observes, and again when it is solved; the reference's pass comes on top."""
    if job.observed is None:
        return 0
    in_order = all(map(job.in_order, sites.codes.values()))
    observing = rounds(rows) if in_order else max(1, rounds(rows))
    return observing + 1 + job.runs_reference
