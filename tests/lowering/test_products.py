"""16-bit products run in the arithmetic that the processor is fast at, and round once whichever
that is."""

import os
import subprocess
import sys

import pytest
import torch
from lowering_cases import activations, check_product, lowered, random_leaf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.algebra.interpret import interpret
from qlab.algebra.products import product_dtype
from qlab.algebra.spec import parse_spec
from qlab.algebra.tracing.trace import trace
from qlab.lowering.tuning import tune as tuning
from qlab.lowering.weights import cpu
from qlab.process import processor

pytestmark = pytest.mark.processor

HALVES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))


class Experts(nn.Module):
    """Two experts, each token to one of them."""

    def __init__(self, dtype):
        super().__init__()
        self.W, self.b = (
            nn.Parameter(torch.randn(2, 24, 48, dtype=dtype)),
            nn.Parameter(torch.randn(2, 24, dtype=dtype)),
        )

    def forward(self, x, chosen):
        _, tokens, ends = torch.ops.qlab.route(chosen, 2)
        return torch.ops.qlab.experts_linear(x[tokens], self.W, self.b, ends)


class Multiplied(TorchDispatchMode):
    """The dtypes of the matrices that were multiplied."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.linear):
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}


@pytest.mark.parametrize(
    "environment, capability, has, isa",
    [
        ({}, "AVX512", ("amx", "bf16"), "amx"),
        ({}, "AVX512", ("bf16",), "avx512_bf16"),
        ({}, "AVX512", (), "avx512"),
        ({}, "AVX2", (), "avx2"),
        ({}, "DEFAULT", (), "default"),
        (AVX2, "AVX2", ("amx", "bf16"), "avx2"),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, "AVX512", ("amx", "bf16"), "avx512_bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, "AVX512", ("bf16",), "avx512_bf16"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "AVX512", ("amx", "bf16"), "avx512"),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}, "AVX512", ("amx", "bf16"), "avx2"),
    ],
)
def test_the_processor_is_what_the_environment_leaves_of_it(environment, capability, has, isa):
    assert processor.detect(
        environment, capability, "amx" in has, "bf16" in has
    ) == processor.Processor(isa)


def test_a_process_under_those_variables_finds_the_smaller_processor():
    code = (
        "from qlab.process import processor; here = processor.here(); "
        "print(here.isa, here.bf16_units)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **AVX2},
        capture_output=True,
        text=True,
        check=True,
    )
    # A processor without AVX2 says "default" itself.
    assert process.stdout.split() in (["avx2", "False"], ["default", "False"])


@HALVES
@pytest.mark.parametrize(
    "isa, least", [("default", 8), ("avx2", 8), ("avx512", 256), ("avx512_bf16", 256), ("amx", 256)]
)
def test_many_rows_are_multiplied_in_fp32_where_there_are_no_units_for_them(dtype, isa, least, on):
    on(isa)
    has_units = isa in ("avx512_bf16", "amx") and dtype == torch.bfloat16
    for x in (torch.zeros(least, 3, dtype=dtype), torch.zeros(2, least // 2, 3, dtype=dtype)):
        assert product_dtype(x) == (dtype if has_units else torch.float32)
    assert product_dtype(torch.zeros(least - 1, 3, dtype=dtype)) == dtype
    assert product_dtype(torch.zeros(least, 0, dtype=dtype)) == dtype
    assert product_dtype(torch.zeros(least, 3, dtype=dtype, device="meta")) == dtype


def test_wider_floats_stay_as_they_are(on):
    on("avx2")
    assert {
        product_dtype(torch.zeros(999, 3, dtype=t)) for t in (torch.float32, torch.float64)
    } == {torch.float32, torch.float64}


@HALVES
@pytest.mark.parametrize("bias", (False, True))
def test_an_interpreted_product_is_the_exact_one_rounded_once(dtype, bias, on):
    on("avx2")
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(48, 24, bias=bias)).to(dtype)
    x = torch.randn(3, 100, 48).to(dtype)
    exact = nn.functional.linear(
        x.double(), block[0].weight.double(), block[0].bias.double() if bias else None
    )
    graph = trace(block, (x,), {})
    with Multiplied() as seen, torch.no_grad():
        y = interpret(graph, (x,), {})
    assert seen.dtypes == {torch.float32} and y.dtype == dtype
    assert_rounded_once(y, exact)


def assert_rounded_once(y, exact):
    """y is the number of its dtype next to the exact one, but for the last bits of fp32 sums."""
    half_an_ulp = exact.abs() * torch.finfo(y.dtype).eps / 2 + 1e-5
    assert ((y.double() - exact).abs() <= half_an_ulp * 1.001).all()


@HALVES
def test_products_of_experts_are_rounded_once(dtype, on):
    on("avx2")
    torch.manual_seed(0)
    block, x = Experts(dtype), torch.randn(40, 48).to(dtype)
    chosen = torch.tensor([0] * 10 + [1] * 30)[:, None]
    graph = trace(block, (x, chosen), {})
    with Multiplied() as seen, torch.no_grad():
        y = interpret(graph, (x, chosen), {})
    expert = chosen[:, 0]
    assert seen.dtypes == {torch.float32} and y.dtype == dtype
    assert_rounded_once(
        y,
        torch.einsum("nk,nok->no", x.double(), block.W.double()[expert]) + block.b.double()[expert],
    )


@HALVES
@pytest.mark.parametrize("dense_cache", (False, True))
def test_many_rows_of_a_lowered_product_are_multiplied_in_fp32(dtype, dense_cache, on):
    on("avx512")
    leaf = random_leaf(100, 128, parse_spec("int4-g64"))
    layer, x = lowered(leaf, dtype, dense_cache=dense_cache), activations(300, 128, dtype)
    with Multiplied() as timed:  # and so they are when they are tuned
        tuning._cpu_calls(
            "dense",
            x,
            [layer.packed],
            [layer.dense] if dense_cache else [],
        )[0]()
    assert timed.dtypes == {torch.float32}
    with Multiplied() as seen:
        y = cpu.int4_mm(x, layer.packed, layer.dense)
    assert seen.dtypes == {torch.float32}
    check_product(y, x, leaf)
