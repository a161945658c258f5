"""Weights that no kernel takes: held as bit streams, they are qtensor.dense's numbers bit for bit,
in every graph and state."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import activations, calm, coded, coded_experts, random_leaf
from torch.utils import _pytree as pytree

from qlab.algebra.experts import rows_of
from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Float, Int, Tile, parse_spec
from qlab.errors import QlabError
from qlab.lowering import inductor_options
from qlab.lowering.weights.int4 import expert
from qlab.lowering.weights.nibbles import refusal

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# test_schema is left out: it compares no 8-bit floats.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
FLOATS = (
    "fp8-tensor",
    "fp8-channel",
    "fp8-b16x32",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nvfp4",
    "fp4-g8",
    "fp6-channel",
)


def leaf_of(spec, o, k, seed=0):
    if isinstance(spec, Float):
        W = torch.randn(o, k, generator=torch.Generator().manual_seed(seed))
        return encode(
            minmax, W, spec, outer=spec.global_scale(W.abs().max()) if spec.outer else None
        )
    return random_leaf(o, k, spec, seed)


@st.composite
def leaves(draw):
    """Every float grid; integers of every width, groups that no kernel reads, blocks over the edge,
    float zeros, shuffled channels."""
    o, k, seed = draw(st.integers(1, 40)), 32 * draw(st.integers(1, 3)), draw(st.integers(0, 99))
    if draw(st.booleans()):
        return leaf_of(parse_spec(draw(st.sampled_from(FLOATS))), o, k, seed)
    tile = draw(
        st.sampled_from([Tile(1, 8), Tile(1, 16), Tile(1, None), Tile(None, None), Tile(3, 48)])
    )
    leaf = random_leaf(
        o,
        k,
        Int(
            draw(st.integers(1, 8)),
            tile if k % 48 or tile.rows == 3 else Tile(1, 24),
            draw(st.booleans()),
        ),
        seed,
    )
    zeros = None if leaf.zeros is None else leaf.zeros.double() + draw(st.sampled_from([0, 0.37]))
    perm = (
        torch.randperm(k, generator=torch.Generator().manual_seed(seed))
        if draw(st.booleans())
        else None
    )
    return QTensor(leaf.codes, leaf.scales, zeros, leaf.spec, perm=perm)


def bits(x):
    return x.contiguous().view(torch.uint8)


@calm
@given(leaves(), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_the_weight_is_dense_bit_for_bit_and_so_is_its_product(leaf, dtype, biased, dense_cache):
    bias = activations(1, leaf.shape[0], dtype, seed=7)[0] if biased else None
    module = coded(leaf, dtype, bias, dense_cache)
    x = activations(5, leaf.shape[1], dtype)
    assert torch.equal(bits(module.dequantized()), bits(dense(leaf, dtype)))
    assert torch.equal(module(x), F.linear(x, dense(leaf, dtype), bias))
    words = leaf.shape[0] * -(-leaf.shape[1] * leaf.spec.bits // 32) * 4  # rows end in whole words
    assert module.words.nbytes == words and (module.dense is not None) == dense_cache


@calm
@given(
    st.lists(st.sampled_from([0, 1, 3]), min_size=1, max_size=3),
    st.sampled_from(["nvfp4", "mxfp6", "int3-g8-asym", "fp8-channel"]),
    st.booleans(),
    st.booleans(),
)
def test_each_row_meets_its_own_expert(counts, text, biased, dense_cache):
    parts = [leaf_of(parse_spec(text), 24, 64, seed) for seed in range(len(counts))]
    leaf = pytree.tree_map(lambda *parts: None if parts[0] is None else torch.stack(parts), *parts)
    module = coded_experts(leaf, dense_cache=dense_cache)
    x = activations(sum(counts), 64, torch.bfloat16)
    ends = torch.tensor(counts).cumsum(0)
    bias = activations(len(counts), 24, torch.bfloat16, seed=7) if biased else None
    y = module(x, bias, ends)
    assert y.shape == (sum(counts), 24) and len(module) == len(counts)
    for e, rows in enumerate(rows_of(ends)):
        expected = F.linear(x[rows], dense(expert(leaf, e), torch.bfloat16))
        assert torch.equal(y[rows], expected if bias is None else expected + bias[e])


@pytest.mark.parametrize("text", ["nvfp4", "int4-g16-asym", "fp8-b16x32"])
def test_torch_accepts_the_operators_and_compiles_one_dynamic_graph(text):
    leaf = leaf_of(parse_spec(text), 24, 64)
    module = coded(leaf)
    torch_dense = torch.ops.qlab.dense.default
    torch.library.opcheck(
        torch_dense, (*module.buffers_of_weight(), 64, text, torch.bfloat16), test_utils=CHECKS
    )
    torch._dynamo.reset()
    compiled = torch.compile(
        module, fullgraph=True, dynamic=True, options=inductor_options(fx_graph_cache=False)
    )
    for m in (3, 7):
        x = activations(m, 64, torch.bfloat16)
        torch.testing.assert_close(compiled(x), module(x), rtol=0.02, atol=0.02)
    program = torch.export.export(
        module, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},)
    )
    assert sum(node.target is torch_dense for node in program.graph.nodes) == 1
    several = [t if t is None else t[None] for t in module.buffers_of_weight()]
    arguments = (x, *several[:4], None, None, torch.tensor([7]), 64, text)
    torch.library.opcheck(torch.ops.qlab.experts_mm.default, arguments, test_utils=CHECKS)


@pytest.mark.parametrize(
    "text", ["int8-channel", "int8-channel-asym", "fp8-channel", "fp8-tensor", "fp8-g32", "nvfp4"]
)
def test_inputs_are_rounded_as_the_reference_rounds_them(text):
    spec = parse_spec(text)
    rounding = QuantizeInput(spec, outer=torch.tensor([900.0]) if spec.outer else None)
    leaf, x = leaf_of(parse_spec("fp8-channel"), 24, 64), activations(6, 64, torch.bfloat16)
    module = coded(leaf, inputs=rounding)
    assert torch.equal(module(x), F.linear(rounding(x), dense(leaf, torch.bfloat16))) and module(
        x[:0]
    ).shape == (0, 24)
    assert not torch.equal(module(x), F.linear(x, dense(leaf, torch.bfloat16))) and str(
        rounding.input_spec
    ) in repr(module)
    inputs = module.inputs
    torch.library.opcheck(
        torch.ops.qlab.round_input.default,
        (x, inputs.scales, inputs.zeros, inputs.outer, inputs.text),
    )


@pytest.mark.parametrize("text", ["nvfp4", "mxfp8", "int3-g8-asym"])
def test_the_state_round_trips_and_that_of_another_grid_is_refused(text):
    leaf = leaf_of(parse_spec(text), 24, 64)
    rounding = QuantizeInput(parse_spec("fp8-tensor"), torch.tensor([[0.5]]))
    module, other = (
        coded(weight, inputs=rounding) for weight in (leaf, leaf_of(leaf.spec, 24, 64, seed=5))
    )
    other.inputs.scales.fill_(9.0)
    other.load_state_dict(module.state_dict())
    x = activations(3, 64, torch.bfloat16)
    assert torch.equal(other(x), module(x)) and torch.equal(
        other.dequantized(), dense(leaf, torch.bfloat16)
    )
    state = module.state_dict() | {"_extra_state": torch.tensor(list(b"mxfp4"), dtype=torch.uint8)}
    with pytest.raises(QlabError, match=f"packed as mxfp4 and the module reads {text}"):
        module.load_state_dict(state)


def test_scales_too_small_for_float16_are_refused():
    leaf = leaf_of(parse_spec("int4-g16"), 24, 64)
    leaf = replace(leaf, scales=1e-9 * leaf.scales.float())
    with pytest.raises(
        QlabError, match=r"site has scales up to .*, which torch\.float16 does not hold"
    ):
        coded(leaf, torch.float16)
    W = coded(leaf).dequantized()
    assert (W - dense(leaf, torch.float32)).norm() <= 0.01 * dense(leaf, torch.float32).norm()


def test_what_is_wrong_is_refused_by_name():
    leaf = leaf_of(parse_spec("mxfp4"), 24, 64)
    off = QTensor(
        torch.full_like(leaf.codes.float(), 5.0).to(leaf.codes.dtype), leaf.scales, None, leaf.spec
    )
    with pytest.raises(QlabError, match="site has codes that are no numbers of mxfp4"):
        coded(off)
    with pytest.raises(
        QlabError, match=r"lowered for torch.bfloat16 got torch.float32 activations"
    ):
        coded(leaf)(activations(1, 64, torch.float32))


def test_kernels_say_what_they_do_not_take():
    shape = torch.Size((8, 64))
    assert (
        refusal(Int(4, Tile(1, 32)), shape) is None
        and refusal(Int(2, Tile(1, None)), torch.Size((8, 60))) is None
    )
    for spec, part in [
        (Int(4, Tile(1, 16)), "groups of 16"),
        (parse_spec("mxfp4"), "mxfp4"),
        (Int(4, Tile(3, 32)), "blocks of 3x32"),
    ]:
        assert part in refusal(spec, shape)
