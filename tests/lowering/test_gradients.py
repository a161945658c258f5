"""Gradients by the input flow through every lowered weight, as through the dense one, and through
experts that stay dense."""

import pytest
import torch
import torch.nn.functional as F
from families import tiny
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import CPU, GROUPS, activations, calm, coded, lowered, random_leaf
from test_coded import FLOATS, leaf_of
from test_lowered_experts import ends_of, random_experts

import qlab
from qlab.algebra.experts import experts_linear, experts_matmul, rows_of
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import QExperts
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.weights.kernels import CODES, INT4
from qlab.methods.rtn import rtn


@pytest.fixture(autouse=True)
def recorded(alone):
    with torch.enable_grad():
        yield


def gradient(run, x):
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return x.grad


def shuffled(leaf):
    perm = torch.randperm(leaf.shape[-1], generator=torch.Generator().manual_seed(0))
    return QTensor(leaf.codes, leaf.scales, leaf.zeros, leaf.spec, leaf.outer, perm)


@calm
@given(
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from([None, *GROUPS]),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
)
def test_through_a_packed_weight_of_every_form(bits, symmetric, group, m, permuted, dense_cache):
    leaf = random_leaf(50, 100 if group is None else group, Int(bits, Tile(1, group), symmetric))
    module = lowered(shuffled(leaf) if permuted else leaf, torch.float32, dense_cache=dense_cache)
    x = activations(m, leaf.shape[1], torch.float32)
    torch.testing.assert_close(
        gradient(module, x),
        gradient(lambda x: F.linear(x, module.dequantized()), x),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("spec", FLOATS)
def test_through_a_coded_weight(spec):
    module = coded(leaf_of(parse_spec(spec), 32, 64), torch.float32)
    x = activations(5, 64, torch.float32)
    torch.testing.assert_close(
        gradient(module, x), gradient(lambda x: F.linear(x, module.dequantized()), x)
    )


def test_in_bfloat16_where_the_forward_is_a_kernel_of_codes():
    module = lowered(random_leaf(64, 64, Int(4, Tile(1, 32))))
    x = activations(3, 64, torch.bfloat16)
    dense = gradient(lambda x: F.linear(x, module.dequantized()), x)
    assert (gradient(module, x) - dense).norm() < 0.02 * dense.norm()


def each(W_eok, ends):
    return lambda x: torch.cat(
        [F.linear(x[rows], W_eok[e]) for e, rows in enumerate(rows_of(ends))]
    )


@pytest.mark.parametrize("kernel", [INT4, CODES], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("dense_cache", [False, True])
def test_through_experts_whatever_their_rows(kernel, dense_cache):
    leaf = random_experts(3, 40, 64, Int(4, Tile(1, 32 if kernel is INT4 else 16), False))
    module, ends = QExperts("site", leaf, torch.float32, CPU, dense_cache), ends_of([4, 0, 2])
    assert module.kernel is kernel
    x = activations(6, 64, torch.float32)
    expected = gradient(each(module.dequantized(), ends), x)
    torch.testing.assert_close(gradient(lambda x: module(x, None, ends), x), expected)


@pytest.mark.parametrize("op", [experts_linear, experts_matmul])
def test_dense_experts_give_those_of_weights_and_biases_too(op):
    ends, g = ends_of([4, 0, 2]), torch.Generator().manual_seed(0)
    x, W, b = (
        torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        for shape in ((6, 8), (3, 5, 8), (3, 5))
    )
    weight = W if op is experts_linear else W.mT
    plain = torch.cat([F.linear(x[rows], W[e], b[e]) for e, rows in enumerate(rows_of(ends))])
    expected = torch.autograd.grad(plain.sin().sum(), (x, W, b))
    torch.testing.assert_close(
        torch.autograd.grad(op(x, weight, b, ends).sin().sum(), (x, W, b)), expected
    )


@pytest.mark.parametrize("spec", ["int8-channel", "int8-channel-asym", "fp8-channel", "mxfp4"])
def test_a_rounded_input_has_the_gradient_that_it_has_in_the_reference(spec):
    rounding = QuantizeInput(parse_spec(spec))
    x = activations(5, 64, torch.float32)
    torch.testing.assert_close(gradient(RoundedInput(rounding, CPU), x), gradient(rounding, x))


def test_compiled_they_are_the_same():
    module = QExperts(
        "site", random_experts(2, 40, 64, Int(4, Tile(1, 32))), torch.float32, CPU, False
    )
    ends = ends_of([2, 3])
    linear = coded(leaf_of(parse_spec("fp8-channel"), 64, 64), torch.float32)
    run, x = lambda x: module(linear(x), None, ends), activations(5, 64, torch.float32)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, x), gradient(run, x))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_through_a_whole_model(family, saved, tmp_path):
    model = qlab.lower(
        qlab.quantize(
            open_checkpoint(saved(family)), rtn(parse_spec("int4-g32")), None, tmp_path / "out"
        ),
        dtype=torch.float32,
        dense_cache=True,
    )
    dense = tiny(family)
    dense.load_state_dict({name: module_or_parameter(model, name) for name in dense.state_dict()})
    x = dense.get_input_embeddings()(torch.arange(3, 15)[None])
    by_x = gradient(lambda x: model(inputs_embeds=x).logits, x)
    expected = gradient(lambda x: dense(inputs_embeds=x).logits, x)
    assert (by_x - expected).norm() < 1e-4 * expected.norm()


def module_or_parameter(model, name):
    """What a parameter's name leads to in a lowered model: a weight of its own, or what stands for
    one."""
    owner, _, key = name.rpartition(".")
    thing = getattr(model.get_submodule(owner), key)
    return thing.dequantized() if isinstance(thing, QExperts) else thing
