"""The main job: a model directory and a recipe in, a quantized model directory out, one segment in
memory at a time."""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.job import CODEC, Job
from qlab.driver.observe import Inputs
from qlab.driver.plan import plan_of
from qlab.driver.report import PeakMemory, describe
from qlab.driver.result import Result
from qlab.driver.run import Run
from qlab.driver.scan import one_pass
from qlab.files.checkpoint import Checkpoint
from qlab.files.hashed import HashedFiles
from qlab.files.place import places
from qlab.files.record import recorded, versions
from qlab.files.writer import Writer
from qlab.model.device import name_of
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import undisturbed


def quantize(
    model: Checkpoint,
    recipe: Transform,
    data: Data | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
) -> Result:
    """Apply a recipe to every block of the model and write a directory in the format that `codec`
    names.

    data: calibration tokens, or samples of images and text; None only for recipes that need no
    statistics.
    inputs: whether a site is calibrated on what the quantized sites before it produce (errors
    propagate; on the quantized blocks before its own where sites cannot be solved one after the
    other, `solve.in_order`) or on the reference model's activations. dtype: of the activations
    while calibrating (default: the checkpoint's own, where that holds all of its numbers);
    statistics and solvers use fp32.
    memory: observe as many experts at a time as fit these bytes, and refuse to start when the
    predicted peak is above them. target: an engine of qlab.codecs.engines, whose limits are checked
    before anything runs. The same call gives the same bytes, also when a killed run is continued
    with resume=True (which knows a stage of one's own by its name, spec and `detail` alone).
    calibrate_all_experts: statistics of experts are of all tokens, not of those that are routed to
    each; nothing else changes.
    """
    results = compare(
        model,
        {"": recipe},
        data,
        out,
        inputs=inputs,
        dtype=dtype,
        device=device,
        memory=memory,
        overwrite=overwrite,
        resume=resume,
        calibrate_all_experts=calibrate_all_experts,
        codec=codec,
        target=target,
    )
    return results[""]


@undisturbed
@torch.no_grad()
def compare(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    data: Data | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
) -> dict[str, Result]:
    """Several recipes, each into out/<name>: what `quantize` makes of each, bit for bit, and all of
    them refused before any runs.

    inputs: see `quantize`. With "quantized" every recipe has a pass of its own, since its own
    errors are what the next block sees; with "reference" all of them share one pass and every
    statistic, and have its seconds and its peak memory. No recipe sees there what it did to earlier
    sites, so that a stage that corrects for it (gptaq's) is refused.
    """
    source = HashedFiles(model.path, model.stored)
    model = replace(model, reader=source.read)
    outs = places(
        out, list(recipes), model.path, [*set(model.files.values()), *getattr(data, "files", ())]
    )
    jobs = {
        name: Job(
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
        )
        for name, recipe in recipes.items()
    }
    started = time.perf_counter()
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(Writer(place, overwrite, resume))
            for name, place in outs.items()
        }
        with PeakMemory() as planning:
            skeleton = Skeleton(model, dtype or model.running_dtype, device)
            plans = {name: plan_of(job, skeleton) for name, job in jobs.items()}
        for made in plans.values():
            made.check(memory)
        planned = time.perf_counter() - started
        runs: dict[str, Run] = {}
        for name, job in jobs.items():
            identity = _identity(job, skeleton)
            writers[name].begin(identity, len(skeleton.blocks) + 1, model.path, source=source)
            runs[name] = Run(
                job=job,
                writer=writers[name],
                experts_at_once=plans[name].experts_at_once,
            )
        for run in runs.values():
            if not run.writer.finished:
                stack.enter_context(run.writer.refusing())
        results: dict[str, Result] = {}
        for names in [list(runs)] if inputs == "reference" else [[name] for name in runs]:
            seconds, peak_bytes = one_pass(skeleton, [runs[name] for name in names])
            for name in names:
                results[name] = Result(
                    path=writers[name].out,
                    sites=recorded(writers[name].out)["sites"],
                    plan=plans[name],
                    inputs=inputs,
                    seconds=planned + seconds,
                    peak_rss_bytes=max(planning.bytes, peak_bytes),
                )
    return results


def _identity(job: Job, skeleton: Skeleton) -> dict[str, Any]:
    """What decides which bytes come out of a job."""
    return {
        "source": job.model.fingerprint(),
        "recipe": describe(job.recipe),
        "data": job.observed and job.observed.describe(),
        "inputs": job.inputs,
        "calibrate_all_experts": job.calibrate_all_experts,
        "dtype": str(skeleton.dtype),
        "device": name_of(skeleton.device),
        "codec": job.codec,
        "versions": versions(),
    }
