"""Products that share one rounding of their activations: the operators' bits, and which products of
a graph become one."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import CPU, activations, calm, random_leaf
from torch import nn

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Tile
from qlab.bench.generate import FROM_CPP
from qlab.lowering import QLinear, inductor_options
from qlab.lowering.weights import int4_int8
from qlab.lowering.weights.setting import Setting
from qlab_kernels import int4_int8 as kernel
from qlab_kernels.compiled import Uncompiled

pytestmark = pytest.mark.processor

try:
    SUPPORTED = kernel.supported()
except Uncompiled as error:
    pytest.skip(f"the kernel is not compiled here: {error}", allow_module_level=True)

ops = torch.ops.qlab
INT4 = Int(4, Tile(1, 32))


def packed(n, k, bits, symmetric, seed):
    leaf = random_leaf(n, k, Int(bits, Tile(1, 32), symmetric=symmetric), seed)
    setting = Setting(dtype=torch.bfloat16, device=CPU, activations="int8")
    return int4_int8.pack("site", leaf, setting).for_mm()


@pytest.mark.parametrize("path", SUPPORTED)
@calm
@given(
    rows=st.lists(st.integers(1, 50), min_size=2, max_size=3),
    blocks=st.integers(1, 5),
    m=st.integers(0, 9),
    bits=st.sampled_from((4, 8)),
    symmetric=st.lists(st.booleans(), min_size=3, max_size=3),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_joined_products_have_the_bits_of_single_ones(
    path, rows, blocks, m, bits, symmetric, dtype
):
    k = 32 * blocks
    weights = [packed(n, k, bits, symmetric[i], i) for i, n in enumerate(rows)]
    x, number = activations(m, k, dtype), kernel.PATHS.index(path)
    parts = [part for weight in weights for part in weight[:3]]
    joined = ops.int4_int8_pair if len(rows) == 2 else ops.int4_int8_triple
    ys = joined(x, *parts, *rows, 32, number)
    for y, weight in zip(ys, weights, strict=True):
        assert torch.equal(y, ops.int4_int8_forward(x, *weight[:5], number))


def test_torch_accepts_the_operators():
    weights = [packed(n, 64, 4, True, n) for n in (16, 5, 33)]
    for few, joined in ((weights[:2], ops.int4_int8_pair), (weights, ops.int4_int8_triple)):
        parts = [part for weight in few for part in weight[:3]]
        x, rows = activations(3, 64, torch.bfloat16), [weight[3] for weight in few]
        torch.library.opcheck(joined.default, (x, *parts, *rows, 32, 0))


def test_the_tensor_of_no_zeros_is_on_the_cpu_wherever_the_first_import_happens():
    code = """
import torch
with torch.device("meta"), torch.inference_mode():
    from qlab.lowering.weights.int4_int8 import NONE
assert NONE.device.type == "cpu" and not NONE.is_inference()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


class Products(nn.Module):
    """Products, each of the activations of its number."""

    def __init__(self, leaves, of):
        super().__init__()
        self.of = of
        self.each = nn.ModuleList(
            QLinear("site", leaf, None, torch.bfloat16, CPU, False, activations="int8")
            for leaf in leaves
        )

    def forward(self, *xs):
        return [module(xs[i]) for i, module in zip(self.of, self.each)]


def compiled(module, *args):
    """The nodes that Inductor is left with; what the compiled module gives is what it gave."""
    seen = []
    options = inductor_options(
        **FROM_CPP, post_grad_custom_post_pass=lambda graph: seen.extend(graph.nodes)
    )
    with torch.no_grad():
        ys = torch.compile(module, fullgraph=True, options=options)(*args)
        for y, expected in zip(ys, module(*args), strict=True):
            assert torch.equal(y, expected) and y.stride() == expected.stride()
    return seen


def operators(nodes):
    names = (str(node.target).split(".") for node in nodes)
    return [name[1] for name in names if name[0] == "qlab"]


def test_products_of_the_same_activations_are_joined_by_three_and_two():
    leaves = [random_leaf(n, 96, INT4, n) for n in (48, 16, 5, 64, 7)]
    x = activations(6, 96, torch.bfloat16).view(2, 3, 96)
    nodes = compiled(Products(leaves, [0] * 5), x)
    assert operators(nodes) == ["int4_int8_triple", "int4_int8_pair"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    assert len(inputs) == 1 + 5 * 2 + 1  # x, words and scales of each, and no zeros of them all


def test_other_activations_widths_groups_and_orders_of_channels_are_apart():
    leaf = random_leaf(16, 96, INT4)
    perm = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    leaves = [
        leaf,
        random_leaf(16, 96, Int(8, Tile(1, 32))),
        random_leaf(16, 96, Int(4, Tile(1, 96))),
        QTensor(leaf.codes, leaf.scales, None, leaf.spec, None, perm),
        leaf,
    ]
    x = activations(3, 96, torch.bfloat16)
    nodes = compiled(Products(leaves, [0, 0, 0, 0, 1]), x, x + 1)
    assert operators(nodes) == ["int4_int8_forward"] * 5
