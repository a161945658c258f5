"""int8 weights and int8 activations: the configurations of int8_int8_mm and
int8_int8_grouped_mm."""

from qlab_kernels.capability import KernelError, target
from qlab_kernels.families import octets
from qlab_kernels.problem import Config, Family, Problem


def fused(cc: tuple[int, int]) -> bool:
    """Whether Triton multiplies bytes on the tensor cores of the capability."""
    return target(cc).path == "fused"


def legal(p: Problem, c: Config) -> str | None:
    """None when `c` computes `p` correctly and fits the device, else the sentence that says why
    not."""
    if isinstance(p.cc, str):
        return f"{p.op} runs on GPUs, not on {p.cc}"
    try:
        on_tensor_cores = fused(p.cc)
    except KernelError as refusal:
        return str(refusal)
    if c.kind == "library":
        return _legal_library(p)
    if c.kind not in ("gemm", "split_k"):
        return f"int8 x int8 has the kinds gemm, split_k and library, not {c.kind}"
    if not on_tensor_cores:
        return (
            f"Triton compiles no int8 tensor-core product for capability "
            f"{octets.capability_name(p.cc)}: only the library multiplies there"
        )
    if c.kind == "split_k" and (p.grouped or p.group < p.k):
        return "k is split only of whole rows of one weight"
    # Of several groups, the sums of one stand beside those that are scaled.
    copies = 2 if p.group < p.k else 1
    return octets.legal_tile(p, c, copies) or octets.legal_split(p, c)


def _legal_library(p: Problem) -> str | None:
    assert not isinstance(p.cc, str)
    if p.cc < (7, 5):
        return (
            f"capability {octets.capability_name(p.cc)} multiplies no int8 codes; 7.5 is the first"
        )
    if p.grouped and fused(p.cc):
        return "the library multiplies expert by expert, for which the host waits: take gemm"
    return None


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing for `p`, the most promising first; KernelError when there is
    none."""
    return octets.menu(p, legal)


def heuristic(p: Problem) -> Config:
    """A configuration from the shape alone: the fused kernel where there is one, since the library
    leaves scales and zero points to passes of their own. KernelError when none is legal."""
    return candidates(p)[0]


FAMILY = Family(
    name="int8_int8",
    operators=("int8_int8_mm", "int8_int8_grouped_mm"),
    sources=("rows", "int8_int8_kernel", "int8_int8"),
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=octets.moved,
)
