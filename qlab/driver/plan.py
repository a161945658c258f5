"""What a recipe will do to a model, and whether it can, before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.algebra.spec import Float, Spec
from qlab.algebra.stats import STATS
from qlab.algebra.transform import Transform
from qlab.codecs import CODECS
from qlab.data.calibration import Data
from qlab.driver.admissible import Admission, check_scope, check_specs, refuse_unread, specs_of
from qlab.driver.duration import SPREAD, Work, said, work_of
from qlab.driver.effects import input_specs, online_of, refuse_unheld, refuse_without_effect
from qlab.driver.job import CODEC
from qlab.driver.memory import predict_memory
from qlab.driver.observe import DRIFT, Inputs, inputs_named, runs_reference
from qlab.driver.report import describe
from qlab.driver.shared import refuse_dividing
from qlab.driver.sites import Sites, sites_of
from qlab.driver.solve import in_order
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.record import bits_per_weight
from qlab.model.linears import by_module, unbuilt
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import refuse_uncounted
from qlab.process.shown import Shown, size, some
from qlab.process.surroundings import undisturbed

MiB = 1 << 20


@dataclass(frozen=True, repr=False, kw_only=True)
class Plan(Shown):
    """stages: the recipe in words. sites: name -> spec, shape, bits per weight and number of
    experts. passes: forward passes over the calibration data, the reference's among them.
    statistics: what is observed. memory: predicted bytes by what holds them. experts_at_once: of
    how many experts statistics are held at a time (None: of all). work: what the run will compute,
    of which `seconds` estimates a time (None: not on a processor)."""

    stages: Sequence[Mapping[str, str]]
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
        table = Table("stage", "spec", "settings", "sites", title="plan", title_justify="left")
        for stage in self.stages:
            table.add_row(stage["stage"], stage["spec"], stage["detail"], stage["scope"])
        yield table
        yield (
            f"{len(self.sites) - sum(r['spec'] is None for r in self.sites.values())} weights "
            f"quantized, {self.bits_per_weight:.3f} bits per weight"
        )
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
) -> Plan:
    """Stages, passes, statistics, predicted peak memory, bits per weight and what stays
    unquantized.

    Refuses by site or pattern name what cannot work: groups that do not divide, patterns without a
    site, sites without a rule, weights rounded twice, inputs split under a reparametrization, what
    the codec's format cannot hold, and what the engine `target` (a name in qlab.codecs.engines)
    does not load, with the nearest that it does. memory: bytes into which the statistics of experts
    are to fit, a part of the experts at a time; `Plan.check` says whether they do. The other
    arguments are those of `quantize`. skeleton: the model around its blocks, where one is there.
    """
    inputs_named(inputs)
    _refuse_model(model, codec)
    needs = _needs(recipe, data)
    observed = data if needs else None
    skeleton = skeleton or Skeleton(model, dtype or model.running_dtype, device)
    skeleton.refuse_missing()
    refuse_uncounted(skeleton)
    if data is not None:
        skeleton.check_length(data.longest)
    found = sites_of(skeleton, recipe, data)
    specs = specs_of(recipe, found.sites)
    for stage in recipe:
        refuse_unread(stage, found.unread)
        check_scope(stage, found)
    refuse_dividing(skeleton, recipe, found, specs)
    check_specs(specs, found, Admission(skeleton=skeleton, codec=codec, target=target))
    CODECS[codec].config(by_module(skeleton, specs))  # refused now rather than when all is written
    refuse_without_effect(recipe, found.sites, inputs)
    at_inputs = online_of(recipe, found.sites)
    refuse_unheld(at_inputs, specs, found.sites, codec)
    rows = _rows(found, specs, model.dtype)
    for name, rounding in input_specs(at_inputs).items():
        rows[name]["inputs"] = rounding
    others = [name for name in skeleton.linears() if name not in found.sites]
    left = [*others, *found.beside, *unbuilt(skeleton)]
    in_parts = all(
        in_order(code, recipe, inputs, calibrate_all_experts) for code in found.codes.values()
    )
    fused = [name for name, site in found.sites.items() if in_parts and site.route]

    def predict(at_once: int | None) -> dict[str, int]:
        return predict_memory(
            skeleton,
            found.codes,
            found.shapes,
            observed,
            recipe,
            inputs,
            calibrate_all_experts,
            at_once,
        )

    experts = max((found.shapes[name][0] for name in fused), default=0)
    at_once, held = _fitting(memory, experts, predict)
    passes = (1 if in_parts else 2) + runs_reference([recipe], inputs) if needs else 0
    work = work_of(
        found.codes,
        found.shapes,
        observed,
        recipe,
        passes,
        calibrate_all_experts,
        skeleton.dtype,
        sum(tensor.nbytes for tensor in model.stored.values()),
    )
    return Plan(
        stages=describe(recipe),
        sites=rows,
        unquantized=[*left, *(name for name, spec in specs.items() if spec is None)],
        passes=passes,
        tokens=observed.count if observed is not None else 0,
        statistics=needs,
        memory=held,
        experts_at_once=at_once,
        work=work if skeleton.device.type == "cpu" else None,
    )


def _refuse_model(model: Checkpoint, codec: str) -> None:
    """Refuse a model that is quantized already, and a format that qlab does not write."""
    if codec not in CODECS:
        raise QlabError(f"the codec {codec!r} is unknown; qlab writes {', '.join(CODECS)}")
    if any(spec and not isinstance(spec, Float) for spec in model.quantized.values()):
        raise QlabError(f"{model.path} is quantized already; start from the unquantized model")
    online = [extra for extra in model.extras if extra.online]
    if online:
        raise QlabError(
            f"{model.path} has a {online[0].key} ({online[0].says}) that belongs to its present "
            "weights; start from the unquantized model"
        )


def _needs(recipe: Transform, data: Data | None) -> list[str]:
    """The statistics that a recipe asks for; refuses one that rounds nothing, and one that cannot
    be observed."""
    if all(stage.spec is None for stage in recipe):
        raise QlabError(
            "the recipe rounds no weight, so there is nothing to write; add a method such as "
            "rtn(spec)"
        )
    needs = sorted({need for stage in recipe for need in stage.needs})
    known = STATS.keys() | DRIFT
    unknown = [need for need in needs if need not in known]
    if unknown:
        raise QlabError(
            f"the recipe asks for a statistic {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
    if needs and data is None:
        raise QlabError(f"the recipe observes {', '.join(needs)} and no calibration text was given")
    return needs


def _rows(
    found: Sites, specs: Mapping[str, Spec | None], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """Per site: what it becomes. dtype: of the weights that stay as they are."""
    rows: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        shape = found.shapes[name]
        dense = 8.0 * dtype.itemsize
        rows[name] = {
            "spec": str(spec) if spec else None,
            "shape": list(shape),
            "bits_per_weight": spec.bits_per_weight(shape, dtype) if spec else dense,
        }
        if found.sites[name].route:
            rows[name]["experts"] = shape[0]
    return rows


def _fitting(
    memory: int | None, experts: int, predict: Callable[[int | None], dict[str, int]]
) -> tuple[int | None, dict[str, int]]:
    """Of how many experts statistics are held at a time, the most that fit, and what is held then:
    halves, until there is one."""
    at_once, held = None, predict(None)
    while memory is not None and sum(held.values()) > memory and experts > 1:
        experts = at_once = -(-experts // 2)
        held = predict(at_once)
    return at_once, held
