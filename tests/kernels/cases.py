"""One product, computed by a kernel and by float64: how far they are apart, in units of what
rounding explains.

Kernels run in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is
imported, and the other tests compile kernels. Sources in which a test planted a fault run in a fork
of another such process, which has imported Triton and nothing of qlab_kernels.
"""

import importlib.util
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch

CAPABILITY = {"wgmma": (9, 0), "mma2": (8, 0), "rows": (7, 5)}


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


def interpreter():
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=_interpret)


def _interpret():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    importlib.import_module("triton")


def compilers(cores, cache_directory):
    return ProcessPoolExecutor(cores, get_context("spawn"), _compile, (cache_directory,))


def _compile(cache_directory):
    os.environ["TRITON_CACHE_DIR"] = cache_directory
    os.environ.pop("TRITON_INTERPRET", None)


def planted_in(path, call):
    """What a pickled call gives by the sources in `path`, which a fork of this process imports."""
    assert "qlab_kernels" not in sys.modules
    fork = get_context("fork")
    with ProcessPoolExecutor(1, fork, sys.path.insert, (0, path)) as faulty:
        return faulty.submit(_called, call).result()


def _called(call):
    function, *arguments = pickle.loads(call)
    return function(*arguments)


def illegal(case):
    from qlab_kernels.config import Config, Problem, legal

    op = "int4_grouped_mm" if case.ends else "int4_mm"
    problem = Problem(
        op, CAPABILITY[case.layout], "", case.dtype, case.group, case.zeros, case.n, case.k, case.m
    )
    return legal(problem, Config(*case.config))


def product(case):
    """The case as the acceptance cases of the package have it: imported here, so that Triton is not
    before it is told to interpret."""
    from qlab_kernels.acceptance.int4 import Product

    fields = {name: value for name, value in vars(case).items() if name != "device"}
    return Product(**fields), torch.device(case.device)


def operands(case):
    """x [m, k] in the case's dtype and packed weights, with a leading dimension for experts."""
    from qlab_kernels.acceptance import int4

    return int4.operands(*product(case))


def error(case):
    """max |y - y64| over what is allowed: rounding y, fp32 sums, and 16-bit weights if the config
    scales those."""
    from qlab_kernels.acceptance import int4

    return int4.excess(*product(case))


def dequantized_exactly(case):
    """Whether the kernel and the reference agree bit for bit in every output dtype."""
    from qlab_kernels.acceptance import int4

    return int4.dequantized(*product(case)) == 0


def accepted(family, name, cc, device="cpu"):
    """The excess of one acceptance case."""
    from qlab_kernels.acceptance import check

    return check(family, name, cc, torch.device(device))


def a8_excess(fields):
    """The excess of a product of int4 weights and activations of 8 bits."""
    from qlab_kernels.acceptance.int4_a8 import Product, excess

    return excess(Product(**fields), torch.device("cpu"))


def a8_largest():
    """Whether int8 sums at the end of their range are exact, in the widest k tile."""
    from qlab_kernels.device8 import prepared
    from qlab_kernels.int4_a8 import int4_a8_mm
    from qlab_kernels.layout8 import pack8
    from qlab_kernels.problem import Config

    q = torch.full((64, 512), -8, dtype=torch.int8)
    q[1] = 7
    packed = pack8(q, torch.ones(64, 2), None, 256, "mma8-int8", torch.float32)
    p = torch.tensor([-128, 127], dtype=torch.int8)[:, None].repeat(1, 512)
    t = torch.ones(1, 1, dtype=torch.float32)
    x = prepared(p, t, packed)
    y = int4_a8_mm(x, packed, None, torch.float32, Config("gemm", 16, 64, 256))
    return torch.equal(y.double(), p.double() @ q.double().mT)


@contextmanager
def planted(module, source, *names):
    """The kernels of these names in a module of launches are those of the source file."""
    spec = importlib.util.spec_from_file_location(f"planted_{id(source)}", source)
    other = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = other
    spec.loader.exec_module(other)
    own = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, getattr(other, name))
        yield
    finally:
        for name, kernel in own.items():
            setattr(module, name, kernel)


def timed(form, cc):
    """A product that would be timed, by the heuristic's configuration, on a CPU."""
    from qlab_kernels.acceptance import timed
    from qlab_kernels.config import Problem, heuristic

    p = Problem(form.op, cc, "", form.dtype, form.group, form.zeros, 128, 256, 3)
    return timed(p, torch.device("cpu"), 0)(heuristic(p))
