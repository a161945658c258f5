"""A device that times nothing: a CPU whose harnesses answer at once, for workers in processes of
their own; and a crew without processes, whose work moves a clock of its own."""

import os
import time
from pathlib import Path

import torch

from qlab.bench.gpu.device import Bench
from qlab.bench.gpu.plan import Call


def _events(calls, reps, seconds):
    return 10.0


def bench(events=_events):
    return Bench(
        device=torch.device("cpu"),
        name="Fake H200",
        capability=(9, 0),
        events=events,
        graph=lambda calls, seconds: 8.0,
        cupti=lambda calls, seconds: None,
        empty=lambda: None,
    )


def running():
    """Every call is run once: what is timed is computed."""

    def events(calls, reps, seconds):
        for call in calls[:1]:
            call()
        return float(reps)

    return bench(events)


def dying():
    return bench(lambda calls, reps, seconds: os._exit(9))


def hanging():
    """Of the processes of a run only one hangs: a file says that it has begun."""

    def events(calls, reps, seconds):
        begun = Path(os.environ["FAKE_BEGUN"])
        if not begun.exists():
            begun.write_text(str(os.getpid()))
            time.sleep(600)
        return 10.0

    return bench(events)


class Crew:
    """Calls done here, one after the other. work: (call) -> result; failing raises. Starts,
    compilations and calls take `costs` seconds of `clock`."""

    def __init__(self, work, now, costs):
        self.work, self.now, self.costs = work, now, costs
        self.calls = []
        self.closed = False

    def start(self, limit):
        self.now[0] += self.costs["start"]
        return {"result": {"name": "Fake H200", "readings": None}, "seconds": 0.0}

    def run(self, calls, limit, heard, spread):
        self.now[0] += self.costs["run"](calls, spread)
        for call in calls:
            self.calls.append(call.key)
            try:
                heard(call, {"result": self.work(call), "seconds": 0.0})
            except ArithmeticError as error:
                heard(call, {"error": str(error), "seconds": 0.0})

    def close(self):
        self.closed = True


def call(key, job, **arguments):
    return Call(key=key, job=job, arguments=arguments, seconds=1.0)
