"""Quantizing without a model: safetensors and a configuration in, the same out, one tensor in
memory at a time.

For methods that need no data. Which tensors are linear weights is read off their names: by default
every [o, k] `.weight` but those of embeddings, heads, norms and routers, which engines expect
unquantized. Fused experts are cut into those names by which engines look for their weights, where
transformers has them.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import lone_weight
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.scope import matches
from qlab.algebra.spec import Float, Spec, with_scale_dtype
from qlab.algebra.transform import Transform
from qlab.codecs import CODECS, Codec, refusal_of_transposed
from qlab.codecs.engines import refusal, uniformity
from qlab.driver.job import CODEC
from qlab.driver.report import PeakMemory, describe, site_rows
from qlab.driver.siblings import Siblings
from qlab.driver.solve import solve_alone
from qlab.errors import QlabError
from qlab.files.certificate import certify
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.files.place import place, refuse_early
from qlab.files.record import bits_per_weight, recorded, versions, written
from qlab.files.shardwise import Notes, leaves_by_file, rewrite_files
from qlab.files.writer import Writer
from qlab.model.linears import (
    experts_apart,
    holds_experts,
    linear_names,
    other_matrices,
    refuse_unheld,
    transposed,
    untied_where_apart,
)
from qlab.process.shown import Shown, size, some
from qlab.process.surroundings import undisturbed

KEPT = (
    "*embed*",
    "*wte",
    "*wpe",
    "*lm_head",
    "*norm*",
    "*.gate",
    "*router*",
    "*shared_expert_gate",
)


@dataclass(frozen=True, repr=False)
class Rewritten(Shown):
    """A directory quantized without its model: the rows of its report, and what the run cost."""

    path: Path
    sites: Mapping[str, Mapping[str, Any]]
    seconds: float
    peak_rss_bytes: int

    def __fspath__(self) -> str:
        """The directory: a result stands wherever a path does."""
        return str(self.path)

    @property
    def bits_per_weight(self) -> float:
        """Over the weights that were chosen."""
        return bits_per_weight(self.sites)

    def summary(self) -> dict[str, str]:
        """Without the sites."""
        return {
            "directory": str(self.path),
            "weights": f"{len(self.sites)} quantized, {self.bits_per_weight:.3f} bits per weight",
            "cost": f"{self.seconds:.1f} s, peak {size(self.peak_rss_bytes)}",
        }

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "path": str(self.path),
            "sites": dict(self.sites),
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
        }


@undisturbed
@torch.no_grad()
def quantize_files(
    model: Checkpoint | str | Path,
    recipe: Transform,
    out: str | Path,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = KEPT,
    codec: str = CODEC,
    target: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Rewritten:
    """Apply a recipe of data-free methods to the linear weights of a directory, also of
    architectures that nobody knows.

    include, exclude: globs (or 're:' patterns) over module names; a weight is chosen where one of
    `include` and none of `exclude` matches. Weights that are stored as 8-bit floats are dequantized
    first, chosen or not.

    Errors: methods that observe activations, a pattern without a weight, weights that are no
    nn.Linear's where transformers knows the architecture, what the codec's format cannot hold or
    the engine `target` does not load.
    """
    opened = model if isinstance(model, Checkpoint) else open_checkpoint(model)
    refuse_unheld(opened)
    source = experts_apart(opened)
    started = time.perf_counter()
    if codec not in CODECS:
        raise QlabError(f"the codec {codec!r} is unknown; qlab writes {', '.join(CODECS)}")
    if needs := sorted({need for stage in recipe for need in stage.needs}):
        raise QlabError(
            f"the recipe observes {', '.join(needs)}, for which the model has to run; use a "
            "data-free method such as rtn"
        )
    if online := [stage.name for stage in recipe if stage.online]:
        raise QlabError(
            f"the stage {online[0]!r} puts operations on inputs, of which nobody knows anything "
            "without a model; quantize with the model, or leave it away"
        )
    folder = place(out, source.path, set(source.files.values()))
    refuse_early(folder, overwrite, resume)
    specs = _chosen(source, recipe, include, exclude)
    turned = transposed(source) & specs.keys()
    _check(source, specs, turned, codec, target)
    siblings = Siblings(specs, lambda module: dense(source.leaf(f"{module}.weight"), torch.float32))
    names = {**linear_names(source), **{module: module for module in specs}}
    config = CODECS[codec].config({name: specs.get(module) for name, module in names.items()})
    raw = untied_where_apart(source, specs)
    job = {
        "source": source.fingerprint(),
        "recipe": describe(recipe),
        "sites": sorted(specs),
        "codec": codec,
        "versions": versions(),
    }
    with PeakMemory() as peak, Writer(folder, overwrite, resume) as writer:
        writer.begin(job, len(leaves_by_file(source)), source.path)
        if not writer.finished:
            with writer.refusing():
                rewrite_files(
                    source,
                    writer,
                    partial(_rewrite, source, recipe, CODECS[codec], siblings, turned),
                    "quantizing",
                )
            writer.finish(
                written({**raw, "quantization_config": config}, job, writer.notes()), source.path
            )
    return Rewritten(
        writer.out, recorded(writer.out)["sites"], time.perf_counter() - started, peak.bytes
    )


def _chosen(
    source: Checkpoint, recipe: Transform, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Spec]:
    """Module -> the spec that the recipe rounds it to."""
    if wide := sorted(
        name
        for name, spec in source.quantized.items()
        if spec and (not isinstance(spec, Float) or spec.bits < 8)
    ):
        raise QlabError(
            f"{wide[0]} of {source.path} is quantized to {source.quantized[wide[0]]} already; "
            "start from the unquantized model"
        )
    if online := [extra for extra in source.extras if extra.online]:
        raise QlabError(
            f"{source.path} has a {online[0].key} ({online[0].says}) that belongs to its present "
            "weights; start from the unquantized model"
        )
    weights = {
        name.removesuffix(".weight")
        for name, stored in source.stored.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    experts = {name for name, stored in source.stored.items() if holds_experts(name, stored)}
    modules = sorted(weights | source.quantized.keys() | experts)
    for pattern in (*include, *(p for p in exclude if p not in KEPT)):
        if not any(matches(pattern, module) for module in modules):
            raise QlabError(
                f"the pattern {pattern!r} matches no weight [o, k] of {source.path}; they are "
                f"named like {modules[0]}"
                if modules
                else f"{source.path} holds no weight [o, k], so there is nothing to quantize"
            )
    chosen = [
        m
        for m in modules
        if any(matches(p, m) for p in include) and not any(matches(p, m) for p in exclude)
    ]
    if wrong := sorted(set(chosen) & other_matrices(source)):
        raise QlabError(
            f"{', '.join(wrong[:4])} belongs to no nn.Linear of the model, and readers would skip "
            "it; --exclude it"
        )
    if fused := sorted(set(chosen) & experts):
        raise QlabError(
            f"{fused[0]} of {source.path} holds {source.stored[fused[0]].shape[0]} experts in one "
            "tensor, and only a model's definition tells where each of their projections lies; "
            "quantize with the model, or --exclude it"
        )
    if whole := [
        m
        for m in chosen
        if m not in source.quantized
        and not source.shape_and_dtype(f"{m}.weight")[1].is_floating_point
    ]:
        raise QlabError(
            f"{whole[0]}.weight of {source.path} is stored as "
            f"{source.stored[f'{whole[0]}.weight'].dtype}, which are no weights but codes that "
            "its config.json does not explain; --exclude it, or start from the unquantized model"
        )
    if any(stage.scope.outside for stage in recipe):
        raise QlabError(
            "without a model nobody knows what lies around its blocks; leave outside() away, and "
            "name those weights as they are stored"
        )
    specs: dict[str, Spec] = {}
    for stage in recipe:
        inside = [module for module in chosen if module in stage.scope]
        if stage.uncovered and inside:
            raise QlabError(
                f"no rule covers {', '.join(inside[:4])}; add a pattern, with keep() to leave "
                "them as they are"
            )
        if stage.spec is not None:
            specs |= dict.fromkeys(inside, stage.spec)
    if not specs:
        raise QlabError(
            f"the recipe and the patterns choose no weight of {source.path}, so there is nothing "
            "to write"
        )
    return specs


def _check(
    source: Checkpoint,
    specs: Mapping[str, Spec],
    turned: Collection[str],
    codec: str,
    target: str | None,
) -> None:
    failed: dict[str, list[str]] = {}
    for module, spec in specs.items():
        stored = (
            source.stored[name].shape
            if (name := f"{module}.weight") in source.stored
            else source.leaf(name).shape
        )  # of 2:4
        shape = torch.Size(stored[::-1] if module in turned else stored)
        try:
            spec.tile.check(shape)
        except QlabError as error:
            failed.setdefault(str(error), []).append(module)
            continue
        reason = refusal_of_transposed(codec) if module in turned else None
        reason = (
            reason
            or CODECS[codec].refusal(with_scale_dtype(spec, source.dtype))
            or CODECS[codec].misfit(spec, shape)
        )
        if target and not reason:
            reason = refusal(target, codec, spec, ".experts." in module, shape[-1])
        if reason := reason or CODECS[codec].risk(spec):
            failed.setdefault(reason, []).append(module)
    for reason, modules in failed.items():
        raise QlabError(f"{some(modules)}: {reason}")
    if target and (several := uniformity(target, specs)):
        raise QlabError(f"{several}; give all weights one")


def _rewrite(
    source: Checkpoint,
    recipe: Transform,
    codec: Codec,
    siblings: Siblings,
    turned: Collection[str],
    name: str,
    notes: Notes,
) -> dict[str, Tensor]:
    """The tensors of one leaf: quantized where it is chosen, else dense as it is."""
    leaf, module = source.leaf(name), name.rpartition(".")[0]
    weight = dense(leaf, source.dtype) if isinstance(leaf, QTensor) else leaf
    if module not in siblings or name != f"{module}.weight":
        return {name: weight}
    W_ok = weight.mT if module in turned else weight
    alone = lone_weight(module, W_ok, source.dtype, outer=siblings.outer(module))
    solved = solve_alone(alone, recipe)
    new = solved.params["weight"]
    assert isinstance(new, QTensor)  # _chosen found the stage that rounds it
    notes.setdefault("sites", {}).update(site_rows(solved))
    notes.setdefault("certificates", {})[module] = certify(new, W_ok if module in turned else leaf)
    return codec.encode(module, new)
