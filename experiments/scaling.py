"""Does a plan foretell how long several ranks take, and what does it foretell for many?

Usage: python experiments/scaling.py FOLDER [rounds=3] [samples=16] [blocks=6]

One process of one thread quantizes the first blocks of the demo: by rtn, by GPTQ on a quarter of
the samples, and on all. The rates of `Devices` are fitted to the medians of these three, in which
they are linear: bytes read a second to the first, operations a second to the difference of the
others, and the seconds of a small operation to what is left. The rate of the link is measured
beside: two processes send each other 64 MiB. Two ranks of one thread take turns with them, and are
compared with what the plan of two ranks says at these rates.

The curve is that of the plan for 512 samples of the whole demo and at the same rates, for 1 to 64
ranks. Writes results/scaling.json and results/scaling.png.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from matplotlib.figure import Figure
from ranks import cut, recipe_of, run

import qlab
from qlab.driver.expense import Devices
from qlab.files.figures import save_figure
from qlab.process.processor import here

RESULTS = Path(__file__).parent / "results"
OPTIONS = {"rounds": 3, "samples": 16, "blocks": 6}
CURVE, MANY = (1, 2, 4, 8, 16, 32, 64), 512


def sent(rank: int, meeting: str, told) -> None:
    """Send 64 MiB to the other rank five times, and tell the middle rate."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    block, rates = torch.zeros(2**26, dtype=torch.uint8), []
    for _ in range(5):
        started = time.perf_counter()
        if rank:
            dist.recv(block, 0)
        else:
            dist.send(block, 1)
        dist.barrier()
        rates.append(block.nbytes / (time.perf_counter() - started))
    if rank == 0:
        told.put(statistics.median(rates))
    dist.destroy_process_group()


def link() -> float:
    """Bytes a second between two processes."""
    told = mp.get_context("spawn").SimpleQueue()
    with TemporaryDirectory() as folder:
        mp.spawn(sent, args=(f"{folder}/meeting", told), nprocs=2)
    return told.get()


def units(plan) -> dict[str, float]:
    """What a plan counts: operations of the slowest rank, small ones, and bytes."""
    return {
        "operations": sum(each.slowest for each in plan.expenses),
        "calls": sum(each.calls for each in plan.expenses),
        "read": sum(each.read for each in plan.expenses),
    }


def fitted(plans, seconds, link: float) -> Devices:
    """The rates at which the plans of one process take these seconds."""
    alone, few, all_ = (units(plan) for plan in plans)
    read = alone["read"] / seconds[0]
    left = [seconds[i] - one["read"] / read for i, one in ((1, few), (2, all_))]
    rate = (all_["operations"] - few["operations"]) / (left[1] - left[0])
    call = (left[1] - all_["operations"] / rate) / all_["calls"]
    if min(rate, call) <= 0:
        raise SystemExit(f"no rates fit {seconds}: repeat on a machine without other work")
    return Devices(flops=rate, float32=rate, read=read, link=link, call=call)


def draw(curve) -> None:
    """The curve, beside that of ranks which cost nothing."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = [int(number) for number in curve]
    hours = [one["hours"] for one in curve.values()]
    axes.loglog(ranks, [hours[0] / h for h in hours], marker="o", label="planned")
    axes.loglog(ranks, ranks, linestyle=":", color="grey", label="ranks")
    axes.set(xlabel="ranks", ylabel="times as fast as one", xticks=ranks, xticklabels=ranks)
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, RESULTS / "scaling.png")


def main(folder: str, *given: str) -> None:
    options = OPTIONS | {name: int(n) for name, n in (option.split("=") for option in given)}
    samples, rounds = options["samples"], options["rounds"]
    where = Path(folder)
    path = cut(where / "model", options["blocks"])
    runs = {"rtn": (1, 0), "a quarter": (1, samples // 4), "all": (1, samples), "two": (2, samples)}
    taken = {name: [] for name in runs}
    for turn in range(rounds):
        for name, (ranks, count) in runs.items():
            out = where / f"{name}-{turn}".replace(" ", "-")
            taken[name].append(run(path, out, ranks, 1, count)["seconds"])
            print(turn, name, taken[name][-1], flush=True)
    middle = {name: statistics.median(seconds) for name, seconds in taken.items()}
    model = qlab.open(path)
    plans = {
        name: qlab.plan(model, *recipe_of(model, count), ranks=ranks)
        for name, (ranks, count) in runs.items()
    }
    single = ["rtn", "a quarter", "all"]
    devices = fitted([plans[n] for n in single], [middle[n] for n in single], link())
    planned = sum(plans["two"].at(devices)["seconds_of_stages"].values())
    demo = qlab.open("demo")
    work = recipe_of(demo, MANY)
    curve = {ranks: qlab.plan(demo, *work, ranks=ranks).at(devices) for ranks in CURVE}
    record = {
        "options": options,
        "seconds": taken,
        "medians": middle,
        "devices": asdict(devices),
        "two_ranks": {"measured": middle["two"], "planned": planned},
        "off_by": planned / middle["two"] - 1,
        "curve": curve,
        "processor": str(here()),
        "torch": torch.__version__,
    }
    draw(curve)
    (RESULTS / "scaling.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print({name: record[name] for name in ("medians", "devices", "two_ranks", "off_by")})
    print({ranks: round(one["hours"] * 3600, 1) for ranks, one in curve.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
