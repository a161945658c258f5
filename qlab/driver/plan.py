"""What a recipe will do to a model, and whether it can, before anything runs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.algebra.graph import Code, Site, by_origin, is_matrix, tensors_of
from qlab.algebra.spec import Float, Spec, legal_groups, with_scale_dtype
from qlab.algebra.stats import STATS
from qlab.algebra.transform import Stage, Transform
from qlab.codecs import CODECS, refusal_of_transposed
from qlab.codecs.engines import division, refusal, uniformity
from qlab.data.calibration import Data
from qlab.driver.duration import SPREAD, Work, said, work_of
from qlab.driver.effects import input_specs, online_of, refuse_unheld, refuse_without_effect
from qlab.driver.memory import predict_memory
from qlab.driver.outside import outside_sites
from qlab.driver.report import describe
from qlab.driver.sweep import (
    DRIFT,
    Inputs,
    in_batches,
    in_order,
    inputs_named,
    record,
    runs_reference,
)
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.record import bits_per_weight
from qlab.model.linears import by_module, unbuilt
from qlab.model.recording import Call, windows_axis
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import refuse_uncounted
from qlab.process.shown import Shown, size, some
from qlab.process.surroundings import undisturbed

CODEC = "compressed-tensors"  # what is written unless another codec is named
KEEP_THEM = "leave them as they are (--keep PATTERN, or keep() in rules() in Python)"
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
    are to fit, a part of the experts at a time; `Plan.check` says whether they do.
    """
    inputs_named(inputs)
    if codec not in CODECS:
        raise QlabError(f"the codec {codec!r} is unknown; qlab writes {', '.join(CODECS)}")
    if any(spec and not isinstance(spec, Float) for spec in model.quantized.values()):
        raise QlabError(f"{model.path} is quantized already; start from the unquantized model")
    if online := [extra for extra in model.extras if extra.online]:
        raise QlabError(
            f"{model.path} has a {online[0].key} ({online[0].says}) that belongs to its present "
            "weights; start from the unquantized model"
        )
    if all(stage.spec is None for stage in recipe):
        raise QlabError(
            "the recipe rounds no weight, so there is nothing to write; add a method such as "
            "rtn(spec)"
        )
    needs = sorted({need for stage in recipe for need in stage.needs})
    if unknown := [need for need in needs if need not in STATS.keys() | DRIFT]:
        raise QlabError(
            f"the recipe asks for a statistic {unknown[0]!r}; there are "
            f"{', '.join(sorted(STATS.keys() | DRIFT))}"
        )
    if needs and data is None:
        raise QlabError(f"the recipe observes {', '.join(needs)} and no calibration text was given")
    skeleton = skeleton or Skeleton(model, model.running_dtype)
    skeleton.refuse_missing()
    refuse_uncounted(skeleton)
    if data is not None:
        skeleton.check_length(data.longest)
    codes = trace_all(skeleton, data)
    named = {
        f"{path}.{site.path}": (path, site) for path, code in codes.items() for site in code.sites
    }
    around = outside_sites(skeleton)
    named |= {
        name: ("", site)
        for name, site in around.items()
        if any(stage.touches(name, site) for stage in recipe)
    }
    unread = {
        _named(path, leaf): why for path, code in codes.items() for leaf, why in code.unread.items()
    }
    specs = _specs(recipe, named)
    shapes = {name: _shape(skeleton, *at) for name, at in named.items()}
    for stage in recipe:
        _refuse_unread(stage, unread)
        _check_scope(stage, named, codes, around, unread)
    _check_specs(specs, shapes, named, skeleton, codec, target)
    CODECS[codec].config(by_module(skeleton, specs))  # refused now rather than when all is written
    sites = {name: site for name, (_, site) in named.items()}
    refuse_without_effect(recipe, sites, inputs)
    at_inputs = online_of(recipe, sites)
    refuse_unheld(at_inputs, specs, sites, codec)
    rows = {
        n: {
            "spec": str(s) if s else None,
            "shape": list(shapes[n]),
            "bits_per_weight": s.bits_per_weight(shapes[n], model.dtype)
            if s
            else 8.0 * model.dtype.itemsize,
        }
        for n, s in specs.items()
    }
    for name, (_, site) in named.items():
        rows[name] |= {"experts": shapes[name][0]} if site.route else {}
    for name, rounding in input_specs(at_inputs).items():
        rows[name]["inputs"] = rounding
    left = (
        [n for n in skeleton.linears() if n not in named]
        + _beside_sites(skeleton, codes)
        + unbuilt(skeleton)
    )
    tokens = data.count if data is not None and needs else 0
    in_parts = all(in_order(code, recipe, inputs, calibrate_all_experts) for code in codes.values())
    experts = max(shapes[n][0] if in_parts and site.route else 0 for n, (_, site) in named.items())
    at_once, held = _fitting(
        memory,
        experts,
        lambda n: predict_memory(
            skeleton,
            codes,
            shapes,
            data if needs else None,
            recipe,
            inputs,
            calibrate_all_experts,
            n,
        ),
    )
    passes = (1 if in_parts else 2) + runs_reference([recipe], inputs) if needs else 0
    stored = sum(tensor.nbytes for tensor in model.stored.values())
    work = work_of(
        codes,
        shapes,
        data if needs else None,
        recipe,
        passes,
        calibrate_all_experts,
        skeleton.dtype,
        stored,
    )
    return Plan(
        stages=describe(recipe),
        sites=rows,
        unquantized=[*left, *(n for n, s in specs.items() if s is None)],
        passes=passes,
        tokens=tokens,
        statistics=needs,
        memory=held,
        experts_at_once=at_once,
        work=work if skeleton.device.type == "cpu" else None,
    )


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


def trace_all(skeleton: Skeleton, data: Data | None) -> dict[str, Code]:
    """Every block's program, traced on inputs of the form that calibration will have; refuses
    windows of lengths that it is not for."""
    skeleton.load_outside(with_head=False)
    batches = in_batches(data)
    _, (calls,) = record(skeleton, batches[:1])
    skeleton.drop_outside()
    codes = {path: skeleton.code(path, call) for path, call in calls.items()}
    first, *others = dict.fromkeys(batch["input_ids"].shape[1] for batch in batches)
    for path, code in codes.items():
        if others and not _any_length(code, calls[path], batches[0]["input_ids"].shape):
            raise QlabError(
                f"{path} runs other operations on windows of another length, and there are "
                f"windows of {first} and of {others[0]} tokens; give windows of one length"
            )
    return codes


def _any_length(code: Code, call: Call, windows: torch.Size) -> bool:
    """Whether a program is for hidden states of as many tokens as there may be. windows: (how many,
    tokens in each), of the call."""
    hidden = call.entering[0]
    length = windows_axis(hidden, windows) + 1
    tensors = tensors_of(*call.inputs(call.entering))
    return next(sizes[length] is None for t, sizes in zip(tensors, code.inputs) if t is hidden)


def _beside_sites(skeleton: Skeleton, codes: Mapping[str, Code]) -> list[str]:
    """The matrices in blocks that no site multiplies by: filters of each channel, factors."""
    found = []
    for path, code in codes.items():
        held = {name for site in code.sites for name in (site.weight, site.bias)}
        found += [
            _named(path, name)
            for name, p in skeleton.blocks[path].named_parameters()
            if name not in held and is_matrix(p.shape)
        ]
    return found


def _shape(skeleton: Skeleton, path: str, site: Site) -> torch.Size:
    assert site.weight is not None
    shape = skeleton.model.get_parameter(f"{path}.{site.weight}" if path else site.weight).shape
    return torch.Size([*shape[:-2], shape[-1], shape[-2]]) if site.layout.endswith("k o") else shape


def _specs(recipe: Transform, named: Mapping[str, tuple[str, Site]]) -> dict[str, Spec | None]:
    specs: dict[str, Spec | None] = dict.fromkeys(named)
    for stage in recipe:
        if stage.spec is None:
            continue
        for name in named:
            if stage.touches(name, named[name][1]):
                if specs[name] is not None:
                    raise QlabError(
                        f"{name} is rounded by two stages, to {specs[name]} and to {stage.spec}; "
                        "give each site one"
                    )
                specs[name] = stage.spec
    return specs


def _named(path: str, leaf: str) -> str:
    """The full name of a block's weight, as sites and patterns spell it."""
    return f"{path}.{leaf}".removesuffix(".weight")


def _refuse_unread(stage: Stage, unread: Mapping[str, str]) -> None:
    """Refuse a stage that would change weights in which the program shows no site."""
    if stage.scope.outside or stage.spec is None:
        return
    covered = [name for name in unread if name in stage.scope]
    if covered:
        raise QlabError(
            f"{covered[0]} {unread[covered[0]]}, so qlab cannot quantize {_some(covered)}; "
            f"{KEEP_THEM}"
        )


def _check_scope(
    stage: Stage,
    named: Mapping[str, tuple[str, Site]],
    codes: Mapping[str, Code],
    around: Mapping[str, Site],
    unread: Mapping[str, str],
) -> None:
    chosen = {name for name, (_, site) in named.items() if stage.touches(name, site)}
    if not stage.scope.outside:
        chosen |= {
            name for name in unread if name in stage.scope
        }  # a rule may be there to keep them
    if stage.uncovered:
        if chosen:
            raise QlabError(
                f"no rule covers {_some(sorted(chosen))}; add a pattern, with keep() to leave "
                "them as they are"
            )
        return
    if not chosen and (
        routers := [
            name for name, (_, site) in named.items() if name in stage.scope and site.router
        ]
    ):
        raise QlabError(
            f"the stage {stage.name!r} is for {_some(routers)} only, which choose or weigh "
            "experts; routers stay as they are, as every engine reads them: leave the rule out"
        )
    if not chosen and stage.scope.outside:
        raise QlabError(
            f"the stage {stage.name!r} matches no linear ({stage.scope}); those are "
            f"{_some(list(around)) or 'none'}"
        )
    if not chosen:
        beside = [name for name in around if name in stage.scope]
        hint = (
            f"outside() reaches {_some(beside)}"
            if beside
            else f"sites are named like {next(iter([*named, *unread]), 'none')}"
        )
        raise QlabError(f"the stage {stage.name!r} matches no site ({stage.scope}); {hint}")
    if stage.reparametrizes:
        for path, code in codes.items():
            for group in by_origin(code.sites).values():
                names = [f"{path}.{s.path}" for s in group]
                inside = [n for n in names if n in chosen]
                if inside and len(inside) < len(names):
                    rest = ", ".join(n for n in names if n not in chosen)
                    raise QlabError(
                        f"{', '.join(inside)} shares its input with {rest}, and the rule for "
                        f"{stage.name} splits them; a reparametrization needs one rule for all "
                        "sites of an input"
                    )


def _check_specs(
    specs: Mapping[str, Spec | None],
    shapes: Mapping[str, torch.Size],
    named: Mapping[str, tuple[str, Site]],
    skeleton: Skeleton,
    codec: str,
    target: str | None,
) -> None:
    failed: dict[str, list[str]] = {}
    rounded = {name: spec for name, spec in specs.items() if spec}
    for name, spec in rounded.items():
        k = shapes[name][-1]
        try:
            spec.tile.check(shapes[name])
        except QlabError as error:
            widths = {shapes[other][-1] for other, its in rounded.items() if its == spec}
            common = ", ".join(map(str, legal_groups(math.gcd(*widths)))) or "none"
            failed.setdefault(
                f"{error}{f'; for all {len(widths)} widths {common}' if len(widths) > 1 else ''}",
                [],
            ).append(name)
            continue
        site = named[name][1]
        if site.route and not skeleton.expert_pieces(name):
            failed.setdefault(
                "quantized experts are written one by one, and transformers knows no names for "
                f"them in this architecture; {KEEP_THEM}",
                [],
            ).append(name)
            continue
        if site.route and spec.tile.rows is None:
            failed.setdefault(
                "fused experts have a scale per group, channel or block; one per tensor would "
                "join projections that the files hold apart",
                [],
            ).append(name)
            continue
        held = CODECS[codec]
        if site.layout not in ("o k", "e o k") and name not in skeleton.transposed:
            failed.setdefault(
                f"readers of every format look for codes in linears, and this is none; {KEEP_THEM}",
                [],
            ).append(name)
            continue
        refused = refusal_of_transposed(codec) if name in skeleton.transposed else None
        refused = (
            refused
            or held.refusal(with_scale_dtype(spec, skeleton.checkpoint.dtype))
            or held.misfit(spec, shapes[name])
        )
        if target and not refused:
            refused = refusal(target, codec, spec, site.route is not None, k)
        if refused := refused or held.risk(spec):
            failed.setdefault(refused, []).append(name)
    for names in _joined(named):
        if target and (divided := division(target, {name: specs[name] for name in names})):
            failed.setdefault(divided, []).extend(names)
    for reason, names in failed.items():
        raise QlabError(f"{_some(names)}: {reason}")
    CODECS[codec].config(specs)  # refuses what no config of the format can say of all of them
    if target and (several := uniformity(target, rounded)):
        raise QlabError(f"{several}; give all sites one")


def _joined(named: Mapping[str, tuple[str, Site]]) -> list[list[str]]:
    """Sites of one module that engines may join: they share an input, or are the experts of a
    mixture."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (_, site) in named.items():
        if not site.router:
            groups.setdefault(
                (name.rpartition(".")[0], "" if site.route else site.source), []
            ).append(name)
    return list(groups.values())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
