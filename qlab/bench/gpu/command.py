"""`python -m qlab.bench gpu`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from qlab.cli.kernels import kernel_refusals
from qlab.cli.options import Json
from qlab.cli.output import console, report
from qlab.errors import QlabError
from qlab.process.progress import say

if TYPE_CHECKING:
    from qlab.bench.gpu.run import Acceptance

FACTORY = "qlab.bench.gpu.device:cuda"
PLANNED = ("H200", (9, 0))  # what --plan is for where there is no GPU: the goals are its figures
MOST_WORKERS = 12  # processes that share the device: each has a context on it


def gpu(
    minutes: Annotated[float, typer.Option("--minutes", help="that it may take")] = 12.0,
    out: Annotated[
        Path | None, typer.Option("--out", help="the folder of the results; a second start goes on")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="print the steps and their expected seconds; needs no GPU"),
    ] = False,
    json_file: Json = None,
) -> None:
    """Accept a GPU: every kernel proven, the products of the goals tuned and timed beside other
    libraries, generation timed, all of it in the minutes given."""
    with kernel_refusals():
        from qlab.bench.gpu.run import accept, refuse_minutes

        refuse_minutes(minutes)
        if plan:
            _show_plan(minutes, json_file)
            return
        if out is None:
            raise QlabError("give --out DIR: results are written there as they come")
        from qlab.bench.gpu.crew import Crew
        from qlab.bench.gpu.device import cuda
        from qlab.bench.gpu.plan import Facts, steps
        from qlab.bench.gpu.record import CONFIGS, refuse_foreign

        place = out.expanduser().resolve()
        refuse_foreign(place)
        bench = cuda()
        facts = Facts(name=bench.name, capability=bench.capability, workers=_workers())
        crew = Crew(FACTORY, facts.workers, {"QLAB_CACHE_DIR": str(place / CONFIGS)})
        result = accept(place, minutes, facts, steps(facts), crew, said=say)
    _show(result, place)
    report(result.record, json_file)
    if result.failed:
        raise typer.Exit(1)


def _workers() -> int:
    """Processes that compile at once."""
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) - 1))


def _show_plan(minutes: float, json_file: Path | None) -> None:
    """The steps with their expected seconds, and which of them fit."""
    import torch

    from qlab.bench.gpu.plan import START, Facts, fitting, seconds, steps

    name, capability = PLANNED
    if torch.cuda.is_available():
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    facts = Facts(name=name, capability=capability, workers=_workers())
    planned = steps(facts)
    fit, _ = fitting(planned, facts.workers, 60 * minutes, lambda _: ())
    drawn = Table("step", "calls", "seconds", "in all", title=f"{name}, {minutes:g} minutes")
    total = START
    drawn.add_row("start of the processes", str(facts.workers), f"{START:.0f}", f"{total:.0f}")
    rows = []
    for step in planned:
        expected, fits = seconds(step, facts.workers), step in fit
        total += expected if fits else 0.0
        after = f"{total:.0f}" if fits else "does not fit"
        drawn.add_row(step.name, str(len(step.calls)), f"{expected:.0f}", after)
        rows.append({"step": step.name, "seconds": round(expected, 1), "fits": fits})
    console().print(drawn)
    whole = START + sum(seconds(step, facts.workers) for step in planned)
    console().print(
        f"{len(fit)} of {len(planned)} steps fit; all of them need {whole / 60:.0f} minutes. The "
        "seconds are estimates of the cost model.",
        soft_wrap=True,
    )
    report({"device": name, "minutes": minutes, "start": START, "steps": rows}, json_file)


def _show(result: "Acceptance", place: Path) -> None:
    from qlab.bench.gpu.verdict import absent, goals_table, products_table

    outcomes = result.record["steps"]
    products = products_table(outcomes)
    if products:
        console().print(products)
    for name, why in absent(outcomes).items():
        console().print(f"{name} {why}", soft_wrap=True)
    console().print(goals_table(result.goals))
    for step, key, error in result.failed:
        console().print(f"failed: {step}, {key}: {error}", soft_wrap=True)
    if result.skipped:
        console().print(f"skipped for lack of time: {'; '.join(result.skipped)}", soft_wrap=True)
    console().print(
        f"all results are in {place}; `qlab cache import {place / 'configs.json'}` takes its "
        "configurations",
        soft_wrap=True,
    )
