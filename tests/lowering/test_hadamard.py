"""Hadamard matrices by their factors: the products of the matrix itself, in fewer steps."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import CPU, calm

from qlab.algebra.online import rotate
from qlab.algebra.random import generator
from qlab.lowering.around.hadamard import (
    LARGEST_FACTOR,
    Dense,
    Hadamard,
    factors,
    rotation,
    signs,
)
from qlab.lowering.around.hadamard_op import Butterflies
from qlab.methods.hadamard import hadamard, random_hadamard, random_orthogonal

# 12 and 20 are Paley's of q = 11 and 19, 28 of q = 13; 36 of q = 17
ORDERS = (2, 64, 256, 24, 40, 56, 72, 384, 640, 1536)


def signed(n, seed, left=True, right=True):
    g = torch.Generator().manual_seed(seed)
    signs = [torch.randint(2, (n,), generator=g).double() * 2 - 1 for _ in range(2)]
    H = hadamard(n)
    H = H * signs[0][:, None] if left else H
    return ((H * signs[1] if right else H) / n**0.5).float()


@calm
@given(st.sampled_from(ORDERS), st.integers(0, 99), st.booleans(), st.booleans(), st.booleans())
def test_the_product_is_that_of_the_matrix(n, seed, left, right, turned):
    M = signed(n, seed, left, right)
    M = M.mT.contiguous() if turned else M
    form = factors(M)
    for shape in ((0, n), (1, n), (2, 3, 2 * n)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        y = form(x)
        assert y.shape == x.shape
        torch.testing.assert_close(y, rotate(x, M), rtol=1e-5, atol=1e-5)
    assert form(x.bfloat16()).dtype == torch.bfloat16


def test_no_factor_is_large_and_their_sizes_make_the_order():
    for n in (256, 1024, 1536, 4096):
        form = factors(random_hadamard(n, generator(0, "x")))
        sizes = [len(getattr(form, name)) for name in form.names]
        assert torch.tensor(sizes).prod() == n and max(sizes) <= LARGEST_FACTOR


def test_what_is_no_product_of_hadamard_matrices_stays_a_matrix():
    M = random_hadamard(256, generator(0, "x"))
    assert isinstance(rotation(M, CPU), Hadamard)
    wrong = M.clone()
    wrong[3, 5] *= -1
    longer = M.clone()
    longer[3, 5] *= 1.5
    others = (wrong, longer, random_orthogonal(256, generator(0, "x")), torch.zeros(256, 256))
    for other in (*others, M[None], random_hadamard(64, generator(0, "x"))):
        assert isinstance(rotation(other, CPU), Dense)
    assert factors(hadamard(12)) is None


def test_gradients_are_those_of_the_matrix():
    M = random_hadamard(384, generator(0, "x"))
    x, g = torch.randn(3, 384), torch.randn(3, 384)
    with torch.enable_grad():
        x.requires_grad_()
        (by_x,) = torch.autograd.grad(rotation(M, CPU)(x), x, g)
    torch.testing.assert_close(by_x, g @ M.mT, rtol=1e-5, atol=1e-5)


def test_a_copy_multiplies_alike_and_a_state_holds_nothing():
    form, x = rotation(random_hadamard(256, generator(0, "x")), CPU), torch.randn(2, 256)
    for twin in (copy.deepcopy(form), pickle.loads(pickle.dumps(form))):
        assert torch.equal(twin(x), form(x))
    assert not form.state_dict() and "256 channels as" in repr(form)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_into_one_graph(dynamic):
    form = rotation(random_hadamard(256, generator(0, "x")), CPU)
    compiled = torch.compile(form, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (3, 7):
        x = torch.randn(m, 256)
        torch.testing.assert_close(compiled(x), form(x))


INTERPRETED = """
import torch
from qlab.lowering.around import hadamard_op
from qlab.lowering.around.hadamard import Butterflies, Dense, rotation
from qlab.algebra.online import rotate
from qlab.methods.hadamard import hadamard, random_hadamard
from qlab.algebra.random import generator
place, here = torch.device("cuda"), []
torch.cuda.get_device_capability = lambda device=None: (8, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA A100"
Tensor_to = torch.Tensor.to
torch.Tensor.to = lambda t, *a, **k: t if a and a[0] == place else Tensor_to(t, *a, **k)
multiplied = hadamard_op.product
hadamard_op.hadamard = lambda *args: (here.append(args[0].shape), multiplied(*args))[1]
for n in (64, 48):
    for M in (random_hadamard(n, generator(0, "x")), hadamard(n).float() / n**0.5):
        form = rotation(M, place)
        assert isinstance(form, Butterflies), form
        for dtype, rtol in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
            x = torch.randn(2, 1, 2 * n).to(dtype)
            y = form(x)
            assert y.dtype == dtype and y.shape == x.shape
            torch.testing.assert_close(y.double(), rotate(x.double(), M.double()), rtol=rtol, atol=rtol)
        assert form(x[:0]).shape == (0, 1, 2 * n)
assert here and isinstance(rotation(torch.ones(4, 4), place), Dense)
torch.cuda.get_device_capability = lambda device=None: (7, 5)
assert isinstance(rotation(hadamard(48).float(), place), Dense)
"""  # noqa: E501


def test_a_gpu_multiplies_by_the_kernel_where_it_has_one(interpreted):
    interpreted(INTERPRETED)


def butterflies(n, seed=0):
    parts = signs(signed(n, seed))
    return Butterflies(parts.before, parts.core, parts.behind, float(parts.size), parts.doublings)


@pytest.mark.parametrize("n", [16, 48])
def test_the_operator_is_one_node_with_a_fake_kernel_and_the_gradient_of_the_matrix(n):
    form, M, x = butterflies(n), signed(n, 0), torch.randn(3, n)
    arguments = (form.before, form.core, form.behind, form.scale, form.doublings)
    torch.library.opcheck(torch.ops.qlab.hadamard.default, (x, *arguments))
    nodes = []

    def backend(graph, _):
        nodes.extend(node.target for node in graph.graph.nodes if "hadamard" in str(node.target))
        return graph

    compiled = torch.compile(form, fullgraph=True, dynamic=True, backend=backend)
    for m in (3, 7):
        rows = torch.randn(m, 2, n)
        torch.testing.assert_close(compiled(rows), rotate(rows, M), rtol=1e-5, atol=1e-5)
    assert nodes == [torch.ops.qlab.hadamard.default]
    with torch.enable_grad():
        x.requires_grad_()
        g = torch.randn(3, n)
        (by_x,) = torch.autograd.grad(form(x), x, g)
    torch.testing.assert_close(by_x, g @ M.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [64, 1024, 48, 1536])
def test_a_gpu_computes_what_the_matrix_does(n):
    M = signed(n, 1)
    form = rotation(M, torch.device("cuda"))
    for dtype, rtol in ((torch.float16, 2e-3), (torch.float32, 1e-5)):
        x = torch.randn(5, 2 * n, device="cuda").to(dtype)
        expected = rotate(x.double(), M.cuda().double())
        torch.testing.assert_close(form(x).double(), expected, rtol=rtol, atol=rtol)
