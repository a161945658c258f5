"""What is multiplied (`Problem`), how (`Config`), and what a family of kernels says of both; pure
Python, no device is asked.

Names: y[m, n] = x[m, k] @ W[n, k].T; a program computes a tile of bm tokens x bn rows of W in steps
of bk along k.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qlab_kernels.capability import Capability

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
GROUPED_BUCKETS = (*BUCKETS, 8192, 16384, 32768, 65536)  # of the rows of all experts

Kind = Literal["split_k", "gemm", "dequant", "fma", "library", "int4pack", "dense"]


@dataclass(frozen=True)
class Problem:
    """One product to configure. n, k are the true sizes; group >= k means one scale per row. device
    is a name, for the cache.

    op: an operator of a family (`config.OPERATORS`). cc of one for CPUs is "cpu-<isa>". A grouped
    product ("int4_grouped_mm") multiplies by one of `experts` weights [n, k] each, and its m counts
    the rows of all of them: a token is one row for each of its experts.
    """

    op: str
    cc: Capability | str
    device: str
    dtype: str
    group: int
    zeros: bool
    n: int
    k: int
    m: int
    experts: int = 1

    @property
    def grouped(self) -> bool:
        """Whether rows are multiplied by the weights of their experts."""
        return self.op.endswith("_grouped_mm")

    @property
    def bucket(self) -> int:
        """m rounded up to the sizes that are tuned; larger m counts as the largest."""
        sizes = GROUPED_BUCKETS if self.grouped else BUCKETS
        return next((b for b in sizes if b >= self.m), sizes[-1])

    @property
    def reached(self) -> float:
        """How many weights are read."""
        return reached(self.m, self.experts)

    @property
    def rows(self) -> float:
        """How many rows of x a weight that is read multiplies, on average."""
        return rows_each(self.m, self.experts)


def reached(m: int, experts: int) -> float:
    """How many of e experts m rows reach where each is as likely: e (1 - (1 - 1/e)^m)."""
    return experts * (1 - (1 - 1 / experts) ** max(m, 1))


def rows_each(m: int, experts: int) -> float:
    """Rows of an expert that has any."""
    return m / reached(m, experts)


@dataclass(frozen=True)
class Config:
    """How one product is computed.

    kind: "split_k" writes `split` fp32 partial products that torch sums; "gemm" is the same kernel
    without the split; "fma" multiplies on the CUDA cores; "dequant" dequantizes and calls the
    library; "library" multiplies the codes by the library. On a CPU: "int4pack" and "dense".
    scale_on: what the group's scale multiplies, the fp32 "accumulator" after each k tile or the
    16-bit "weight".
    """

    kind: Kind
    bm: int = 0
    bn: int = 0
    bk: int = 0
    split: int = 1
    warps: int = 4
    stages: int = 1
    scale_on: Literal["accumulator", "weight"] = "accumulator"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Kernels that share operators, configurations and sources.

    legal: None when a configuration computes a problem correctly and fits the device, else the
    sentence that says why not. candidates: the configurations worth timing, all legal, the most
    promising first; KernelError when there is none. heuristic: the one that runs when nothing was
    timed. moved: bytes that any kernel of the family must move.
    sources: the files of this package, without their suffix, whose syntax a revision hashes.
    layouts: a name of the byte orders that they read, to change with these.
    """

    name: str
    operators: tuple[str, ...]
    sources: tuple[str, ...]
    legal: Callable[[Problem, Config], str | None]
    candidates: Callable[[Problem], list[Config]]
    heuristic: Callable[[Problem], Config]
    moved: Callable[[Problem], float]
    layouts: str = ""
