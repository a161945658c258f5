"""What a configuration should cost, from first principles: time = max(bytes / bandwidth, issued
instructions, tensor flops) + launches.

    memory  = (codes, scales, x, y, partials) / (bandwidth * min(1, bytes in flight / (bandwidth *
            latency)))
    issue   = weights * instructions per weight * token tiles / (lanes * clock), on the busiest
            multiprocessor
    tensor  = 2 * padded tokens * n * k / sustained rate, on the busiest multiprocessor

The model ranks candidates before anything is timed and fills the shipped tables; it never replaces
a measurement. Its constants are data sheets, published benchmarks (the tests hold its rankings
against them) and instruction counts read off compiled kernels.
"""

import math
from dataclasses import dataclass

from qlab_kernels.capability import KernelError, target
from qlab_kernels.config import Config, Problem, candidates, registers, shared_bytes
from qlab_kernels.families import int4
from qlab_kernels.families.int4 import true_bytes, weight_bytes
from qlab_kernels.layout import round_up

# seconds from a request to DRAM until its bytes arrive (Little's law: what must be in flight)
LATENCY = 0.7e-6
LAUNCH = 3e-6  # seconds: launch, ramp up and drain of one kernel from a cold start
# seconds: launch of the sum of partials or of the matmul behind a dequantization, back to back
REDUCE = 2e-6
SUSTAINED = 0.9  # of the data sheet's bandwidth that a copy reaches
LIBRARY_RATE = 0.86  # of Device.tflops, what the library's matmul reaches at many tokens
FUSED_RATE = {"wgmma": 0.6, "mma2": 0.7}  # the same for a matmul that dequantizes on the way
# of that where every wgmma waits for the one before, since their accumulator's inputs are scaled in
# between
SERIALIZED = 0.6
ISSUE_RATE = 0.75  # of the issue slots that a kernel fills
# Instructions per cycle of a warp by itself; cycles of barriers and first loads of a k tile.
ALONE, STEP = (0.6, 150)
# The maximum over the three bounds is this sharp: they overlap, but not perfectly where they are
# close.
SHARPNESS = 4


@dataclass(frozen=True)
class Device:
    """Figures of a GPU. bandwidth: GB/s of the data sheet; tflops: dense 16-bit, fp32 accumulation;
    lanes: threads issued per multiprocessor and clock; ghz: the boost clock; library: what the
    library's matmul reaches of a copy's bandwidth."""

    name: str
    sms: int
    ghz: float
    bandwidth: float
    tflops: float
    lanes: int = 128
    library: float = 0.95

    def issue_budget(self, bits: float = 4.125) -> float:
        """Instructions per weight that can be issued while the weight's `bits` arrive at the data
        sheet's bandwidth."""
        return self.sms * self.lanes * self.ghz / (self.bandwidth * 8 / bits)


# The first device of a capability stands for it. A device is found by a word of its name.
DEVICES: dict[tuple[int, int], tuple[Device, ...]] = {
    (7, 0): (Device("v100", 80, 1.53, 900, 112, 64, 0.8),),
    (7, 2): (Device("xavier", 8, 1.377, 137, 11, 64),),
    (7, 5): (Device("t4", 40, 1.59, 320, 65, 64),),
    (8, 0): (Device("a100", 108, 1.41, 2039, 312, library=0.8),),
    (8, 6): (
        Device("a10", 72, 1.695, 600, 125),
        Device("a6000", 84, 1.8, 768, 155),
        Device("3090", 82, 1.695, 936, 71),
    ),
    (8, 7): (Device("orin", 16, 1.3, 204.8, 42),),
    (8, 9): (
        Device("4090", 128, 2.52, 1008, 165),
        Device("l40s", 142, 2.52, 864, 362),
        Device("l4", 58, 2.04, 300, 121),
    ),
    (9, 0): (
        Device("h200", 132, 1.98, 4800, 790, library=0.7),
        Device("h100", 132, 1.76, 3350, 790, library=0.8),
    ),
    (10, 0): (Device("b200", 148, 1.965, 8000, 1800, library=0.7),),
    (12, 0): (Device("5090", 170, 2.41, 1792, 209),),
}

# Thread-instructions per weight in the loop of the compiled kernel (`static.compile_variant`),
# {(layout, bm, bn): count}, with the scale on the accumulator up to bm=32 and on the weight above.
INSTRUCTIONS = {
    ("wgmma", 16, 64): 3.2,
    ("wgmma", 16, 128): 2.5,
    ("wgmma", 32, 64): 3.5,
    ("wgmma", 32, 128): 2.7,
    ("wgmma", 64, 128): 3.9,
    ("wgmma", 64, 256): 3.7,
    ("wgmma", 128, 128): 5.1,
    ("wgmma", 128, 256): 4.0,
    ("wgmma", 256, 128): 5.9,
    ("mma2", 16, 64): 3.3,
    ("mma2", 16, 128): 3.0,
    ("mma2", 32, 64): 6.0,
    ("mma2", 32, 128): 3.9,
    ("mma2", 64, 128): 8.3,
    ("mma2", 64, 256): 8.2,
    ("mma2", 128, 128): 13.6,
}
ON_WEIGHT = 0.4  # more of them when a small tile scales the weight
FMA_INSTRUCTIONS = 4.7  # per weight for shifts and conversion; each token adds one multiply-add


def device(p: Problem) -> Device:
    """The figures of the GPU that `p` names, else those of the device that stands for its
    capability."""
    if isinstance(p.cc, str) or p.cc not in DEVICES:
        raise KernelError(f"the cost model describes GPUs, not {p.cc!r}: time the candidates there")
    words = p.device.lower().replace("-", " ").split()
    return next((d for d in DEVICES[p.cc] if d.name in words), DEVICES[p.cc][0])


def dense_bytes(p: Problem) -> float:
    """Bytes that a 16-bit matmul of the same shape must move."""
    return 2.0 * (p.reached * p.n * p.k + p.m * (p.k + p.n))


def floor(p: Problem, moved: float, bandwidth: float, tflops: float) -> float:
    """Microseconds that no kernel beats: `moved` bytes at `bandwidth` GB/s or 2 m n k operations at
    `tflops`, the larger."""
    return max(moved / bandwidth * 1e-3, 2.0 * p.m * p.n * p.k / tflops * 1e-6)


def library(p: Problem) -> float:
    """Microseconds of the library's 16-bit matmul of the same shape."""
    d = device(p)
    memory = dense_bytes(p) / (d.bandwidth * 1e9 * SUSTAINED * d.library)
    tensor = 2.0 * p.m * p.n * p.k / (d.tflops * 1e12 * LIBRARY_RATE)
    return 1e6 * (LAUNCH + max(memory, tensor))


def microseconds(p: Problem, c: Config) -> float:
    """The modelled time of `c` on `p`."""
    d = device(p)
    if c.kind == "dequant":
        written = weight_bytes(p) + 2.0 * p.n * p.k
        return library(p) + 1e6 * (REDUCE + written / (d.bandwidth * 1e9 * SUSTAINED))
    if c.kind == "fma":
        return 1e6 * (LAUNCH + _fma(p, c, d))
    return 1e6 * (LAUNCH + _fused(p, c, d))


def _fused(p: Problem, c: Config, d: Device) -> float:
    """Seconds of the tensor-core kernel, the sum of its partials included."""
    layout = target(p.cc).layout  # type: ignore[arg-type]
    token_tiles = p.reached * max(math.ceil(p.rows / c.bm), 1)  # of each expert alike
    programs = token_tiles * (round_up(p.n, 64) // c.bn) * c.split
    weights = p.n * p.k * token_tiles
    # The multiprocessor with most programs, over the mean.
    busiest = -(-programs // d.sms) * d.sms / programs
    issue = (
        weights * _instructions(layout, c) * busiest / (d.sms * d.lanes * d.ghz * 1e9 * ISSUE_RATE)
    )
    rate = FUSED_RATE[layout] * (
        SERIALIZED if layout == "wgmma" and c.scale_on == "weight" else 1.0
    )
    tensor = 2.0 * weights * c.bm * busiest / (d.tflops * 1e12 * rate)
    partials = 2 * 4.0 * c.split * p.m * p.n if c.split > 1 else 0.0
    # x is read again, mostly from L2.
    reused = true_bytes(p) + partials + 2.0 * p.m * p.k * (p.n // c.bn - 1) * 0.1
    memory = reused / _bandwidth(
        d, programs, _resident(p, c), (c.stages - 1 or 0.5) * c.bn * c.bk / 2
    )
    return _soft_max(memory, issue, tensor, _chain(p, c, d, layout, programs)) + (
        REDUCE if c.split > 1 else 0.0
    )


def _chain(p: Problem, c: Config, d: Device, layout: str, programs: float) -> float:
    """Seconds of the k tiles that one program takes one after the other: what a multiprocessor with
    few warps cannot hide."""
    waves = math.ceil(programs / (_resident(p, c) * d.sms))
    issued = _instructions(layout, c) * c.bn * c.bk / (32 * c.warps) / ALONE
    return (
        waves * math.ceil(p.k / c.bk / c.split) * (issued + c.bn * c.bk / 64 + STEP) / (d.ghz * 1e9)
    )


def _fma(p: Problem, c: Config, d: Device) -> float:
    programs = round_up(p.n, 64) // c.bn
    busiest = -(-programs // d.sms) * d.sms / programs
    issue = (
        p.n
        * p.k
        * (FMA_INSTRUCTIONS + c.bm)
        * busiest
        / (d.sms * d.lanes * d.ghz * 1e9 * ISSUE_RATE)
    )
    return _soft_max(true_bytes(p) / _bandwidth(d, programs, 8, c.bn * c.bk / 2), issue)


def _instructions(layout: str, c: Config) -> float:
    """Thread-instructions per weight of the compiled tile that is nearest in size."""
    near = min(
        (key for key in INSTRUCTIONS if key[0] == layout),
        key=lambda key: abs(math.log2(key[1] / c.bm)) + abs(math.log2(key[2] / c.bn)),
    )
    if c.bm > 32:
        return INSTRUCTIONS[near] - (0.0 if c.scale_on == "weight" else ON_WEIGHT)
    return INSTRUCTIONS[near] + (ON_WEIGHT if c.scale_on == "weight" else 0.0)


def _resident(p: Problem, c: Config) -> int:
    """Thread blocks that share a multiprocessor, by shared memory and registers."""
    by_memory = target(p.cc).smem // max(shared_bytes(p, c), 1)  # type: ignore[arg-type]
    by_registers = 65536 // (32 * c.warps * min(255, 48 + registers(c)))
    return max(1, min(by_memory, by_registers, 16))


def _bandwidth(d: Device, programs: float, resident: int, in_flight: float) -> float:
    """Bytes per second that `programs` reach which keep `in_flight` bytes of weights requested,
    `resident` per multiprocessor."""
    most = d.bandwidth * 1e9 * SUSTAINED
    return most * min(1.0, min(programs, resident * d.sms) * in_flight / (most * LATENCY))


def _soft_max(*seconds: float) -> float:
    return sum(s**SHARPNESS for s in seconds) ** (1 / SHARPNESS)


def rank(p: Problem, configs: list[Config] | None = None) -> list[tuple[float, Config]]:
    """(modelled microseconds, config), fastest first; among equals the order of `configs` (default:
    all candidates) decides."""
    return sorted(
        ((microseconds(p, c), c) for c in (candidates(p) if configs is None else configs)),
        key=lambda pair: pair[0],
    )


def prune(p: Problem, keep: int = 16) -> list[Config]:
    """The `keep` most promising candidates, fastest first, with at least the best of every kind: a
    model that is wrong about a regime must not hide it from the clock. On a CPU, which the model
    does not describe, all of them; of another family than int4, in the order of its menu."""
    if isinstance(p.cc, str):
        return candidates(p)
    described = p.op in int4.FAMILY.operators
    ranked = [c for _, c in rank(p)] if described else candidates(p)
    best = list({c.kind: c for c in reversed(ranked)}.values())
    others = [c for c in ranked if c not in best]
    return sorted(best + others[: max(keep - len(best), 0)], key=ranked.index)
