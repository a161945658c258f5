"""The folder of an acceptance: one file for each step, written whole after each of its calls, so
that a run that was killed goes on where it was.

    job.json          what is measured, and by which kernels and versions
    steps/NAME.json   the outcomes of a step's calls by their keys
    configs/          the config cache of the run
    configs.json      the same in one file, for `qlab cache import`
    acceptance.json   all of it with the table against the goals
"""

import hashlib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qlab.bench.gpu.outcome import Outcome, failure
from qlab.bench.gpu.plan import Facts, Step
from qlab.errors import QlabError
from qlab.files.atomic import write_json
from qlab.files.lock import Lock
from qlab.files.ownership import read_sealed, sealed
from qlab.files.record import versions

JOB, STEPS, CONFIGS, WHOLE, RUNNING = (
    "job.json",
    "steps",
    "configs",
    "acceptance.json",
    ".running",
)
BESIDE = ("triton", "vllm", "humming-kernels", "torchao")


def job_of(facts: Facts) -> dict[str, Any]:
    """What outcomes depend on: a folder holds those of one job."""
    return {
        "kind": "acceptance of a GPU",
        "device": facts.name,
        "capability": list(facts.capability),
        "kernels": sources_hash(),
        "versions": {**versions(), **{name: _version(name) for name in BESIDE}},
    }


def sources_hash() -> str:
    """16 hex digits over all sources of the kernels' package."""
    import qlab_kernels

    root = Path(qlab_kernels.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def file_of(step: Step) -> str:
    """The name of a step's file."""
    return "".join(c if c.isalnum() else "-" for c in step.name) + ".json"


class Record:
    """The folder of one acceptance, held until `close`. QlabError for a folder that holds anything
    else, or that another run is writing to."""

    def __init__(self, out: Path, facts: Facts):
        self.out, self.job = out, job_of(facts)
        self.known: dict[str, dict[str, Outcome]] = {}
        refuse_foreign(out)
        self.lock = Lock(out / RUNNING)
        try:
            self._refuse_other()
            (out / STEPS).mkdir(exist_ok=True)
            write_json(out / JOB, sealed(self.job))
        except BaseException:
            self.lock.release()
            raise

    def _refuse_other(self) -> None:
        before = read_sealed(self.out / JOB)
        if before is None:
            return
        for name, value in self.job.items():
            if before.get(name) != value:
                raise QlabError(
                    f"{self.out} holds the acceptance of another job ({name}: {before.get(name)}, "
                    f"not {value}); choose another --out"
                )

    def outcomes(self, step: Step) -> dict[str, Outcome]:
        """What is known of a step's calls, by key."""
        if step.name not in self.known:
            self.known[step.name] = self._read(self.out / STEPS / file_of(step))
        return self.known[step.name]

    def _read(self, path: Path) -> dict[str, Outcome]:
        if not path.exists():
            return {}
        written = read_sealed(path)
        if written is None:
            raise QlabError(
                f"{path} was changed since it was written; delete it, and its step runs again"
            )
        outcomes: dict[str, Outcome] = written["outcomes"]
        return outcomes

    def done(self, step: Step) -> tuple[str, ...]:
        """The keys of a step's calls that have a result and no error."""
        known = self.outcomes(step)
        return tuple(key for key, outcome in known.items() if not failure(outcome))

    def put(self, step: Step, key: str, outcome: Outcome, **more: Any) -> None:
        """Write the outcome of one call into its step's file."""
        self.outcomes(step)[key] = outcome
        value = {"step": step.name, "outcomes": self.outcomes(step), **more}
        write_json(self.out / STEPS / file_of(step), sealed(value))

    def finish(self, value: Mapping[str, Any]) -> None:
        """Write the whole."""
        write_json(self.out / WHOLE, sealed({"job": self.job, **value}))

    def close(self) -> None:
        """Let others have the folder."""
        self.lock.release()


def refuse_foreign(out: Path) -> None:
    """Refuse a place that holds anything but an acceptance."""
    if out.exists() and not out.is_dir():
        raise QlabError(f"{out} is a file; choose another --out")
    inside = sorted(name for name in os.listdir(out) if name[:1] != ".") if out.is_dir() else []
    job = read_sealed(out / JOB)
    ours = isinstance(job, dict) and job.get("kind") == "acceptance of a GPU"
    if inside and not ours:
        raise QlabError(
            f"{out} holds {inside[0]} and no acceptance of a GPU; move it away or choose another "
            "--out"
        )
