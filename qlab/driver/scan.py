"""The pass over the blocks, in order: what goes through them, and every block as jobs solve it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from qlab.data.calibration import Data
from qlab.driver.batches import Batch, Batches, batch_tokens, in_batches, record
from qlab.driver.parts import own
from qlab.driver.ranks import Ranks, refuse_unseen
from qlab.driver.reached import Reached
from qlab.driver.segments import Solved, Solver, solved_by_each
from qlab.driver.shelved import Shelved
from qlab.driver.states import Entering, flat, stored_shapes
from qlab.errors import QlabError
from qlab.files.carry import Carry
from qlab.model.calls import Call
from qlab.model.loading import drop_outside, load_outside
from qlab.model.skeleton import Skeleton
from qlab.process.progress import progress
from qlab.process.surroundings import return_freed_memory


class Keeper(Protocol):
    """Whoever holds the hidden states between blocks."""

    def carry(
        self, stream: str, index: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
    ) -> Carry:
        """Where the states of a stream that enter block `index` lie."""


# block by block, stream by stream, where the states that enter it lie; empty without data
Carries = Sequence[Sequence[Carry]]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A pass that is about to go through the blocks.

    data: the samples, or None. calls: batch by batch, what each block is called with. carries:
    where hidden states lie; those that enter the first block of `todo` are there. todo: the numbers
    of the blocks that are solved, in order. reached: the states of the unquantized model, where
    they are made when a block asks for them. shelved: its statistics, where these are kept.
    """

    skeleton: Skeleton
    solvers: Sequence[Solver]
    data: Data | None
    calls: Sequence[Mapping[str, Call]]
    carries: Carries
    todo: Sequence[int]
    reached: Reached | None = None
    shelved: Shelved | None = None


def begin(
    skeleton: Skeleton,
    solvers: Sequence[Solver],
    keeper: Keeper | None,
    todo: Callable[[Carries], Sequence[int]],
    shelved: Shelved | None = None,
) -> Scan:
    """Record what every block is called with, and write what enters the first one.

    solvers: their jobs differ in their recipes alone. keeper: of rank 0, None on others. todo:
    takes where states lie; gives the numbers of the blocks that are to be solved. Rank 0 asks it.
    shelved: the statistics of the unquantized model that are kept; states are made where a block
    asks for more.
    """
    jobs, ranks = [solver.job for solver in solvers], solvers[0].ranks
    data = next((job.observed for job in jobs if job.observed is not None), None)
    streams: list[str] = [jobs[0].inputs]
    if any(job.runs_reference for job in jobs):
        streams.append("reference")
    load_outside(skeleton, with_head=False)
    entering, calls = record(skeleton, in_batches(data, batch_tokens(job.recipe for job in jobs)))
    drop_outside(skeleton)
    carries = []
    for i, path in enumerate(skeleton.blocks if data is not None else ()):
        shapes = stored_shapes(calls, path, skeleton.dtype)
        carries.append([_carry(keeper, ranks, s, i, shapes, skeleton.dtype) for s in streams])
    numbers = ranks.first(lambda: todo(carries))
    at_first = list(numbers[:1]) == [0] or (shelved is not None and bool(numbers))
    for carry in carries[0] if data is not None and at_first and ranks.is_first else ():
        carry.write(flat(entering, skeleton.dtype))
    ranks.told(None)  # the others read what rank 0 has written
    reached = None
    if shelved is not None:
        reached = Reached(skeleton, calls, [reference for (reference,) in carries], ranks)
    if carries and numbers:
        refuse_unseen([carry.path for carry in carries[0 if reached else numbers[0]]], ranks)
    return_freed_memory(from_now_on=any(job.offload is not None for job in jobs))
    return Scan(
        skeleton=skeleton,
        solvers=solvers,
        data=data,
        calls=calls,
        carries=carries,
        todo=numbers,
        reached=reached,
        shelved=shelved,
    )


def _carry(
    keeper: Keeper | None,
    ranks: Ranks,
    stream: str,
    index: int,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> Carry:
    """Where the states of a stream lie: rank 0 writes them there, and the others read them."""
    own = None if keeper is None else keeper.carry(stream, index, shapes, dtype)
    path = ranks.told(None if own is None else own.path)
    if own is not None:
        return own
    assert path is not None
    return Carry(path, shapes, dtype, "", _refuse_writing)


def _refuse_writing(path: Path, fill: Any) -> None:
    raise QlabError(f"{path} is written by rank 0 alone")


def solved_blocks(scan: Scan) -> Iterator[Solved]:
    """Every block of a pass that is to be solved, as each job solves it. The pass itself holds one
    block at a time."""
    data = scan.data
    doing = "quantizing blocks" if data is None else f"quantizing blocks on {data.count:,} tokens"
    for i in progress(scan.todo, doing) if scan.solvers[0].ranks.is_first else scan.todo:
        yield from solved_block(scan, i)


def solved_block(scan: Scan, i: int) -> Iterator[Solved]:
    """Block i of a pass, as each job solves it."""
    skeleton, path = scan.skeleton, list(scan.skeleton.blocks)[i]
    ranks, count = scan.solvers[0].ranks, len(scan.skeleton.blocks)
    tokens = [] if scan.data is None else [_tokens(of_batch[path]) for of_batch in scan.calls]
    solved = partial(solved_by_each, skeleton, scan.solvers, scan.calls[0][path], i, tokens)
    if scan.reached is not None:
        entering, leaving = own(scan.reached.entering(i), ranks), scan.reached.leaving(i)
        yield from solved([entering], leaving, scan.shelved, partial(scan.reached.ready, i))
        return
    before, after = (
        ([], [])
        if scan.data is None
        else (scan.carries[i], scan.carries[i + 1] if i + 1 < count else [])
    )
    streams: list[Batches] = [
        own(Entering(scan.calls, path, carry, skeleton.device), ranks) for carry in before
    ]
    yield from solved(streams or [_no_batches], after)
    for carry in before if after and ranks.is_first else ():
        carry.path.unlink(missing_ok=True)


def _tokens(call: Call) -> int:
    """How many tokens enter the block in a batch."""
    return math.prod(call.entering[0].shape[:-1])


def _no_batches() -> Iterator[Batch]:
    return iter(())
