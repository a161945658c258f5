"""Processes that a launcher such as torchrun started together: the process group that joins them,
and an error that is told once."""

import atexit
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from qlab.errors import QlabError, ToldElsewhere, first_line, printable

T = TypeVar("T")


def started_together() -> int:
    """How many processes the launcher says that it started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_joined() -> bool:
    """Whether this process is one of several in an initialised process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is rank 0, or alone: the one that writes and prints."""
    return not is_joined() or dist.get_rank() == 0


def join() -> bool:
    """Make a process group of the processes that a launcher such as torchrun started. Gives whether
    there are several. What is worth a warning is said by rank 0."""
    if started_together() == 1 or "MASTER_ADDR" not in os.environ:
        return False
    dist.init_process_group("gloo")
    atexit.register(_leave)
    if dist.get_rank():
        warnings.simplefilter("ignore")
    return True


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: torch.device | str) -> torch.device:
    """The device of this rank: of several GPUs of one machine, the one of its local rank."""
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", _local_rank() if where.index is None else where.index)
        torch.cuda.set_device(where)
    return where


def _local_rank() -> int:
    local = os.environ.get("LOCAL_RANK")
    return dist.get_rank() % max(1, torch.cuda.device_count()) if local is None else int(local)


def agreed(work: Callable[[], T], group: Any = None) -> T:
    """What the work of this rank gives, where it failed on none of a group. Otherwise rank 0 raises
    what failed first, and the others raise the same, told elsewhere. One process alone works."""
    if not is_joined():
        return work()
    error: Exception | None = None
    try:
        value = work()
    except Exception as failed:
        error = failed
    refuse_failed(error, group)
    return value


def refuse_failed(error: Exception | None, group: Any = None) -> None:
    """Raise the first error among those of all ranks, if there is one.

    Args:
        error: that of this rank.
        group: torch's process group.
    """
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, None if error is None else told(error), group=group)
    failures = [(rank, why) for rank, why in enumerate(said) if why is not None]
    if not failures:
        return
    rank, why = failures[0]
    if dist.get_rank(group):
        raise ToldElsewhere(f"rank {rank}: {why}") from error
    raise error or QlabError(f"rank {rank}: {why}")


def told(error: BaseException) -> str:
    """An error in a line; that of qlab as it is."""
    if isinstance(error, QlabError):
        return str(error)
    return printable(f"{type(error).__name__}: {first_line(error)}")
