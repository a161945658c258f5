"""Processes that work on the device, so that neither a kernel that kills its process nor one that
never ends takes the run with it.

A worker has the device to itself or shares it where nothing is timed. One whose device is broken
(an illegal address poisons every later call of its process), or that takes too long, is ended and
replaced.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from qlab.bench.gpu.jobs import JOBS
from qlab.bench.gpu.outcome import Outcome, breaks_device
from qlab.bench.gpu.plan import Call
from qlab.errors import first_line

ENDING = 5.0  # seconds that a worker has to end
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h

Heard = Callable[[Call, Outcome], object]


def _end_with_parent() -> None:
    """Have the system end this process when the one that started it ends, however that comes: a
    kernel of a run that was killed would share the device with the next run."""
    set_signal = getattr(ctypes.CDLL(None), "prctl", None)  # only Linux has it
    if set_signal is not None:
        set_signal(PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _work(connection: Connection, factory: str, environment: Mapping[str, str]) -> None:
    """The loop of a worker: calls in, outcomes out, until nobody is at the other end."""
    _end_with_parent()
    os.environ.update(environment)
    module, _, name = factory.partition(":")
    bench = None
    while True:
        try:
            job, arguments = connection.recv()
            started = time.perf_counter()
            try:
                bench = bench or getattr(import_module(module), name)()
                outcome: Outcome = {"result": JOBS[job](bench, **arguments)}
            except Exception as error:  # whatever it is, it belongs into the record
                outcome = {"error": f"{type(error).__name__}: {first_line(error)}"}
            outcome["seconds"] = round(time.perf_counter() - started, 3)
            connection.send(outcome)
        except (EOFError, BrokenPipeError):
            return


class _Worker:
    """A process and the call that it works on."""

    def __init__(self, factory: str, environment: Mapping[str, str]):
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_work, args=(theirs, factory, environment), daemon=True
        )
        self.process.start()
        theirs.close()
        self.call: Call | None = None

    def give(self, call: Call) -> None:
        self.call = call
        with suppress(OSError):  # a process that has died is noticed where its outcome is taken
            self.connection.send((call.job, dict(call.arguments)))

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(ENDING)


class Crew:
    """Some workers on one device. factory: "module:function" that makes their `Bench`. environment:
    variables set before that."""

    def __init__(self, factory: str, workers: int, environment: Mapping[str, str]):
        self.factory, self.amount, self.environment = factory, workers, environment
        self.workers: list[_Worker] = []

    def start(self, limit: float) -> Outcome:
        """All workers, each with its device; the outcome says what the device is."""
        outcomes: list[Outcome] = []
        calls = [
            Call(key=str(i), job="clocks", arguments={}, seconds=0.0) for i in range(self.amount)
        ]
        self.run(calls, limit, lambda _, outcome: outcomes.append(outcome), spread=True)
        failed = [outcome for outcome in outcomes if "error" in outcome]
        return failed[0] if failed else outcomes[0]

    def run(self, calls: Sequence[Call], limit: float, heard: Heard, spread: bool) -> None:
        """All calls, by all workers or by the first one; `heard` is told of each when it ends, and
        of those that did not end in `limit` seconds."""
        waiting = list(reversed(calls))
        until = time.monotonic() + limit
        size = min(self.amount if spread else 1, max(len(calls), 1))
        while waiting or self._busy():
            self._hand_out(waiting, size)
            left = until - time.monotonic()
            ready = wait([w.connection for w in self._busy()], timeout=max(left, 0))
            for worker in self._busy():
                if worker.connection in ready:
                    self._take(worker, heard)
            if left <= 0 and not ready:
                self._stop(waiting, limit, heard)
                return

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self.workers if worker.call]

    def _hand_out(self, waiting: list[Call], size: int) -> None:
        while len(self.workers) < size:
            self.workers.append(_Worker(self.factory, self.environment))
        for worker in self.workers[:size]:
            if waiting and not worker.call:
                worker.give(waiting.pop())

    def _take(self, worker: _Worker, heard: Heard) -> None:
        call, worker.call = worker.call, None
        assert call
        try:
            outcome = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join(ENDING)
            outcome = {"error": f"its process died with exit code {worker.process.exitcode}"}
            self._drop(worker)
        if breaks_device(outcome):
            self._drop(worker)
        heard(call, outcome)

    def _stop(self, waiting: list[Call], limit: float, heard: Heard) -> None:
        """End what takes too long, and give up what has not begun."""
        for worker in self._busy():
            call = worker.call
            self._drop(worker)
            assert call
            heard(call, {"error": f"it did not end within the {limit:.0f} s of its step"})
        for call in reversed(waiting):
            heard(call, {"error": f"it did not begin within the {limit:.0f} s of its step"})

    def _drop(self, worker: _Worker) -> None:
        worker.end()
        if worker in self.workers:
            self.workers.remove(worker)

    def close(self) -> None:
        """End all workers."""
        for worker in list(self.workers):
            self._drop(worker)
