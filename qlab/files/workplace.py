"""The folder in which an output is built: whose it is, what an earlier run left in it, and how it
becomes the output.

Everything is built in `OUT.partial`, whose work folder says how far the run came, and renamed to
`OUT` at the end. A lock in the work folder, which goes with it when it is renamed, keeps every
other run away until the work folder is gone.
"""

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from qlab.errors import Outage, QlabError, Unwritable
from qlab.files.atomic import atomically, sync
from qlab.files.hashed import HashedFiles
from qlab.files.lock import LOCK, Lock
from qlab.files.ownership import RECORD, damaged, foreign
from qlab.files.place import WORK, is_taken, refuse_existing, working
from qlab.files.record import job_of
from qlab.files.work_folder import (
    JOB,
    OVERWRITE,
    REPLACED,
    broken_shards,
    delete,
    ended,
    holds_only,
    read_job,
    remove_work_folder,
    same_but_for_source,
    strangers,
)
from qlab.process.progress import say


class Workplace(ABC):
    """The place of one output, which a run owns until the context ends. The constructor takes the
    right to write there; `begin` begins the job.

    out: the folder that `place` returned. finished: whether the job was done before, so that there
    is nothing to write."""

    def __init__(self, out: Path, overwrite: bool, resume: bool):
        self.out, self.overwrite, self.resume = out, overwrite, resume
        self.partial = working(out)
        self.work = self.partial / WORK
        self.job: Any = None
        self.source: HashedFiles | None = None
        self.lock: Lock | None = None
        # begun: whether this very run began the job, rather than an earlier one
        self.begun = self.finished = False
        # folders around the output that were not there before
        self.new_folders: list[Path] = []
        # A finished output is read where nothing can be written, too.
        if not (resume and self._seems_finished()):
            self._enter()

    def begin(self, job: Mapping[str, Any], *, source: HashedFiles | None = None) -> None:
        """Begin a job, or go on with it.

        Args:
            job: What identifies it; only the same one may resume. Its "source" is the hash of
                what it reads, or a fingerprint of that where it is hashed while it is read.
            source: What is hashed while it is read.
        """
        self.job = json.loads(json.dumps(job))
        self.source = source
        if self.lock is None and self._was_finished():
            self.finished = True
            return
        if self.lock is None:
            self._enter()
        with self._refused():
            self.finished = self._start()
        if self.finished:
            self._let_go()

    @abstractmethod
    def shard_names(self) -> list[str]:
        """The files that hold the tensors of the output."""

    @abstractmethod
    def source_agrees(self) -> bool:
        """Whether the source still holds what an earlier run read of it."""

    def hashed_job(self) -> Any:
        """The job as qlab.json records it, with the hash of its source."""
        return self.job if self.source is None else {**self.job, "source": self.source.digest()}

    def _seems_finished(self) -> bool:
        """Whether there may be nothing to write."""
        return (
            not os.path.lexists(self.partial)
            and not os.path.lexists(self.out / WORK)
            and (self.out / RECORD).is_file()
        )

    def _enter(self) -> None:
        with self._refused():
            self._own()
            self._undo_swap()
            if not self.resume:
                refuse_existing(self.out, self.overwrite, contents=False)

    @contextmanager
    def _refused(self) -> Iterator[None]:
        """A context for what may refuse the place: on an error the lock is released."""
        try:
            yield
        except OSError as error:
            self._let_go()
            raise QlabError(
                f"{self.partial} cannot be created ({error.strerror}); choose another output "
                "directory"
            ) from error
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self.begun and isinstance(error, QlabError) and not isinstance(error, Outage):
            self._clear()
        self._let_go()

    # -------------------------------------------------------------- ownership
    def _own(self) -> None:
        """Lock the partial directory, which is made where it is missing. A run that finishes there
        at this moment keeps it."""
        if os.path.islink(self.partial) or (is_taken(self.partial) and not self.work.is_dir()):
            raise QlabError(
                f"{self.partial} was not made by qlab, which needs this name for a while; move it "
                "away"
            )
        self.new_folders = [folder for folder in self.partial.parents if not folder.exists()]
        while self.lock is None:
            self._settle()
            if self.lock is None:
                self.lock = Lock(self.work)
                if ended(self.out):  # it did so before this lock was taken
                    self._let_go()

    def _settle(self) -> None:
        """Finish what a run left undone that was killed after its last rename. An output with a
        broken shard goes back to the partial directory."""
        if not ended(self.out):
            return
        lock = Lock(self.out / WORK)
        try:
            if not ended(self.out):
                lock.release()
                return
            broken = broken_shards(self.out)
            if broken is None:
                remove_work_folder(self.out / WORK)
                lock.release()
                return
            say(f"{broken}; that part is made again")
            os.replace(self.out, self.partial)
            lock.path = self.work / LOCK
            self.lock = lock
        except BaseException:
            lock.release()
            raise

    def _let_go(self) -> None:
        """Release the lock. Where no job was begun, the folders that were made for it are
        removed."""
        if self.lock is None:
            return
        if (
            self.lock.holds()
            and not os.path.lexists(self.work / JOB)
            and holds_only(self.partial, WORK)
            and holds_only(self.work, LOCK)
        ):
            remove_work_folder(self.work)
            with suppress(OSError):  # where another run is in it by now
                for folder in (self.partial, *self.new_folders):
                    folder.rmdir()
        self.lock.release()
        self.lock = None

    def atomically(self, path: Path, write: Callable[[Path], object]) -> None:
        """Write a file of this run. Refuses where somebody removed the folder, which may be another
        run's by now."""
        if self.lock is None or not self.lock.holds():
            raise Unwritable(f"{self.partial} was taken away while it was written; start again")
        atomically(path, write)

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file of this run."""
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        self.atomically(path, lambda temporary: temporary.write_text(text))

    # -------------------------------------------------------------- the beginning
    def _start(self) -> bool:
        """Take over what an earlier run of the job left, or begin; True if the whole job was
        finished already."""
        begun = read_job(self.work / JOB)
        if self.resume and begun == self.job and self.source_agrees():
            self.overwrite |= (self.work / OVERWRITE).exists()
            refuse_existing(self.out, self.overwrite)
            self._set_aside(self.shard_names())
            return False
        if self.resume and begun is not None:
            raise QlabError(
                f"{self.partial} belongs to another job (model, recipe, data, seed or versions "
                "differ); remove it or choose another directory"
            )
        if self.resume and self._was_finished():
            return True
        refuse_existing(self.out, self.overwrite)
        if self.resume and not holds_only(self.work, LOCK):
            say(f"{self.work / JOB} is missing or not what was written; the run begins anew")
        self._clear()
        if self.overwrite:
            (self.work / OVERWRITE).touch()
        self.write_json(self.work / JOB, self.job)  # from here on the run can be resumed
        self.begun = True
        sync(self.partial.parent)
        return False

    def _was_finished(self) -> bool:
        """Whether the output is this job's. Refuses an output of this job that was changed
        since."""
        recorded = job_of(self.out)
        if not same_but_for_source(recorded, self.job) or recorded != self.hashed_job():
            return False
        for name, damage in damaged(self.out).items():
            raise QlabError(
                f"the output directory {self.out} of this job is finished, and {name} {damage}; "
                "move it away to make it again"
            )
        return True

    def _undo_swap(self) -> None:
        """Put back what an earlier run, killed between the two renames of its end, had moved out of
        the way."""
        if (self.work / REPLACED).exists() and not self.out.exists():
            os.replace(self.work / REPLACED, self.out)

    def _clear(self) -> None:
        """Remove what an earlier run wrote; the lock stays."""
        self._set_aside()
        for path in self.partial.iterdir():
            if path != self.work:
                delete(path)
        (self.work / JOB).unlink(missing_ok=True)
        for path in self.work.iterdir():
            if path.name != LOCK:
                delete(path)

    def _set_aside(self, shards: Iterable[str] | None = None) -> None:
        """Move files that no run of qlab wrote to a folder beside this one: they are no part of the
        output, and not qlab's to delete. shards: the names of this job's shards; None for those of
        any job."""
        for path in strangers(self.partial, shards):
            home = self.out.with_name(self.out.name + ".aside")
            target = home / path.relative_to(self.partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            while os.path.lexists(target):
                target = target.with_name(f"{target.name}~")
            os.replace(path, target)
            say(f"{path} is no file of this run; it was moved to {target}")

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """A context for the work. If the input is refused, the partial directory is deleted: the
        corrected call is another job. If the disk is full, the model cannot be read or the process
        is killed, it stays to be resumed."""
        try:
            yield
        except Outage:
            raise
        except QlabError:
            if self.lock and self.lock.holds():
                self._clear()
            raise

    # -------------------------------------------------------------- the end
    def put_in_place(self) -> None:
        """Rename the partial directory to the output, whose former contents go."""
        self._set_aside(self.shard_names())
        for leftover in self.partial.rglob(".*.tmp"):  # of a killed run
            leftover.unlink()
        if is_taken(self.out):
            if not self.overwrite:
                raise Unwritable(
                    f"the output directory {self.out} appeared during the run; move it away and "
                    "use --resume"
                )
            reason = foreign(self.out)
            if reason:
                raise Unwritable(f"{reason}; move it away and use --resume")
            self._move_away()
        # The work folder goes last: a run killed before can still resume.
        os.replace(self.partial, self.out)
        sync(self.out.parent)
        remove_work_folder(self.out / WORK)
        self.begun = False  # a refusal of what comes after it does not concern what is in place

    def _move_away(self) -> None:
        """Take an earlier output out of the way, unless somebody put a file into it by now."""
        os.replace(self.out, self.work / REPLACED)
        reason = foreign(self.work / REPLACED, contents=False)
        if reason:
            os.replace(self.work / REPLACED, self.out)
            raise Unwritable(f"{reason}; move it away and use --resume")
