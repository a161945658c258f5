"""8-bit codes beside 8-bit codes on a GPU: the choice of a kernel and the plumbing, with Triton
interpreted."""

import pytest
import torch
from row_cases import BLOCKS, multiplies_floats

from qlab.errors import QlabError
from qlab.lowering.tuning.shapes import Form
from qlab.lowering.tuning.tune import tune_shapes
from qlab.lowering.weights import fp8_fp8, octets_cuda
from qlab.lowering.weights.integers import is_exact

INTERPRETED = """
from types import SimpleNamespace
import torch
from lowering_cases import activations
from row_cases import Case
from qlab.algebra.experts import rows_of
from qlab.lowering.weights import int8_int8, octets_cuda
from qlab.lowering.weights.integers import product, rounded
from qlab_kernels import cache
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
octets_cuda.fused = lambda device, first=(8, 0): True
kinds = set()
lookup = cache.lookup
cache.lookup = lambda problem: (found := lookup(problem), kinds.add((problem.op, found.config.kind)))[0]
cases = [
    Case("int8_int8", "int8-channel-asym", inputs="int8-channel-asym"),
    Case("int8_int8", "int7-tensor", inputs="int8-tensor", static=0.03),
    Case("int8_int8", "int5-b2x48-asym", inputs="int6-tensor-asym"),
]
for case in cases:
    for dtype in (torch.bfloat16,):
        leaf, several = case.leaf(), case.experts(3)
        weight = int8_int8.pack("site", leaf, case.setting(dtype))
        experts = int8_int8.pack("site", several, case.setting(dtype))
        for m in (1, 17):
            x, bias = activations(m, case.k, dtype), activations(1, case.o, dtype)[0]
            words, scales, zeros, sums, perm, in_scales, in_zeros, spec = weight[:8]
            codes = rounded(x, perm, in_scales, in_zeros, spec)
            y = octets_cuda.int8_mm(codes, (words, scales, zeros, sums), bias, dtype)
            right = product(codes, words, scales, zeros, sums)
            assert torch.equal(y, (right + bias.float()).to(dtype)), (case, m)
        ends = torch.tensor([2, 2, 17])
        y = int8_int8.int8_int8_experts_mm(x, *experts[:7], ends, experts.spec)
        assert torch.equal(y, int8_int8.int8_int8_grouped_mm(x, *experts[:7], ends, experts.spec)), case
        assert int8_int8.int8_int8_experts_mm(x[:0], *experts[:7], 0 * ends, experts.spec).shape == (0, case.few)
assert kinds == {("int8_int8_mm", "gemm"), ("int8_int8_grouped_mm", "gemm")}, kinds

# Tokens are rounded by one kernel, to the bits of the path of CPUs.
torch.manual_seed(0)
for bits, asym, rows, m, k in ((8, "", "channel", 5, 1500), (5, "-asym", "channel", 3, 100), (8, "-asym", "channel", 1, 1), (8, "", "tensor", 4, 90), (6, "-asym", "tensor", 4, 2100)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = ((torch.randn(m, k) + torch.rand(m, 1)) * torch.rand(m, 1) * 50).to(dtype)
        x[m // 2] = 0
        x[0] = x[0].abs()
        fixed = rows == "tensor"
        s_x = torch.tensor([[0.03]]) if fixed else None
        z_x = torch.tensor([[3]], dtype=torch.int8) if fixed and asym else None
        spec, perm = f"int{bits}-{rows}{asym}", torch.randperm(k)
        for a, b in zip(octets_cuda.rounded(x, perm, s_x, z_x, spec), rounded(x, perm, s_x, z_x, spec)):
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), (spec, dtype)

# The library's product is a configuration, with the same bits; it is taken where Triton has none.
import os
os.environ[cache.OVERRIDE] = '{"op": "int8_int8_mm", "kind": "library"}'
cache.refresh()
assert torch.equal(octets_cuda.int8_mm(codes, (words, scales, zeros, sums), bias, dtype), (right + bias.float()).to(dtype))
assert ("int8_int8_mm", "library") in kinds
"""  # noqa: E501

FLOATS = """
import torch
from lowering_cases import activations
from row_cases import Case, FLOATS
from tolerances import PRODUCT, UNIT
from qlab.algebra.qtensor import dense
from qlab.lowering.weights import fp8_fp8, octets_cuda
from qlab.lowering.weights.integers import rounded
from qlab_kernels import cache
torch.cuda.get_device_capability = lambda device=None: (12, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA GeForce RTX 5090"
octets_cuda.fused = lambda device, first=(8, 0): True
groups = set()
lookup = cache.lookup
cache.lookup = lambda problem: (found := lookup(problem), groups.add((problem.op, problem.group, found.config.kind == "library")))[0]
cases = [
    Case(spec="fp8-channel", inputs="fp8-channel", **FLOATS),
    Case(spec="fp8-tensor", inputs="fp8-tensor", static=0.01, **FLOATS),
    Case(spec="fp8-b128x128", inputs="fp8-g128", o=256, k=256, few=128, **FLOATS),
]
for case in cases:
    for dtype in (torch.bfloat16,):
        weight = fp8_fp8.pack("site", case.leaf(), case.setting(dtype))
        experts = fp8_fp8.pack("site", case.experts(3), case.setting(dtype))
        for m in (1, 17):
            x, bias = activations(m, case.k, dtype), activations(1, case.o, dtype)[0]
            codes = rounded(x, None, weight.in_scales, None, weight.spec)
            y = octets_cuda.fp8_mm(codes, (weight.words, weight.scales, case.o), bias, dtype)
            right = fp8_fp8.product(codes, weight.words, weight.scales)[:, :case.o] + bias.float()
            assert y.shape == right.shape and y.dtype == dtype
            torch.testing.assert_close(y.float(), right, rtol=2 * UNIT[dtype], atol=1e-5 * right.abs().max().item())
        ends = torch.tensor([2, 2, 17])
        y = fp8_fp8.fp8_fp8_experts_mm(x, *experts[:3], ends, case.few, experts.spec)
        right = fp8_fp8.fp8_fp8_grouped_mm(x, *experts[:3], ends, case.few, experts.spec).float()
        torch.testing.assert_close(y.float(), right, rtol=4 * UNIT[dtype], atol=1e-5 * right.abs().max().item())
        assert fp8_fp8.fp8_fp8_experts_mm(x[:0], *experts[:3], 0 * ends, case.few, experts.spec).shape == (0, case.few)
# Tokens are rounded by one kernel, to the bits of the path of CPUs: every binade, subnormals too.
torch.manual_seed(0)
for spec, m, k in (("fp8-channel", 5, 1500), ("fp8-channel", 1, 1), ("fp8-g128", 4, 512), ("fp8-tensor", 3, 300)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = (torch.randn(m, k) * torch.exp(3 * torch.randn(m, k))).to(dtype)
        x[m // 2], x[0, ::3] = 0, x[0, ::3] * 1e-6
        s_x = torch.tensor([[0.03]]) if spec == "fp8-tensor" else None
        a, b = octets_cuda.rounded(x, None, s_x, None, spec), rounded(x, None, s_x, None, spec)
        assert a.p.dtype == b.p.dtype and torch.equal(a.p.view(torch.uint8), b.p.view(torch.uint8)), (spec, dtype)
        assert torch.equal(a.scales, b.scales) and a.zeros is b.zeros is None
assert groups == {(op, group, False) for op in ("fp8_fp8_mm", "fp8_fp8_grouped_mm") for group in (96, 128)}, groups
"""  # noqa: E501


@pytest.mark.parametrize("script", [INTERPRETED, FLOATS], ids=["integers", "floats"])
def test_the_cache_chooses_and_the_kernels_multiply(script, interpreted):
    """Of integers every configuration gives the same bits, those of the path of CPUs."""
    if script == INTERPRETED and not is_exact():
        pytest.skip("this processor adds int8 products in 16 bits, so that it is no reference")
    if script == FLOATS and not multiplies_floats():
        pytest.skip("torch multiplies no 8-bit floats here, so that it is no reference")
    interpreted(script)


@pytest.mark.parametrize(
    "capability, there",
    [((7, 5), False), ((8, 0), True), ((12, 0), True), ((12, 1), False)],
)
def test_one_kernel_is_there_from_a_capability_on_and_with_triton(capability, there, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert octets_cuda.fused(device) is there
    assert not octets_cuda.fused(torch.device("cpu"))
    monkeypatch.setattr(octets_cuda, "find_spec", lambda name: None)
    assert not octets_cuda.fused(device)


def test_scales_of_blocks_are_taken_from_capability_8_9_on(monkeypatch):
    """Torch's own product has them from 9.0 on."""
    device = torch.device("cuda", 0)

    def reason(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return fp8_fp8.takes(BLOCKS.leaf(), BLOCKS.setting(device=device))

    assert all(reason(capability) is None for capability in ((8, 9), (9, 0), (10, 0), (12, 0)))
    assert "8.9 is the first" in reason((8, 6))
    monkeypatch.setattr(octets_cuda, "find_spec", lambda name: None)
    assert "9.0 is the first" in reason((8, 9))


def test_a_compiler_takes_what_a_device_has_for_a_constant():
    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + 1 if octets_cuda.fused(x.device) else x - 1

    assert chosen(torch.ones(2, dtype=torch.float32)).tolist() == [0, 0]


TUNED = """
import torch
from qlab.lowering.tuning import octet_pairs as octets, tune as tuning
from qlab.lowering.tuning.shapes import Form
from qlab.lowering.weights import octets_cuda
from qlab_kernels import cache
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
octets_cuda.fused = lambda device, first=(8, 0): True
octets.copies, octets.copy_rate = lambda *_: 2, lambda *_: 1e9
answers = []

# The narrowest tile wins; every candidate multiplies the same.
def invented(calls, *_):
    answers.append(calls[0]().float())
    torch.testing.assert_close(answers[-1], answers[0], rtol=1e-2, atol=1e-2)
    config = calls[0].args[0]
    return 1000.0 + config.bm + config.bn + config.split if config.kind != "library" else 3000.0

octets.microseconds = invented
cases = (("int8_int8", 64, 2), ("fp8_fp8", 128, 0))
for kernel, group, experts in cases:
    answers.clear()
    form = Form(group, kernel == "int8_int8", experts)
    [row] = tuning.tune_shapes([(64, 256)], [3, 4], form, kernel=kernel, budget=600.0)
    assert row["timings"] > 2 and row["m"] == 4 and row["op"].startswith(kernel), row
    make = octets.integers_of if kernel == "int8_int8" else octets.floats_of
    weight = make(64, 256, form, torch.device("cpu"), 0)
    codes = octets.rows_of(kernel, 4, 256, form, torch.device("cpu"))
    key_of = octets_cuda.int8_problem if kernel == "int8_int8" else octets_cuda.fp8_problem
    found = cache.lookup(key_of(row["op"], codes, weight, torch.bfloat16))
    assert (found.source, found.stale) == ("user", False), (found, row)
    assert found.config.bm == row["config"]["bm"]
"""


def test_what_is_tuned_is_what_products_look_up(interpreted):
    interpreted(TUNED)


def test_what_is_not_tuned_is_refused_by_name(monkeypatch):
    with pytest.raises(QlabError, match="no kernel 'int9' is tuned; there are int4, int8_int8"):
        tune_shapes([(64, 64)], [1], kernel="int9")
    with pytest.raises(
        QlabError, match=r"on GPUs from capability 8\.9 on, with Triton, not on cpu"
    ):
        tune_shapes([(64, 64)], [1], kernel="fp8_fp8")
    monkeypatch.setattr(octets_cuda, "fused", lambda device, first: True)
    with pytest.raises(QlabError, match="8-bit floats have no zero points; leave --asymmetric"):
        tune_shapes([(64, 256)], [1], Form(128, True), kernel="fp8_fp8")
    with pytest.raises(QlabError, match="scales of 64 channels: give --group 128 for blocks"):
        tune_shapes([(64, 256)], [1], Form(64), kernel="fp8_fp8")
    with pytest.raises(QlabError, match="scales of 100 channels: give a --group that divides"):
        tune_shapes([(64, 256)], [1], Form(100), kernel="int8_int8")
