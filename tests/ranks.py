"""Several processes as the ranks of a process group, which are forked from one that has imported
everything already."""

import os
import pickle
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from ports import free_port

LENGTH = 16  # tokens of a window, and of a batch, that blocks are traced for before
LOADED = [
    "pytest",
    "qlab.cli",
    "qlab.driver.quantize",
    "qlab.generation.pipeline",
    "qlab.methods",
    "torch.distributed",
    "torch.export._trace",  # what is imported at the first export
    "transformers.models.llama.modeling_llama",
    "traced",
]


def run_ranks(folder, world, work, *arguments, joins=True):
    """What work(rank, *arguments) gives on every rank: its value, or the exception that it raised.

    joins: whether the process group is there before the work begins, or the work makes it of what a
    launcher says.
    """
    port = free_port()
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    with pytest.MonkeyPatch.context() as patch:  # where it finds what it is to import
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    processes = [
        context.Process(target=_rank, args=(rank, world, port, folder, joins, work, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1800)
        assert process.exitcode is not None, "a rank hangs"
    return [read(folder / f"rank{rank}") for rank in range(world)]


def read(path):
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _rank(rank, world, port, folder, joins, work, arguments):
    torch.set_num_threads(1)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launcher.items()})
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    if joins:
        dist.init_process_group("gloo")
    try:
        value = work(rank, *arguments)
    except BaseException as error:
        value = error
    sys.stdout.flush()
    Path(folder / f"rank{rank}").write_bytes(pickle.dumps(value))
