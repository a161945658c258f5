"""Several processes that quantize one model together: what they send each other, and how all of
them end when one of them fails or is gone.

Every rank runs the same steps in the same order, so each knows who sends what to whom. A rank that
fails leaves the group, on which the others wait in vain; then all tell each other what failed. One
that is gone cannot, and is named by the ranks of its machine, which watch its process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qlab.errors import QlabError, ToldElsewhere, first_line
from qlab.process.ranks import is_joined, local_device, refuse_failed, started_together
from qlab.process.sendable import Place, packed, unpacked
from qlab.process.shards import Shard, mesh_of
from qlab.process.watched import NOTICE, Lost, Watched, ended_by, watching

PATIENCE = timedelta(days=7)  # ranks wait while another solves; one that is gone is noticed at once
T = TypeVar("T")


@dataclass
class Ranks:
    """The ranks of a run; one process alone is rank 0 of 1, and sends nothing.

    rank, world: the number of this one, and of all. device: where this one runs; the job's own
    where it is alone. sent_bytes: what this rank sent to others.
    """

    rank: int = 0
    world: int = 1
    device: torch.device | None = None
    sent_bytes: int = 0
    _control: Any = None
    _tensors: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes files."""
        return self.rank == 0

    def shard(self, t: Tensor) -> Shard:
        """The rows of this rank of a tensor that all ranks have now."""
        return Shard(t, self._mesh)

    def gathered(self, shard: Shard) -> Tensor:
        """All rows of such a tensor, as all ranks ask for them."""
        # a rank that failed has left this group; shards hold theirs for as long as they live
        dist.barrier(group=self._control)
        self.sent_bytes += shard.sent_bytes
        return shard.gathered()

    @cached_property
    def _mesh(self) -> DeviceMesh:
        device = self.device or torch.device("cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        return mesh_of(dist.new_group(backend=backend, timeout=PATIENCE), device)

    def told(self, value: T, by: int = 0) -> T:
        """The value of rank `by`, on every rank."""
        if self.world == 1:
            return value
        return self._moved(value if self.rank == by else None, by, None)

    def first(self, work: Callable[[], T]) -> T:
        """What the work gives on rank 0, which alone does it, on every rank."""
        return self.told(work() if self.is_first else None)  # type: ignore[return-value]

    def sent(self, value: T | None, source: int, to: int) -> T | None:
        """The value of rank `source` on rank `to`; None on all others. Nothing moves where the two
        are one."""
        if source == to:
            return value if self.rank == to else None
        if self.rank not in (source, to):
            return None
        moved = self._moved(value, source, to)
        return moved if self.rank == to else None

    def all_told(self, value: T) -> list[T]:
        """The value of every rank, on every rank: plain data."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, group=self._control)
        return values

    def _moved(self, value: Any, source: int, to: int | None) -> Any:
        """A value from one rank to another, or to all (None)."""
        data, tensors = packed(value) if self.rank == source else (b"", [])
        size = torch.tensor([len(data)], dtype=torch.int64)
        self._move(size, source, to)
        head = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == source:
            head = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._move(head, source, to)
        if self.rank == source:
            for flat in tensors:
                self._move(flat, source, to)
            return value
        return unpacked(bytes(head.numpy()), lambda place: self._received(place, source, to))

    def _received(self, place: Place, source: int, to: int | None) -> Tensor:
        device = place.device if place.device.type == "cpu" else self.device
        flat = torch.empty(place.nbytes, dtype=torch.uint8, device=device)
        self._move(flat, source, to)
        return place.of(flat)

    def _move(self, flat: Tensor, source: int, to: int | None) -> None:
        if not flat.numel():
            return
        group = self._control if flat.device.type == "cpu" else self._tensors
        if self.rank == source:
            self.sent_bytes += flat.nbytes * (self.world - 1 if to is None else 1)
        if to is None:
            dist.broadcast(flat, source, group=group)
        elif self.rank == source:
            dist.send(flat, to, group=group)
        else:
            dist.recv(flat, source, group=group)


def refuse_unlike(ranks: Ranks, jobs: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse ranks that see something else than rank 0: before any work, by its name.

    jobs: name of a job -> what its models, recipes and so on are, as plain data.
    """
    told = ranks.all_told(jobs)
    for rank, theirs in enumerate(told):
        if theirs.keys() != told[0].keys():
            raise QlabError(
                f"rank {rank} makes {', '.join(theirs)}, and rank 0 makes {', '.join(told[0])}; "
                "start all ranks by the same command"
            )
        facts = [
            (what, fact, told[0][job][what]) for job in theirs for what, fact in theirs[job].items()
        ]
        for what, fact, first in facts:
            if fact != first:
                raise QlabError(
                    f"the ranks see different {what}: rank {rank} has {_short(fact, first)}, and "
                    f"rank 0 has {_short(first, fact)}; give all of them the same"
                )


def _short(fact: Any, other: Any) -> str:
    """What of a fact is not in the other."""
    if isinstance(fact, dict) and isinstance(other, dict):
        fact = {name: value for name, value in fact.items() if other.get(name) != value}
    return repr(fact)[:200]


def refuse_unseen(paths: Sequence[Path], ranks: Ranks) -> None:
    """Refuse files of rank 0 that are not there for others."""
    told = ranks.all_told([str(path) for path in paths if not path.is_file()])
    for rank, missing in enumerate(told):
        if missing:
            raise QlabError(
                f"rank {rank} does not see {missing[0]}, which rank 0 has written; write to a "
                "folder that all ranks share"
            )


# ------------------------------------------------------------------ beginning and end
@contextmanager
def together(device: torch.device | str) -> Iterator[Ranks]:
    """The ranks of the initialised process group, for as long as they work together; one process
    alone where there is none. An error of one ends all of them: rank 0 raises it, the others raise
    that it is told elsewhere; where a rank is gone, each of them says so."""
    if not is_joined():
        if started_together() > 1:
            raise QlabError(
                f"{started_together()} processes were started together (WORLD_SIZE), and no "
                "process group joins them, so that each would quantize the whole model; call "
                "torch.distributed.init_process_group() first, or unset WORLD_SIZE"
            )
        yield Ranks()
        return
    where = local_device(device)
    verdict = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks = Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        device=where,
        _control=dist.new_group(backend="gloo", timeout=PATIENCE),
        _tensors=dist.new_group(backend="nccl") if where.type == "cuda" else None,
    )
    with watching(ranks.rank, ranks.all_told) as watched, ended_by(watched):
        try:
            yield ranks
        except Lost:
            raise
        except Exception as error:
            _leave(ranks)
            _end(error, ranks, watched, verdict)
        finally:
            _leave(ranks)
            dist.destroy_process_group(verdict)


def _leave(ranks: Ranks) -> None:
    """Close the group; whoever waits for this rank there stops waiting."""
    for name in ("_control", "_tensors"):
        group = getattr(ranks, name)
        setattr(ranks, name, None)
        if group is not None:
            dist.destroy_process_group(group)


def _end(error: Exception, ranks: Ranks, watched: Watched, verdict: Any) -> NoReturn:
    """Raise what ended the run."""
    own = None if _is_lost(error) else error
    if watched.gone.wait(0):
        raise watched.lost() from error
    try:
        refuse_failed(own, verdict)
    except ToldElsewhere:
        raise
    except Exception as failed:
        if not _is_lost(failed):
            raise
        watched.gone.wait(NOTICE)
        raise watched.lost() from error
    raise QlabError(f"the ranks lost each other ({first_line(error)}); go on with --resume")


def _is_lost(error: BaseException) -> bool:
    """Whether a rank waited in vain for another."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
