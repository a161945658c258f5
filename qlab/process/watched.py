"""Processes that work together, each of which notices when another one is gone."""

import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from qlab.errors import QlabError

NOTICE = 5.0  # seconds in which the end of a process is known to those that watch it
BRIEF = 1.0  # the same where a launcher knows of it already


class Lost(QlabError):
    """A rank is gone."""


@dataclass
class Watched:
    """The processes of other ranks. hosts: rank -> its machine. dead: ranks of this machine whose
    processes were the first to end."""

    rank: int
    hosts: Mapping[int, str]
    here: str
    dead: list[int] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)

    def lost(self) -> Lost:
        """The error that names them."""
        if self.dead:
            who = " and ".join(f"rank {rank}" for rank in sorted(self.dead))
        else:
            far = sorted({host for host in self.hosts.values() if host != self.here})
            who = f"a rank on {' or '.join(far)}" if far else "another rank"
        verb = "are" if len(self.dead) > 1 else "is"
        return Lost(
            f"{who} of {len(self.hosts)} {verb} gone, without which rank {self.rank} cannot go on; "
            "start all of them again with --resume"
        )


@contextmanager
def watching(own: int, all_told: Callable[[Any], list[Any]]) -> Iterator[Watched]:
    """Watch the processes of the other ranks on this machine.

    Args:
        own: the number of this rank.
        all_told: what each rank says -> what all say.
    """
    told = all_told((_machine(), socket.gethostname(), os.getpid()))
    here = told[own][0]
    hosts = {rank: host for rank, (_, host, _) in enumerate(told)}
    watched = Watched(rank=own, hosts=hosts, here=hosts[own])
    handles = {
        os.pidfd_open(pid): rank
        for rank, (machine, _, pid) in enumerate(told)
        if machine == here and rank != own and hasattr(os, "pidfd_open")  # Linux alone has it
    }
    stop, stopping = os.pipe()
    all_told(None)  # none ends before all watch
    thread = threading.Thread(target=_watch, args=(handles, stop, watched), daemon=True)
    thread.start()
    try:
        yield watched
    finally:
        os.close(stopping)
        thread.join()
        for handle in (*handles, stop):
            os.close(handle)


def _watch(handles: Mapping[int, int], stop: int, watched: Watched) -> None:
    """Wait until the first of some processes ends, or until nobody cares."""
    polled = select.poll()
    for handle in (*handles, stop):
        polled.register(handle, select.POLLIN | select.POLLHUP)
    ready = [handle for handle, _ in polled.poll()]
    if stop not in ready:
        watched.dead += [handles[handle] for handle in ready]
        watched.gone.set()


def _machine() -> str:
    """What tells machines, and containers on one of them, apart."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    with suppress(OSError):
        return f"{boot.read_text()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


@contextmanager
def ended_by(watched: Watched) -> Iterator[None]:
    """A launcher ends all ranks when one is gone. This one says which that was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if watched.gone.wait(BRIEF):
            raise watched.lost()
        signal.signal(number, before)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
