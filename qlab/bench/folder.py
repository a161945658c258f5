"""The folder of one bench: models, figures and bench.json of this bench and of no other one."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlab.errors import QlabError
from qlab.files.atomic import write_json
from qlab.files.figures import refuse_foreign_figure
from qlab.files.lock import Lock
from qlab.files.ownership import foreign, read_sealed, sealed
from qlab.files.place import WORK, is_taken, places
from qlab.process.extras import needed

RECORD, FIGURES = "bench.json", ("methods.png", "layers.png")


def refuse_foreign(
    out: Path, methods: Iterable[str], job: Mapping[str, Any], model: Path, files: Iterable[Path]
) -> None:
    """Refuse a folder that holds anything but an earlier result of the same bench, which is
    replaced.

    job: what the figures depend on. model, files: what the bench reads.
    """
    if out.exists() and not out.is_dir():
        raise QlabError(f"{out} is a file; choose another --out")
    for path in places(out, list(methods), model, files).values():
        reason = foreign(path) if is_taken(path) else None
        if reason:
            raise QlabError(
                f"{path} exists and is no result of qlab ({reason}); move it away or choose "
                "another --out"
            )
    needed("matplotlib", "bench")  # asked for before anything is measured
    for name in FIGURES:
        refuse_foreign_figure(out / name)
    if (out / RECORD).exists() and not isinstance(read_sealed(out / RECORD), dict):
        raise QlabError(
            f"{out / RECORD} is no record of a bench, or was changed since; move it away or "
            "choose another --out"
        )
    _refuse_other(out, job)


def _refuse_other(out: Path, job: Mapping[str, Any]) -> None:
    """Refuse a folder that another bench has, finished or not."""
    for record in (read_sealed(out / RECORD), read_sealed(out / WORK / RECORD)):
        other_job = record.get("job") if isinstance(record, dict) else job
        if other_job != job:
            model = "an older version of qlab"
            if isinstance(other_job, dict):
                model = str(other_job.get("model"))
            raise QlabError(
                f"{out} holds another bench ({model}, or other options); choose another --out"
            )


@contextmanager
def owned(out: Path, job: Mapping[str, Any]) -> Iterator[None]:
    """A context for the work. It keeps other benches out of the folder, also after this one was
    killed, and removes the folder where nothing was written."""
    lock = Lock(out / WORK)
    try:
        _refuse_other(out, job)
        write_json(out / WORK / RECORD, sealed({"job": job}))
        yield
        shutil.rmtree(out / WORK)
    except QlabError:
        if os.listdir(out) == [WORK]:
            shutil.rmtree(out)
        raise
    finally:
        lock.release()
