"""Trials of all cases in turn.

Each turn is a fork, so that what kills or bloats one is a finding and does not end the campaign.
"""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rich.table
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from faults import Case, Trial, drawn
from qlab.files.atomic import write_json
from qlab.files.directory import read_json
from qlab.lowering.devices import device_label

ROOT = Path(__file__).parents[2]
TURN = 20.0  # seconds that a case has before the next one has its turn


@dataclass
class Tally:
    """How the trials of a case ended. findings: trial -> what must not be."""

    ended: Counter[str] = field(default_factory=Counter)
    findings: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    number: int = 0  # of the next trial

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Tally":
        """The tally that `json` gave."""
        findings = {int(number): says for number, says in stored["findings"].items()}
        return cls(Counter(stored["ended"]), findings, stored["seconds"], stored["trials"])

    def json(self) -> dict[str, Any]:
        """The tally as plain data."""
        return {
            "trials": sum(self.ended.values()) + len(self.findings),
            "ended": dict(sorted(self.ended.items())),
            "findings": self.findings,
            "seconds": round(self.seconds, 1),
        }


def attempt(case: Case, trial: Trial, number: int) -> str:
    """One trial in a folder of its own: how it ended. Raises AssertionError where it finds
    something."""
    with tempfile.TemporaryDirectory(prefix="qlab-fault-") as folder:
        try:
            return trial(drawn(case.name, number), Path(folder))
        finally:
            _let_remove(Path(folder))


def _let_remove(folder: Path) -> None:
    """Give back the right to remove what a trial took it from."""
    for path in (folder, *(Path(root) for root, _, _ in os.walk(folder))):
        path.chmod(0o700)


def turn(case: Case, trial: Trial, tally: Tally, seconds: float, least: int = 1) -> None:
    """Trials of a case in a fork for so many seconds, and so many of them at least."""
    began = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run(case, trial, range(tally.number, tally.number + least), began + seconds, writing)
    os.close(writing)
    going = tally.number
    with open(reading, encoding="utf-8") as lines:
        for line in lines:
            number, kind, says = json.loads(line)
            going = number + 1
            if kind == "ended":
                tally.ended[says] += 1
            else:
                tally.findings[number] = says
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        tally.findings[going] = f"the process of the trial ended with {code}"
        going += 1
    tally.number = going
    tally.seconds += time.monotonic() - began


def _run(case: Case, trial: Trial, least: range, until: float, pipe: int) -> None:
    """Trials of these numbers, and of those behind them until that moment, told to the pipe. Does
    not return."""
    try:
        for number in itertools.count(least.start):
            try:
                told = [number, "ended", attempt(case, trial, number)]
            except Exception as error:
                told = [number, "finding", f"{type(error).__name__}: {error}"[:2000]]
            os.write(pipe, (json.dumps(told) + "\n").encode())
            if number >= least[-1] and time.monotonic() >= until:
                os._exit(0)
    finally:
        os._exit(1)


def campaign(cases: Sequence[Case], hours: float, out: Path) -> bool:
    """Run all cases in turn until the hours are over, each of them once at least, and store how
    trials ended after every turn. Goes on from what is stored of the same commit. Whether nothing
    was found."""
    torch.set_num_threads(1)  # a fork inherits no half of a pool of threads
    shared = Path(tempfile.mkdtemp(prefix="qlab-faults-"))
    tallies = stored_tallies(out)
    for case in cases:
        tallies.setdefault(case.name, Tally())
    began, end = datetime.now(UTC), time.monotonic() + hours * 3600
    try:
        with _progress() as shown:
            bar = shown.add_task("", total=hours * 3600, found=0)
            trials: dict[str, Trial] = {}
            for case in itertools.cycle(cases):
                left = end - time.monotonic()
                if left <= 0 and case.name in trials:
                    break
                shown.update(bar, description=case.name, completed=hours * 3600 - left)
                if case.name not in trials:
                    trials[case.name] = case.make(shared)
                turn(case, trials[case.name], tallies[case.name], min(TURN, left))
                write_json(out, report(tallies, began))
                shown.update(bar, found=sum(len(tally.findings) for tally in tallies.values()))
    finally:
        shutil.rmtree(shared)
    return not any(tally.findings for tally in tallies.values())


def _progress() -> Progress:
    parts = ("{task.description}", "{task.fields[found]} found")
    return Progress(TextColumn(parts[0]), BarColumn(), TextColumn(parts[1]), TimeRemainingColumn())


def commit() -> str:
    """The commit that is checked out, and whether anything was changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def stored_tallies(out: Path) -> dict[str, Tally]:
    """What a file says of the commit that is checked out: case -> its tally."""
    stored = read_json(out) if out.exists() else {}
    if stored.get("commit") != commit():
        return {}
    return {name: Tally.of(row) for name, row in stored["cases"].items()}


def report(tallies: Mapping[str, Tally], began: datetime) -> dict[str, Any]:
    """What is stored: of which code and machine, and how the trials of every case ended."""
    return {
        "commit": commit(),
        "began": began.isoformat(timespec="seconds"),
        "processor": device_label(torch.device("cpu")),
        "torch": torch.__version__,
        "cases": {name: tally.json() for name, tally in tallies.items() if tally.number},
    }


def table(stored: Mapping[str, Any], box: rich.box.Box = rich.box.HEAVY_HEAD) -> Table:
    """How the trials of every case ended, as a table."""
    made = Table(title=f"{stored['commit']}, {stored['began']}, {stored['processor']}", box=box)
    for heading in ("case", "trials", "ended", "found"):
        made.add_column(heading)
    for name, row in stored["cases"].items():
        ended = ", ".join(f"{count} {how}" for how, count in row["ended"].items())
        made.add_row(name, str(row["trials"]), ended, str(len(row["findings"])))
    return made
