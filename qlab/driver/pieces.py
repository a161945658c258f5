"""A run whose blocks do not depend on each other, as pieces that any process makes at any time.

A piece is a segment of the output: what surrounds the blocks, or one block. Each gives the bytes
that it has in a run of one process.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch

from qlab.codecs import CODECS
from qlab.driver.batches import batch_tokens, in_batches
from qlab.driver.job import CODEC, Job
from qlab.driver.kept import Folder
from qlab.driver.plan import plan_of
from qlab.driver.quantize import quantize
from qlab.driver.ranks import Ranks
from qlab.driver.run import Run, finish, write_outside, write_solved
from qlab.driver.scan import Scan, begin, solved_block
from qlab.driver.segments import Solver
from qlab.driver.shelved import Keeping, Known
from qlab.driver.write import identity_of
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.hashed import HashedFiles
from qlab.files.offload import scratch
from qlab.files.parts import Parts
from qlab.files.place import place
from qlab.files.segments import Segments
from qlab.files.statistics import Shelf
from qlab.files.writer import Writer
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import undisturbed


class Pieces(Protocol):
    """A run in pieces."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides which bytes come out."""

    @property
    def count(self) -> int:
        """How many pieces there are."""

    @property
    def model(self) -> Checkpoint:
        """The model that is quantized."""

    @property
    def sha256(self) -> str | None:
        """The hash of the model's files, where the run has to know it before its end."""

    @property
    def source(self) -> HashedFiles | None:
        """What is read of the model, where it is hashed on the way."""

    def make(self, parts: Parts, index: int) -> None:
        """Make a piece and write it to the shared folder."""

    def finish(self, parts: Parts, out: Path, overwrite: bool) -> list[int]:
        """Put the output together of its pieces. Returns those that are damaged, and have to be
        made again before."""


def is_divisible(job: Job) -> bool:
    """Whether no block of a job depends on how the ones before it are solved."""
    return not job.measures and (job.observed is None or job.inputs == "reference")


class Blocks:
    """A job whose blocks do not depend on each other, as `Pieces`.

    Args:
        job: The job, with its format.
        shelf: Where the statistics of the unquantized model are kept.
        sha256: The hash of the model's files where it is known.
    """

    @undisturbed
    @torch.no_grad()
    def __init__(self, job: Job, shelf: Shelf, sha256: str | None = None) -> None:
        self.shelf, self.model = shelf, job.model
        self.known: Known | None = None
        if job.observed is not None:
            self.known = Known(job.model, sha256)
        self.sha256 = None if self.known is None else self.known.sha256
        self.source: HashedFiles | None
        self.source = source = HashedFiles(job.model.path, job.model.stored)
        self.job = replace(job, model=replace(job.model, reader=source.read))
        dtype = job.dtype or job.model.running_dtype
        self.skeleton = Skeleton(self.job.model, dtype, job.device)
        self.plan = plan_of(self.job, self.skeleton)
        self.plan.check(job.memory)
        self.identity = identity_of(self.job, self.skeleton)
        self.count = len(self.skeleton.blocks) + 1

    @undisturbed
    @torch.no_grad()
    def make(self, parts: Parts, index: int) -> None:
        """See `Pieces`."""
        run = self._run(parts)
        if index == 0:
            write_outside(self.skeleton, run)
            return
        scan = self._scan
        self._check_first_alone(run, index - 1)
        for block in solved_block(scan, index - 1):
            write_solved(self.skeleton, run, block, scan.calls[0][block.after.path])

    @undisturbed
    @torch.no_grad()
    def finish(self, parts: Parts, out: Path, overwrite: bool) -> list[int]:
        """See `Pieces`."""
        folder = place(out, self.model.path, set(self.model.files.values()))
        return put_together(self, parts, folder, overwrite, self._end)

    def _end(self, writer: Writer) -> None:
        first, *_ = in_batches(self._scan.data, batch_tokens([self.job.recipe]))
        calls, tokens = self._scan.calls[0], first["input_ids"].shape
        finish(self.skeleton, self._run(writer), calls, tokens)

    def _run(self, segments: Segments) -> Run:
        codec = CODECS[self.job.codec or CODEC]
        # of a run's writer, a piece uses what all segments have
        writer = cast(Writer, segments)
        return Run(job=self.job, plan=self.plan, ranks=Ranks(), own_writer=writer, codec=codec)

    @cached_property
    def _scan(self) -> Scan:
        """The pass, of which blocks are solved in any order."""
        shelved = None
        if self.known is not None:
            keeping = Keeping(shelf=self.shelf, known=self.known)
            shelved = keeping.of([self.job], self.skeleton, Ranks())
        self._states = scratch("states", self.job.offload)
        keeper, every = Folder(Path(self._states.name)), range(self.count - 1)
        solver = Solver(
            job=self.job.remaining, ranks=Ranks(), experts_at_once=self.plan.experts_at_once
        )
        return begin(self.skeleton, [solver], keeper, lambda carries: every, shelved)

    def _check_first_alone(self, run: Run, block: int) -> None:
        """Of the blocks of a program, the first one is checked and probed, as in one process."""
        calls = self._scan.calls[0]
        codes = [self.skeleton.programs.code(path, calls[path]) for path in self.skeleton.blocks]
        code, (solver,) = codes[block], self._scan.solvers
        for seen in (run.probed, solver.checked):
            seen.discard(code) if codes.index(code) == block else seen.add(code)


def put_together(
    pieces: Pieces, parts: Parts, out: Path, overwrite: bool, end: Callable[[Writer], None]
) -> list[int]:
    """Take over all pieces, and end the directory. Returns those that are damaged, whose notes are
    removed, so that they count as not made."""
    path = pieces.model.path
    with Writer(out, overwrite, resume=True) as writer:
        writer.begin(pieces.identity, pieces.count, path, source=pieces.source)
        if writer.finished:
            return []
        lacking = [index for index in range(pieces.count) if not writer.has(index)]
        damaged = [index for index in lacking if not writer.take(index, parts)]
        for index in damaged:
            parts.notes_path(index).unlink(missing_ok=True)
        if damaged:
            return damaged
        if not writer.source_agrees():
            raise QlabError(
                f"{path} is not the model of which {parts.folder} holds parts; remove that folder, "
                "and work again"
            )
        end(writer)
    return []


class Whole:
    """A job whose blocks depend on each other: no piece of it is made by itself, and whoever puts
    it together does all of it, or goes on where somebody stopped.

    Args:
        job: The job, with its format.
        keep_statistics: See `quantize`.
    """

    count, sha256, source = 0, None, None

    @undisturbed
    @torch.no_grad()
    def __init__(self, job: Job, keep_statistics: Path | None) -> None:
        self.job, self.model, self.keep_statistics = job, job.model, keep_statistics
        skeleton = Skeleton(job.model, job.dtype or job.model.running_dtype, job.device)
        plan_of(job, skeleton).check(job.memory)
        self.identity = identity_of(job, skeleton)

    def make(self, parts: Parts, index: int) -> None:
        """See `Pieces`."""
        raise IndexError(index)

    def finish(self, parts: Parts, out: Path, overwrite: bool) -> list[int]:
        """See `Pieces`."""
        quantize(
            **vars(self.job),
            out=out,
            overwrite=overwrite,
            resume=True,
            keep_statistics=self.keep_statistics,
        )
        return []
