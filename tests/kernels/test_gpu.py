"""On a GPU: the assembly first, bit for bit, then every configuration against float64, then CUDA
graphs."""

import cases
import pytest
import torch
from cases import Case

from qlab_kernels import Problem, candidates, heuristic, target
from qlab_kernels.acceptance import FAMILIES, check
from qlab_kernels.acceptance import cases as listed
from qlab_kernels.config import Config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def fused_row():
    row = target(torch.cuda.get_device_capability())
    if row.path != "fused":
        pytest.skip("no tensor-core kernel for this device")
    return row


def row_for(dtype):
    row = target(torch.cuda.get_device_capability())
    if getattr(torch, dtype) not in row.dtypes:
        pytest.skip(f"this device does not multiply {dtype}")
    return row


def accepted():
    """(family, name) of every acceptance case of this device, assembly first."""
    if not torch.cuda.is_available():
        return []
    cc = torch.cuda.get_device_capability()
    return [(family, case.name) for family in FAMILIES for case in listed(family, cc)]


@pytest.mark.parametrize("family, name", accepted())
def test_acceptance(family, name):
    """What `python -m qlab.bench gpu` checks: assembly bit for bit, then every kernel."""
    cc = torch.cuda.get_device_capability()
    assert check(family, name, cc, torch.device("cuda")) <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "group, zeros",
    [(32, False), (64, True), (128, False), (128, True), (256, False), (10_000, True)],
)
def test_dequantize_is_exact(dtype, group, zeros):
    layout = row_for(dtype).layout
    for ends in ((), (1, 2, 2)):
        assert cases.dequantized_exactly(
            Case(2, 200, 600, group, zeros, layout, dtype, ("dequant",), ends, device="cuda")
        )


def problem(m, group, zeros, dtype, n=512, k=1024, op="int4_mm"):
    return Problem(
        op,
        torch.cuda.get_device_capability(),
        torch.cuda.get_device_name(),
        dtype,
        group,
        zeros,
        n,
        k,
        m,
    )


def astuple(c):
    return (c.kind, c.bm, c.bn, c.bk, c.split, c.warps, c.stages, c.scale_on)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "group, zeros",
    [(32, False), (64, True), (128, False), (128, True), (256, False), (10_000, True)],
)
@pytest.mark.parametrize("m", [1, 5, 16, 33, 100, 300])
def test_every_candidate_against_float64(dtype, group, zeros, m):
    layout = row_for(dtype).layout
    for n, k in ((512, 1024), (200, 1000 if group > 1000 else 1280)):
        for c in candidates(problem(m, group, zeros, dtype, n, k)):
            case = Case(m, n, k, group, zeros, layout, dtype, astuple(c), device="cuda")
            assert (excess := cases.error(case)) <= 1, (
                f"{excess:.3g} times what rounding explains: {case}"
            )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_grouped_against_float64(dtype):
    fused_row()
    ends = (0, 3, 50, 50, 51, 200)
    c = heuristic(problem(200, 128, False, dtype, op="int4_grouped_mm"))
    case = Case(
        200, 512, 1024, 128, False, fused_row().layout, dtype, astuple(c), ends, device="cuda"
    )
    assert cases.error(case) <= 1


@pytest.mark.parametrize("kind", ["split_k", "gemm", "fma", "dequant"])
def test_a_cuda_graph_replays_with_new_activations(kind):
    from qlab_kernels.int4_mm import int4_mm

    p = problem(4, 128, False, "float16")
    config: Config | None = next((c for c in candidates(p) if c.kind == kind), None)
    if config is None:
        pytest.skip(f"no {kind} on this device")
    x, packed = cases.operands(
        Case(4, 512, 1024, 128, False, target(p.cc).layout, "float16", (), device="cuda")
    )
    int4_mm(x, packed, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int4_mm(x, packed, config)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, int4_mm(x, packed, config))
