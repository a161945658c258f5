"""Several processes that run one model together (tensor parallel). Rank 0 schedules, samples and
answers; the others run the forward passes that it tells them of, each with its part of the weights
and of the cache.

    rank 0:  plan -> pass --tell--> compute -> draw
    others:                 pass -> compute           until rank 0 closes

Inside a pass all ranks wait for each other. One that fails there cannot be waited for, so that a
pass that fails anywhere ends all of them.
"""

import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from qlab.errors import QlabError
from qlab.generation.bounds import SHARE, free_bytes
from qlab.generation.cache import States, has_states, probed
from qlab.generation.engine import Engine
from qlab.generation.passes import Pass
from qlab.process.ranks import agreed, is_joined, local_device, told
from qlab.process.surroundings import undisturbed

PATIENCE = timedelta(minutes=10)  # that ranks wait for one another inside a pass
FOREVER = timedelta(days=3650)  # that they wait for the next one
T = TypeVar("T")


class GroupEnded(SystemExit):
    """A pass failed on this rank, or another rank is gone. No request can be answered any more: a
    process that does not catch it ends with this sentence and exit code 1."""


class Group:
    """The ranks that run a model together. All of them make it at the same time.

    Args:
        device: where this rank runs.
    """

    def __init__(self, device: torch.device):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device, self.is_over = device, False
        self._control = dist.new_group(backend="gloo", timeout=FOREVER)
        backend = "nccl" if device.type == "cuda" else "gloo"
        self.passes = dist.new_group(backend=backend, timeout=PATIENCE)

    def agreed(self, work: Callable[[], T]) -> T:
        """What the work of this rank gives, where it failed on none."""
        return agreed(work, self._control)

    def memory(self) -> int:
        """Bytes that the cache of every rank may take: of each machine, its ranks share what the
        cache of one process would."""
        host = (socket.gethostname(), str(self.device))
        said: list[Any] = [None] * self.world
        dist.all_gather_object(said, (host, free_bytes(self.device)), group=self._control)
        hosts = [one for one, _ in said]
        return min(int(SHARE * free) // hosts.count(one) for one, free in said)

    # -------------------------------------------------------------- passes
    def lead(self, engine: Engine) -> None:
        """Let the others run the passes of an engine too. Its model cannot be called otherwise
        from then on: this rank would wait for the others."""
        is_pass = False

        def together(call: Pass, states: States) -> Tensor:
            nonlocal is_pass
            if self.is_over:
                self._end("the ranks that ran the model with it have ended")
            try:
                self._tell(_on(call, torch.device("cpu")))
                is_pass = True
                logits = engine.compute(call, states)
                is_pass = False
                return logits
            except BaseException as error:
                self._end(_why(error), error)

        def refuse_alone(*_: object) -> None:
            if not is_pass:
                raise QlabError(
                    f"the model runs on {self.world} ranks, which only run the passes of its "
                    "engine; call the model in one process"
                )

        engine.model.register_forward_pre_hook(refuse_alone)
        engine.forward = together

    @undisturbed
    @torch.no_grad()
    def follow(self, engine: Engine) -> None:
        """Run the passes of rank 0 until it says that there are no more."""
        with _unmoved():
            while True:
                try:
                    call = self._heard()
                    if call is None:
                        break
                    engine.compute(_on(call, self.device), [])
                except Exception as error:
                    self._end(_why(error), error)
        self.is_over = True

    def close(self) -> None:
        """Let the others end. Nothing, where they have."""
        if not self.is_over:
            self.is_over = True
            if self.rank == 0:
                with suppress(RuntimeError, ValueError):  # they are gone
                    self._tell(None)

    def _tell(self, call: Pass | None) -> None:
        dist.broadcast_object_list([call], src=0, group=self._control)

    def _heard(self) -> Pass | None:
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._control)
        return heard[0]

    def _end(self, why: str, error: BaseException | None = None) -> NoReturn:
        self.is_over = True
        raise GroupEnded(f"qlab: rank {self.rank} of {self.world}: {why}; run it again") from error


def run_together(group: Group, make: Callable[..., Any]) -> Any:
    """The pipeline that `make` gives, on rank 0; on another rank, the one whose passes have been
    run.

    make: (the bytes that its cache may take, as `memory`) -> a pipeline.
    """
    memory = group.memory()

    def made() -> Any:
        pipe = make(memory=memory)
        if has_states(probed(pipe.engine.model)):
            raise QlabError(
                "the model has recurrent states, which ranks do not share; run it in one process"
            )
        return pipe

    pipe = group.agreed(made)
    cost = group.agreed(pipe.cache_cost)  # while all may call the model
    pipe.cost = None if cost is None else replace(cost, ranks=group.world)
    pipe.group = group
    if group.rank == 0:
        group.lead(pipe.engine)
        weakref.finalize(pipe, group.close)  # also where the process ends without closing it
    else:
        group.follow(pipe.engine)
        pipe.close()
    return pipe


def _on(call: Pass, device: torch.device) -> Pass:
    """The pass with what else the model takes on a device."""
    return replace(call, inputs={name: t.to(device) for name, t in call.inputs.items()})


def _why(error: BaseException) -> str:
    """Why a pass was not computed: what failed here, or a rank that is waited for in vain."""
    is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    lost = f"another rank is gone, or did not answer for {PATIENCE.seconds // 60} minutes"
    return lost if is_lost else f"a forward pass failed ({told(error)})"


# ------------------------------------------------------------------ joining
def joined(device: torch.device | str) -> Group | None:
    """The group of an initialised process group of several ranks, or None where there is none."""
    return Group(local_device(device)) if is_joined() else None


@contextmanager
def _unmoved() -> Iterator[None]:
    """A launcher hands signals to all ranks. Rank 0 obeys them, and says when the others end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in MOVED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


MOVED = (signal.SIGINT, signal.SIGTERM)
