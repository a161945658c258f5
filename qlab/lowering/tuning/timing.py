"""How long a product takes: medians on a cold cache, on a CPU or a GPU, and the machine's own rates
to compare them with.

A weight that was just read lies in the last cache, and a model's weights do not: every call takes
the next of several copies, which together exceed that cache. On a GPU a buffer larger than the
cache is cleared before each call as well, and the clock is the device's.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qlab.lowering.devices import file_text

Call = Callable[[], Any]
COPIES = 4  # of a weight, at least
MOST_COPIES = 64
LEAST_CACHE = 32 * 2**20  # bytes; where the machine does not say how large its last cache is
# Bytes read before each call on a GPU: what was written would be evicted while the call is timed.
FLUSH = 512 * 2**20
BATCH = 10  # timed calls that are launched before the host waits for them
# cycles that a GPU waits at the beginning of a batch, so that launching never falls behind
AHEAD = 4_000_000


def last_cache(device: torch.device) -> int:
    """Bytes of the last level of cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        file_text(str(path)).strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 2**10, "M": 2**20}
    return max(
        [LEAST_CACHE, *(int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units)]
    )


def copies(weight_bytes: float, device: torch.device) -> int:
    """How many copies of a weight make every call read it from memory."""
    return min(max(COPIES, math.ceil(2 * last_cache(device) / max(weight_bytes, 1))), MOST_COPIES)


def microseconds(
    calls: Sequence[Call], reps: int, device: torch.device, seconds: float = math.inf
) -> float:
    """Median microseconds of a call over `reps` of them, from `calls` in turn, or over as many as
    fit in `seconds` (three or more)."""
    for call in calls[:2]:
        call()  # compiles, allocates
    return (
        _cuda(calls, reps, device, seconds) if device.type == "cuda" else _cpu(calls, reps, seconds)
    )


def _cpu(calls: Sequence[Call], reps: int, seconds: float) -> float:
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < reps and (len(taken) < 3 or time.perf_counter() < until):
        call = calls[len(taken) % len(calls)]
        started = time.perf_counter_ns()
        call()
        taken.append((time.perf_counter_ns() - started) / 1e3)
    return statistics.median(taken)


def _cuda(calls: Sequence[Call], reps: int, device: torch.device, seconds: float) -> float:
    """Events around each call, behind a wait: the host takes longer to launch a small kernel than
    the device to run it."""
    flush = torch.zeros(FLUSH // 4, dtype=torch.float32, device=device)
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < reps and (len(taken) < 3 or time.perf_counter() < until):
        batch = min(BATCH if taken else 3, reps)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(batch)
        ]
        torch.cuda._sleep(AHEAD)
        for i, (start, end) in enumerate(events):
            flush.sum()
            start.record()
            calls[(len(taken) + i) % len(calls)]()
            end.record()
        torch.cuda.synchronize(device)
        taken += [1e3 * start.elapsed_time(end) for start, end in events]
    return statistics.median(taken)


def graph_microseconds(
    calls: Sequence[Call], device: torch.device, seconds: float, replays: int = 20
) -> float | None:
    """Microseconds of a call inside a CUDA graph of all of `calls`, one after the other: no launch
    cost. None on a CPU."""
    if device.type != "cuda":
        return None
    # A function must have run on another stream than the default one before it is captured.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    taken = microseconds([graph.replay], replays, device, seconds) / len(calls)
    del kept
    return taken


def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy, bytes read and bytes written together: what stands in for the memory's
    bandwidth."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2e-3 * size / microseconds([lambda: target.copy_(source)], 20, device, 2.0)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square product in `dtype` by the library."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2e-6 * size**3 / microseconds([lambda: a @ b], 20, device, 2.0)
