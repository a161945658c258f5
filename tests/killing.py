"""Runs in a process of their own, which dies where a test says."""

import os
import signal

import torch

import qlab.files.writer

KILLED = -signal.SIGKILL


def start(run) -> int:
    """The process id of a forked child that runs `run`."""
    pid = os.fork()
    if pid == 0:
        try:
            # torch gives a fork a new pool here; two threads that asked for it at once would fail
            torch.set_num_threads(torch.get_num_threads())
            run()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


def finish(pid: int) -> int:
    """The child's exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying(run, n: int, when: str):
    """`run` in a process that kills itself right before or after its n-th rename."""
    real, count = os.replace, 0

    def replace(*paths):
        nonlocal count
        count += 1
        if count == n and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*paths)
        if count == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def die():
        qlab.files.writer.os.replace = replace
        run()

    return die
