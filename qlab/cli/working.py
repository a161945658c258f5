"""work: the runs of a shared folder, done by as many processes of as many machines as somebody
starts."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlab.cli.dividing import pieces_of
from qlab.cli.options import Json
from qlab.cli.output import console, report
from qlab.errors import QlabError, Unwritable
from qlab.process.progress import progress, say
from qlab.process.shown import Shown, some

if TYPE_CHECKING:
    from qlab.driver.pieces import Pieces
    from qlab.files.parts import Parts
    from qlab.files.runs import PlannedRun


@dataclass(frozen=True, repr=False, kw_only=True)
class Worked(Shown):
    """What a call of `work` did.

    made: how many pieces it made. whole: the directories of the folder that are in place. left: the
    other ones -> how many of their pieces are not made, by others neither.
    """

    made: int
    whole: tuple[Path, ...]
    left: dict[Path, int]

    def summary(self) -> dict[str, str]:
        """The facts that are printed."""
        others = [f"{path} ({pieces} pieces to make)" for path, pieces in self.left.items()]
        return {
            "made here": f"{self.made} pieces",
            "in place": some([*map(str, self.whole)]) or "none",
            "not whole": some(others) or "none",
        }

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        left = {str(path): pieces for path, pieces in self.left.items()}
        return {"made": self.made, "whole": [*map(str, self.whole)], "left": left}


def work(folder: str | Path, *, shard: tuple[int, int] = (1, 1)) -> Worked:
    """Do what is not done of the runs in a folder that `qlab quantize --jobs` filled.

    Any number of processes on any machines that share the folder may call this at once, in any
    order, twice for the same shard, and again after they were killed: what is made is the same,
    byte for byte, as of one process. Nothing is waited for. Whoever makes the last piece of a run
    puts its directory in place.

    Args:
        folder: The shared folder.
        shard: (i, n) with i from 1 to n: of every run the i-th of n parts is made first, and then
            what is left of the others.

    Returns:
        What was made here, and which directories are in place and which not yet.

    Raises:
        QlabError: A shard that is none; a folder without runs, or one whose file system cannot
            rename. Behind all other runs: one whose model, data or versions are others here, or
            whose output is gone; and what `quantize` refuses.

    Example:
        >>> import qlab
        >>> worked = qlab.work("jobs", shard=(1, 2))
        >>> [path.name for path in worked.whole], worked.left
        (['shared-int4'], {})
    """
    worked, refusals = _worked(folder, *_checked(*shard))
    _refuse(refusals)
    return worked


def work_on(
    folder: Annotated[Path, typer.Argument(help="the folder that `quantize --jobs` filled")],
    shard: Annotated[
        str, typer.Option("--shard", help="i/n: begin with the i-th of n parts, from 1/n to n/n")
    ] = "1/1",
    json_file: Json = None,
) -> None:
    """Do what is not done of the runs in a shared folder; any number of processes may."""
    worked, refusals = _worked(folder, *_parsed(shard))
    for path in worked.whole:
        console().print(f"{path} is in place", soft_wrap=True)
    for path, pieces in worked.left.items():
        rest = f"{pieces} pieces are not made yet" if pieces else "all pieces are made"
        console().print(
            f"{path}: {rest}, and another process works on it; whoever ends last puts it in "
            f"place, and so does `qlab work {quote(str(folder))}`",
            soft_wrap=True,
        )
    report(worked.json(), json_file)
    _refuse(refusals)


# ------------------------------------------------------------------ shards
def _parsed(text: str) -> tuple[int, int]:
    first, slash, shards = text.partition("/")
    if not slash or not (first.isdecimal() and shards.isdecimal()):
        raise QlabError(f"--shard {text!r} is no part of anything; write i/n, such as 1/8")
    return _checked(int(first), int(shards))


def _checked(first: int, shards: int) -> tuple[int, int]:
    if not 1 <= first <= shards:
        ends = f"shards count from 1/{shards} to {shards}/{shards}"
        ends = ends if shards > 0 else "a run has at least one part"
        raise QlabError(f"there is no shard {first}/{shards}; {ends}")
    return first, shards


def _in_turn(count: int, first: int, shards: int) -> Iterator[int]:
    """The pieces of a shard in order, and behind them those of others from the back, where their
    owners come last."""
    own = range(count * (first - 1) // shards, count * first // shards)
    yield from own
    yield from (index for index in reversed(range(count)) if index not in own)


# ------------------------------------------------------------------ all runs
def _worked(folder: str | Path, first: int, shards: int) -> tuple[Worked, dict[Path, QlabError]]:
    """What was made, and the outputs whose runs are refused: one that cannot be made keeps no other
    from it."""
    from qlab.files.runs import runs_of

    jobs, made = Path(os.path.expanduser(folder)), 0
    whole: list[Path] = []
    left: dict[Path, int] = {}
    refusals: dict[Path, QlabError] = {}
    for run in runs_of(jobs):
        try:
            if not run.is_whole:
                here, lacking = _done(run, jobs, first, shards)
                made += here
                if not run.is_whole:
                    left[run.out] = lacking
        except Unwritable:  # as on a full disk: the next run would end there, too
            raise
        except QlabError as error:
            refusals[run.out] = error
        else:
            whole += [] if run.out in left else [run.out]
    return Worked(made=made, whole=tuple(whole), left=left), refusals


def _refuse(refusals: Mapping[Path, QlabError]) -> None:
    if refusals:
        (out, why), *others = refusals.items()
        more = f"; nor is {some([str(other) for other, _ in others])}" if others else ""
        raise QlabError(f"{out} is not made: {why}{more}")


# ------------------------------------------------------------------ one run
def _done(run: "PlannedRun", jobs: Path, first: int, shards: int) -> tuple[int, int]:
    """Do of a run what nobody else is doing: how many pieces were made here, and how many are not
    made yet."""
    from qlab.files.parts import Parts

    pieces, made = pieces_of(run, jobs), 0
    parts = Parts(run.parts, pieces.count, pieces.source)
    while True:
        turn = [i for i in _in_turn(pieces.count, first, shards) if not parts.is_written(i)]
        doing = progress(turn, f"making the pieces of {run.out}") if turn else ()
        made += sum(_made(run, pieces, parts, index) for index in doing)
        lacking = sum(not parts.is_written(i) for i in range(pieces.count))
        if lacking or not _finished(run, pieces, parts):
            return made, lacking


def _made(run: "PlannedRun", pieces: "Pieces", parts: "Parts", index: int) -> bool:
    """Make a piece, unless it is made or somebody else is at it; whether it was made here."""
    from qlab.files.parts import claimed

    with claimed(run.claim(index)) as mine:
        # in this order: parts go when the run is noted as whole, and not before
        if not mine or parts.is_written(index) or run.is_whole:
            return False
        parts.folder.mkdir(parents=True, exist_ok=True)
        try:
            pieces.make(parts, index)
        except Unwritable:
            if run.is_whole:  # made twice, where no claim holds, and the parts are gone by now
                return False
            raise
        return True


def _finished(run: "PlannedRun", pieces: "Pieces", parts: "Parts") -> bool:
    """Put the directory of a run in place, unless somebody else does. True where pieces turned out
    to be damaged, and have to be made again."""
    from qlab.files.parts import claimed

    with claimed(run.claim("whole")) as mine:
        if not mine or run.is_whole:
            return False
        damaged = pieces.finish(parts, run.out, run.said["words"]["overwrite"])
        for index in damaged:
            say(f"{parts.shard(index)} is not what was written; that part is made again")
        if not damaged:
            run.note_whole()
        return bool(damaged)
