"""8-bit floats beside 8-bit floats: the configurations of fp8_fp8_mm and fp8_fp8_grouped_mm. A
group of 128 stands for blocks of 128 x 128 beside 128 channels of a token."""

from qlab_kernels.capability import KernelError, target
from qlab_kernels.families import octets
from qlab_kernels.problem import Config, Family, Problem

BLOCK = 128
FIRST = (8, 9)  # whose tensor cores multiply 8-bit floats
OF_BLOCKS = (9, 0)  # the one capability for which the library has scales of blocks


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    if isinstance(p.cc, str):
        return f"{p.op} runs on GPUs, not on {p.cc}"
    try:
        target(p.cc)
    except KernelError as refusal:
        return str(refusal)
    if p.cc < FIRST:
        return (
            f"capability {octets.capability_name(p.cc)} multiplies no 8-bit floats; "
            f"{octets.capability_name(FIRST)} is the first"
        )
    blocks = p.group < p.k
    if blocks and p.group != BLOCK:
        return f"scales are those of rows or of blocks of {BLOCK}, not of groups of {p.group}"
    if c.kind == "library":
        return _legal_library(p, blocks)
    if c.kind not in ("gemm", "split_k"):
        return f"fp8 x fp8 has the kinds gemm, split_k and library, not {c.kind}"
    if c.kind == "split_k" and p.grouped:
        return "k is split only of one weight"
    if blocks and (BLOCK % c.bn or BLOCK % c.bk):
        return f"tiles of {c.bn}x{c.bk} straddle blocks of {BLOCK}: take bn and bk up to {BLOCK}"
    # The sum of a tile stands beside those that it is added to.
    return octets.legal_tile(p, c) or octets.legal_split(p, c)


def _legal_library(p: Problem, blocks: bool) -> str | None:
    assert not isinstance(p.cc, str)
    if p.grouped:
        return "the library multiplies expert by expert, for which the host waits: take gemm"
    if blocks and p.cc != OF_BLOCKS:
        return (
            f"the library has scales of blocks for capability "
            f"{octets.capability_name(OF_BLOCKS)} alone: take gemm"
        )
    return None


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing for `p`, the most promising first; KernelError when there is
    none."""
    return octets.menu(p, legal)


def heuristic(p: Problem) -> Config:
    """A configuration from the shape alone: the fused kernel, which sums in the same order on every
    device. KernelError when none is legal."""
    return candidates(p)[0]


FAMILY = Family(
    name="fp8_fp8",
    operators=("fp8_fp8_mm", "fp8_fp8_grouped_mm"),
    sources=("rows", "fp8_fp8_kernel", "fp8_fp8"),
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=octets.moved,
)
