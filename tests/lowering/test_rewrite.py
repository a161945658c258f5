"""The compiler's pass: which products with a dequantized weight become the fused operator, and what
of it is written out."""

import pytest
import torch
import torch.nn.functional as F
from lowering_cases import CPU, Seen, activations, check_product, lowered, random_leaf
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from qlab.algebra.spec import Int, Tile
from qlab.lowering import QLinear, inductor_options
from qlab.lowering.around.attention import attention
from qlab.lowering.compiler.rewrite import fuse

INT4, aten = Int(4, Tile(1, 64)), torch.ops.aten
pytestmark = pytest.mark.usefixtures("fresh")


class Reference(nn.Module):
    """A linear as somebody writes it: dequantize, then multiply."""

    def __init__(self, layer, bias=None):
        super().__init__()
        self.layer, self.bias = layer, bias

    def forward(self, x):
        return F.linear(x, self.layer.dequantized(), self.bias)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "shape", [(7, 128), (2, 5, 128), (1, 128)], ids=["2-D", "3-D", "one token"]
)
@pytest.mark.parametrize("biased", [False, True])
def test_a_reference_graph_is_rewritten_to_the_fused_operator(shape, biased, dynamic):
    leaf = random_leaf(100, 128, INT4)
    bias = activations(1, 100, torch.bfloat16, seed=5)[0] if biased else None
    x = activations(torch.Size(shape[:-1]).numel(), 128, torch.bfloat16).view(shape)
    seen = Seen(loops=not dynamic)
    compiled = torch.compile(
        Reference(lowered(leaf), bias), fullgraph=True, dynamic=dynamic, options=seen.options
    )
    check_product(compiled(x).flatten(0, -2), x.flatten(0, -2), leaf, bias)
    assert seen.inner.fused == 1 and seen.count("qlab.dequantize") == 0
    known = not dynamic or shape[0] == 1  # torch specializes sizes of 1
    assert seen.count("aten._weight_int4pack_mm_for_cpu") == known and seen.count(
        "qlab.int4_mm"
    ) == (not known)


FORMS = {
    "sequence first": lambda x, W, b: F.linear(x.transpose(0, 1), W, b),
    "@": lambda x, W, b: x.transpose(0, 1) @ W.T + b,
    "einsum": lambda x, W, b: torch.einsum("bsk,nk->bsn", x, W),
    "bmm": lambda x, W, b: torch.bmm(x, W.T.expand(len(x), -1, -1)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_products_of_batches_are_rewritten(form, dynamic):
    layer = lowered(leaf := random_leaf(100, 128, INT4))
    bias = activations(1, 100, torch.bfloat16, seed=5)[0]
    seen = Seen(loops=not dynamic)
    x = activations(10, 128, torch.bfloat16).view(2, 5, 128)
    compiled = torch.compile(
        lambda x: FORMS[form](x, layer.dequantized(), bias),
        fullgraph=True,
        dynamic=dynamic,
        options=seen.options,
    )
    turned = x.transpose(0, 1) if form in ("sequence first", "@") else x
    y = compiled(x)
    assert (
        y.shape == (*turned.shape[:2], 100)
        and seen.inner.fused == 1
        and seen.count("qlab.dequantize") == 0
    )
    check_product(y.flatten(0, 1), turned.flatten(0, 1), leaf, bias if turned is not x else None)


COLUMNS = {
    "W @ x.T": lambda x, W: (W @ x.flatten(0, 1).T).T,
    "bmm": lambda x, W: torch.bmm(W.expand(len(x), -1, -1), x.mT).mT,
    "one column": lambda x, W: (W @ x[:1, 0].T).T,
    "einsum": lambda x, W: torch.einsum("nk,k->n", W, x[0, 0])[None],
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", COLUMNS)
def test_products_of_columns_are_rewritten(form, dynamic):
    layer, seen = lowered(leaf := random_leaf(100, 128, INT4)), Seen(loops=not dynamic)
    x = activations(10, 128, torch.bfloat16).view(2, 5, 128)
    y = torch.compile(
        lambda x: COLUMNS[form](x, layer.dequantized()),
        fullgraph=True,
        dynamic=dynamic,
        options=seen.options,
    )(x)
    assert seen.inner.fused == 1 and seen.count("qlab.dequantize") == 0
    assert y.shape == COLUMNS[form](x, layer.dequantized()).shape
    check_product(y.reshape(-1, 100), x.flatten(0, 1)[: y.numel() // 100], leaf)


def test_columns_lie_as_those_of_the_eager_product():
    layer = lowered(leaf := random_leaf(100, 128, INT4))
    seen = Seen()
    x = activations(10, 128, torch.bfloat16)
    # A view by strides reads the product by where its values lie.
    product = lambda x: (layer.dequantized() @ x.T).as_strided((50, 20), (20, 1))
    y = torch.compile(product, fullgraph=True, options=seen.options)(x)
    assert seen.inner.fused == 1
    check_product(y.view(100, 10).T, x, leaf)


@pytest.mark.parametrize(
    "isa, units", [("avx2", False), ("avx512", False), ("avx512_bf16", True), ("amx", True)]
)
def test_many_rows_are_left_to_the_operator_where_they_are_multiplied_in_fp32(isa, units, on):
    on(isa)
    layer = lowered(leaf := random_leaf(100, 128, INT4))
    seen = Seen()
    x = activations(300, 128, torch.bfloat16)
    check_product(
        torch.compile(layer, fullgraph=True, dynamic=False, options=seen.options)(x), x, leaf
    )
    assert (seen.count("qlab.int4_mm"), seen.count("aten.mm")) == ((0, 1) if units else (1, 0))


def test_addmm_with_factors_which_rounds_once_after_them_is_left_alone():
    layer, seen = lowered(random_leaf(100, 128, INT4), torch.float16), Seen()
    x = layer.dequantized()[:3].sign() * 60000  # whose products are beyond float16
    product = lambda x: torch.addmm(x.new_zeros(100), x, layer.dequantized().T, alpha=2.0**-10)
    y = torch.compile(product, fullgraph=True, options=seen.options)(x)
    assert seen.inner.fused == 0 and torch.isfinite(y).all()
    torch.testing.assert_close(y, product(x), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_strides_are_those_of_the_eager_operator(dynamic):
    """aten's kernel takes contiguous activations only, and its rows are padded; neither shows."""
    layer, after = lowered(random_leaf(100, 128, INT4)), lowered(random_leaf(70, 64, INT4))
    wide, seen = activations(6, 256, torch.bfloat16), Seen()

    def product(wide):
        y = layer(wide[:, :128])
        return y, after(y[:, :64]), y.view(-1)

    compiled = torch.compile(product, fullgraph=True, dynamic=dynamic, options=seen.options)
    for computed, expected in zip(compiled(wide), product(wide)):
        torch.testing.assert_close(computed, expected, rtol=0.02, atol=0.02)
        assert computed.stride() == expected.stride()
    assert seen.count("aten._weight_int4pack_mm_for_cpu") == (0 if dynamic else 2)


def test_another_product_with_a_dequantized_weight_is_left_alone():
    layer, seen = lowered(random_leaf(64, 64, INT4)), Seen()
    x = activations(3, 64, torch.bfloat16)
    untransposed = lambda x: x @ layer.dequantized()  # x @ W, not x @ W.T
    compiled = torch.compile(untransposed, fullgraph=True, options=seen.options)
    assert torch.allclose(compiled(x), x @ layer.dequantized(), atol=0.05, rtol=0.02)
    assert seen.inner.fused == 0 and seen.count("qlab.dequantize") == 1


@pytest.mark.parametrize(
    "target, axes, fused",
    [
        (aten.permute.default, ([1, 0],), 1),
        (aten.permute.default, ([-1, 0],), 1),
        (aten.permute.default, ([0, 1],), 0),
        (aten.transpose.int, (0, 1), 1),
        (aten.transpose.int, (1, -1), 0),
        (aten.reshape.default, ([64, 64],), 0),
    ],
)
def test_only_a_transposed_weight_is_fused(target, axes, fused):
    layer = lowered(random_leaf(64, 64, INT4))

    def product(x, words, scales):
        packed = layer.packed._replace(words=words, scales=scales)
        W = torch.ops.qlab.dequantize(*packed.for_dequantize())
        return aten.mm(x, target(W, *axes))

    arguments = activations(3, 64, torch.bfloat16), layer.words, layer.scales
    graph = make_fx(product, tracing_mode="fake")(*arguments).graph
    assert fuse(graph) == fused


@pytest.mark.parametrize(
    "k, spec",
    [(100, Int(4, Tile(1, None))), (128, Int(8, Tile(1, 64), False))],
    ids=["ragged", "two planes"],
)
@pytest.mark.parametrize(
    "m, isa, written",
    [
        (2, "avx2", "aten._weight_int4pack_mm_for_cpu"),
        (100, "amx", "qlab.dequantize"),
        (100, "avx2", None),
    ],
)
def test_static_products_are_written_out_as_the_operator_computes_them(
    m, isa, written, k, spec, on
):
    """But those that it multiplies in another dtype, as it does without units for bf16: they are
    left to it."""
    on(isa)
    leaf, x = random_leaf(70, k, spec), activations(m, k, torch.bfloat16)
    seen, layer = Seen(), lowered(leaf)
    check_product(
        torch.compile(layer, fullgraph=True, dynamic=False, options=seen.options)(x), x, leaf
    )
    assert seen.inner.chosen == (written is not None) and seen.count("qlab") == (
        written != "aten._weight_int4pack_mm_for_cpu"
    )
    assert seen.count(written or "qlab.int4_mm") == 1


@pytest.mark.parametrize("spec", [Int(4, Tile(1, 32)), Int(8, Tile(1, None))], ids=str)
@pytest.mark.parametrize(
    "enters",
    [lambda x: x.T, lambda x: torch.relu(x).T, lambda x: x.T.contiguous()],
    ids=["T", "relu", "copy"],
)
def test_inputs_that_stand_in_columns_are_multiplied_as_the_operator_does(enters, spec):
    """Inductor may write even a contiguous copy in the order of what it copies, which aten's kernel
    refuses, or reads wrongly."""
    layer = QLinear(
        "site", random_leaf(48, 64, spec), None, torch.bfloat16, torch.device("cpu"), False
    )
    for m in (5, 64):
        x = activations(64, m, torch.bfloat16)
        compiled = torch.compile(
            lambda x: layer(enters(x)), options=inductor_options(), dynamic=False
        )
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(enters(x)))


@pytest.mark.parametrize("isa, operators", [("amx", 0), ("avx2", 1)])
def test_a_dense_copy_is_multiplied_when_there_are_many_tokens(isa, operators, on):
    on(isa)
    leaf, x, seen = random_leaf(64, 128, INT4), activations(100, 128, torch.bfloat16), Seen()
    check_product(
        torch.compile(lowered(leaf, dense_cache=True), dynamic=False, options=seen.options)(x),
        x,
        leaf,
    )
    assert (seen.count("aten.mm"), seen.count("qlab")) == (1 - operators, operators)
    assert seen.count("qlab.dequantize") == 0


def test_a_dense_product_of_one_token_becomes_a_sum():
    head = nn.Linear(64, 200, bias=False, dtype=torch.bfloat16)
    x = activations(1, 64, torch.bfloat16)
    seen = Seen()
    y = torch.compile(head, dynamic=False, options=seen.options)(x)
    torch.testing.assert_close(y, head(x), rtol=0.02, atol=0.02)
    assert seen.inner.streamed == 1 and seen.count("aten.mm") == 0


def loops_around(word, code):
    """The largest number of loops that enclose a line of C++ with this word."""
    lines, blocks, most = [line.strip() for line in code.splitlines()], [], 0
    for before, line in zip(["", *lines], lines):
        if word in line:
            most = max(most, sum(blocks))
        if line == "{":
            blocks.append(before.startswith("for("))
        elif line == "}" and blocks:
            blocks.pop()
    return most


def test_what_enters_a_product_of_one_token_is_computed_once():
    """Not for every row of the weight, nor for every position of the cache: erf stands for a norm
    and for rotary embeddings."""
    head = nn.Linear(64, 200, bias=False, dtype=torch.bfloat16)
    x = activations(1, 64, torch.bfloat16)
    q, k, v = (
        torch.randn(1, heads, length, 16, dtype=torch.bfloat16)
        for heads, length in ((4, 1), (2, 40), (2, 40))
    )
    for f, arguments, loops in (
        (lambda x: head(x.erf()), (x,), 1),
        (lambda *qkv: attention(head, qkv[0].erf(), *qkv[1:], None)[0], (q, k, v), 2),
    ):
        compiled = torch.compile(f, dynamic=False, options=Seen().options)
        y, codes = run_and_get_code(compiled, *arguments)
        torch.testing.assert_close(y, f(*arguments), rtol=0.02, atol=0.02)
        assert 1 <= max(loops_around("erf(", code) for code in codes) <= loops


@pytest.mark.parametrize("symmetric, m, count", [(True, 3, 1), (True, 40, 0), (False, 3, 0)])
def test_few_tokens_by_bytes_are_atens_product(symmetric, m, count, fresh):
    spec, seen = Int(8, Tile(1, None), symmetric), Seen(loops=False)
    layer = QLinear("site", random_leaf(70, 64, spec), None, torch.bfloat16, CPU, False)
    x = activations(m, 64, torch.bfloat16)
    y = torch.compile(layer, fullgraph=True, dynamic=False, options=seen.options)(x)
    torch.testing.assert_close(y, layer(x))
    assert seen.count("aten._weight_int8pack_mm") == count
    assert seen.count("qlab.int8_mm") == 1 - count


@pytest.mark.parametrize("of_both", [True, False])
def test_attention_of_one_token_reads_slots_in_place(of_both):
    """Of what a cache in pages holds no copy is made, where keys and values have the same slots."""
    seen, identity = Seen(loops=False), nn.Identity()
    q = activations(8, 16, torch.float32).view(2, 4, 1, 16)
    keys, values = (activations(100, 16, torch.float32, i).view(50, 2, 16) for i in (1, 2))
    at = torch.arange(50).view(2, 25)
    others = at if of_both else at.flip(1)

    def attended(q, keys, values, at, others):
        k, v = keys[at].transpose(1, 2), values[others].transpose(1, 2)
        return attention(identity, q, k, v, None)[0]

    arguments = q, keys, values, at, others
    y = torch.compile(attended, fullgraph=True, dynamic=False, options=seen.options)(*arguments)
    assert torch.equal(y, attended(*arguments))
    assert seen.inner.in_place == of_both and seen.count("qlab.one_token") == 1
    assert seen.count("aten.index") == 2 - 2 * of_both
