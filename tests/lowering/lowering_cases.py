"""Quantized weights of every shape, group, width and zero point, and what their product should
be."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from tolerances import PRODUCT, UNIT
from torch._inductor import config

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.lowering import QExperts, QLinear, inductor_options
from qlab.lowering.weights.kernels import CODES, INT4

calm = settings(max_examples=25)
CPU = torch.device("cpu")
GROUPS = (32, 64, 128, 256)


def random_leaf(o, k, spec, seed=0, scale_dtype=torch.float32):
    """Codes that use the whole range, scales of both signs and several orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (o, k), generator=generator, dtype=torch.int8)
    shape = spec.tile.scales_shape(codes.shape)
    scales = torch.randn(shape, generator=generator).mul(0.05).to(scale_dtype)
    zeros = (
        None
        if spec.symmetric
        else torch.randint(spec.qmin, spec.qmax + 1, shape, generator=generator, dtype=torch.int8)
    )
    return QTensor(codes, scales, zeros, spec)


def activations(m, k, dtype, seed=0):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)


def lowered(leaf, dtype=torch.bfloat16, bias=None, dense_cache=False):
    """By the int4 kernels, also where another row takes the weight."""
    return QLinear("site", leaf, bias, dtype, CPU, dense_cache, kernel=INT4)


def coded(leaf, dtype=torch.bfloat16, bias=None, dense_cache=False, inputs=None):
    """The same held as bit streams, also where a kernel takes it."""
    return QLinear("site", leaf, bias, dtype, CPU, dense_cache, inputs=inputs, kernel=CODES)


def coded_experts(leaf, dtype=torch.bfloat16, dense_cache=False):
    return QExperts("site", leaf, dtype, CPU, dense_cache, kernel=CODES)


def check_product(y, x, leaf, bias=None):
    """y is x @ W.T + b within the tolerances."""
    W = dense(leaf, torch.float64)
    size = W.abs()
    if leaf.zeros is not None:
        offset = QTensor(torch.zeros_like(leaf.codes), leaf.scales, leaf.zeros, leaf.spec)
        size = size + dense(offset, torch.float64).abs()
    expected, scale = x.double() @ W.mT, x.double().abs() @ size.mT
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    assert y.shape == expected.shape and y.dtype == x.dtype
    worst = ((y.double() - expected).abs() / (scale + 1e-30)).max().item() if y.numel() else 0.0
    assert worst <= PRODUCT[x.dtype] * UNIT[x.dtype], worst


@st.composite
def problems(draw):
    """(leaf, m): any width, group or whole row, zero points, ragged n, and ragged k for whole
    rows."""
    bits, symmetric = draw(st.integers(2, 8)), draw(st.booleans())
    group = draw(st.sampled_from([None, *GROUPS]))
    k = draw(st.integers(1, 200)) if group is None else group * draw(st.integers(1, 3))
    tile = Tile(1, group) if draw(st.booleans()) or group else Tile(None, None)
    leaf = random_leaf(
        draw(st.integers(1, 150)), k, Int(bits, tile, symmetric), draw(st.integers(0, 99))
    )
    return leaf, draw(st.sampled_from([0, 1, 2, 4, 5, 33, 64]))


class Seen:
    """A post-grad pass that calls another one and remembers the operators it left.

    loops: whether what surrounds the operators is compiled to loops of C++, and not run as it
    stands, which saves the compiler.
    """

    def __init__(self, loops=True):
        as_is = (
            {}
            if loops or not hasattr(config, "fallback_by_default")
            else {"fallback_by_default": True}
        )  # where torch knows it
        self.options = inductor_options(fx_graph_cache=False) | as_is
        self.inner, self.targets = self.options["post_grad_custom_pre_pass"], []
        self.options["post_grad_custom_pre_pass"] = self

    def __call__(self, graph):
        self.inner(graph)
        self.targets = [node.target for node in graph.nodes if node.op == "call_function"]

    def count(self, name):
        return sum(str(target).startswith(name) for target in self.targets)
