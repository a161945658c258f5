"""The device that is measured: what it is, and the harnesses that time on it.

events  device events around each call, behind a cleared cache
graph   the replay of a CUDA graph of one call for each copy of a weight: no launches
cupti   the durations of the kernels alone, as the profiler has them from CUPTI
"""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qlab.errors import QlabError
from qlab.lowering.tuning.timing import graph_microseconds, microseconds

Call = Callable[[], Any]
Capability = tuple[int, int]
REPS = 50  # of what is timed by events
PROFILED = 20  # calls under the profiler
# what nvidia-smi is asked for, and the names that records have
ASKED = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "most_sm_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A device and its harnesses.

    events: (calls, repetitions, seconds at most) -> median microseconds of a call. graph, cupti:
    (calls, seconds at most) -> microseconds, or None where the harness is not available. empty:
    launches a kernel that does nothing.
    """

    device: torch.device
    name: str
    capability: Capability
    events: Callable[[Sequence[Call], int, float], float]
    graph: Callable[[Sequence[Call], float], float | None]
    cupti: Callable[[Sequence[Call], float], float | None]
    empty: Call


def cuda() -> Bench:
    """The first CUDA device."""
    refuse_without_gpu()
    device = torch.device("cuda", 0)
    return Bench(
        device=device,
        name=torch.cuda.get_device_name(device),
        capability=torch.cuda.get_device_capability(device),
        events=lambda calls, reps, seconds: microseconds(calls, reps, device, seconds),
        graph=lambda calls, seconds: _captured(calls, device, seconds),
        cupti=lambda calls, seconds: profiled_microseconds(calls, device),
        empty=partial(_launch_empty, torch.zeros(1, dtype=torch.int32, device=device)),
    )


def refuse_without_gpu() -> None:
    """Refuse a machine without a CUDA device."""
    if not torch.cuda.is_available():
        raise QlabError(
            "torch finds no CUDA device here, and this bench measures one; `--plan` alone prints "
            "the steps without it"
        )


def _captured(calls: Sequence[Call], device: torch.device, seconds: float) -> float | None:
    """Microseconds inside a CUDA graph, or None where a library cannot be captured."""
    try:
        return graph_microseconds(calls, device, seconds)
    except RuntimeError as error:
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise  # the device is broken, not the capture
        torch.cuda.synchronize(device)
        return None


def profiled_microseconds(calls: Sequence[Call], device: torch.device) -> float | None:
    """Microseconds of a call's kernels by the profiler, without launches and gaps; None where it
    reports no kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    for call in calls[:2]:
        call()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities):
        calls[0]()  # the first profile of a process loads CUPTI
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        for i in range(PROFILED):
            calls[i % len(calls)]()
        torch.cuda.synchronize(device)
    total = sum(row.self_device_time_total for row in profile.key_averages())
    return total / PROFILED if total > 0 else None


def _launch_empty(pointer: torch.Tensor) -> None:
    from qlab_kernels.acceptance.empty import launch

    launch(pointer)


def readings() -> dict[str, str] | None:
    """The driver, clocks, power and temperature as nvidia-smi has them, or None where it cannot be
    asked."""
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = said.stdout.splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(ASKED.values(), values)) if len(values) == len(ASKED) else None
