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
from qlab.lowering.around.hadamard import LARGEST_FACTOR, Dense, Hadamard, factors, rotation
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
