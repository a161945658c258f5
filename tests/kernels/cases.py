"""One product, computed by a kernel and by float64: how far they are apart, in units of what
rounding explains.

Kernels run in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is
imported, and the other tests compile kernels. That process imports qlab_kernels from `path`, where
a test may have planted a fault.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch

CAPABILITY = {"wgmma": (9, 0), "mma2": (8, 0), "rows": (7, 5)}
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative rounding error


@dataclass(frozen=True)
class Case:
    """A product; `config` holds the arguments of Config. ends: of the experts' tokens, for the
    grouped product."""

    m: int
    n: int
    k: int
    group: int
    zeros: bool
    layout: str
    dtype: str
    config: tuple
    ends: tuple[int, ...] = ()
    seed: int = 0
    device: str = "cpu"


def interpreter(path=None):
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret, initargs=(path,))


def _interpret(path):
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    if path:
        sys.path.insert(0, path)


def illegal(case):
    from qlab_kernels.config import Config, Problem, legal

    op = "int4_grouped_mm" if case.ends else "int4_mm"
    problem = Problem(
        op, CAPABILITY[case.layout], "", case.dtype, case.group, case.zeros, case.n, case.k, case.m
    )
    return legal(problem, Config(*case.config))


def operands(case):
    """x [m, k] in the case's dtype and packed weights, with a leading dimension for experts."""
    from qlab_kernels.layout import pack

    rng = torch.Generator().manual_seed(case.seed)
    lead = (len(case.ends),) if case.ends else ()
    dtype = getattr(torch, case.dtype)
    codes = torch.randint(-8, 8, (*lead, case.n, case.k), generator=rng, dtype=torch.int8)
    scales = torch.rand(*lead, case.n, -(-case.k // case.group), generator=rng) * 0.1 + 0.01
    zeros = torch.randint(-8, 8, scales.shape, generator=rng) if case.zeros else None
    x = torch.randn(case.m, case.k, generator=rng).to(dtype)
    moved = [None if t is None else t.to(case.device) for t in (x, codes, scales, zeros)]
    return moved[0], pack(*moved[1:], case.group, case.layout, dtype)


def error(case):
    """max |y - y64| over what is allowed: rounding y, fp32 sums, and 16-bit weights if the config
    scales those."""
    from qlab_kernels import reference
    from qlab_kernels.config import Config
    from qlab_kernels.grouped import int4_grouped_mm
    from qlab_kernels.int4_mm import int4_mm

    x, packed = operands(case)
    config = Config(*case.config)
    W = reference.dequantize(packed, torch.float64)
    if case.ends:
        ends = torch.tensor(case.ends, dtype=torch.int32, device=case.device)
        y = int4_grouped_mm(x, packed, ends, config)
        expected = reference.int4_grouped_mm(x, packed, ends)
        magnitude = x.double().abs() @ W.abs().amax(0).T
    else:
        y = int4_mm(x, packed, config)
        expected = reference.int4_mm(x, packed)
        magnitude = x.double().abs() @ W.abs().T
    assert y.dtype == x.dtype and y.shape == expected.shape
    unit = UNIT[case.dtype]
    rounded_weights = config.kind == "dequant" or config.scale_on == "weight" or case.group < 64
    allowed = 1.01 * unit * expected.abs() + (unit if rounded_weights else 3e-6) * magnitude + 1e-7
    return float(((y.double() - expected).abs() / allowed).max()) if y.numel() else 0.0


def dequantized_exactly(case):
    """Whether the kernel and the reference agree bit for bit in every output dtype."""
    from qlab_kernels import reference
    from qlab_kernels.dequantize import dequantize

    _, packed = operands(case)
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    return all(torch.equal(dequantize(packed, d), reference.dequantize(packed, d)) for d in dtypes)
