"""Integer weights times activations rounded to int8: every path of the compiled kernel against the
formula, and the kernel as a row of the table."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import CPU, activations, calm, random_leaf

import qlab
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Int, Tile
from qlab.bench.generate import FROM_CPP
from qlab.errors import QlabError
from qlab.lowering import QExperts, QLinear, inductor_options
from qlab.lowering.weights import int4_int8, kernels
from qlab.lowering.weights.kernels import choose
from qlab.lowering.weights.setting import Setting
from qlab_kernels import int4_int8 as kernel
from qlab_kernels.compiled import Uncompiled

try:
    SUPPORTED = kernel.supported()
except Uncompiled as error:
    pytest.skip(f"the kernel is not compiled here: {error}", allow_module_level=True)

mm = torch.ops.qlab.int4_int8_mm
NONE = torch.empty(0, dtype=torch.int8)
# of a result: its own rounding, and that of sums in fp32
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11 + 2e-6}
each_path = pytest.mark.parametrize("path", SUPPORTED)
setting = partial(Setting, dtype=torch.bfloat16, device=CPU, activations="int8")


def number(path):
    return kernel.PATHS.index(path)


def of_ones(q, bits, zeros=None):
    """The arguments behind x of a weight whose scales are 1, one group to a row."""
    n, k = q.shape
    zeros = NONE if zeros is None else kernel.beside(zeros)
    return kernel.pack(q, bits), kernel.beside(torch.ones(n, 1)), zeros, n, -(-k // 32) * 32


def integers(m, k, most, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, (m, k), generator=generator)


def close(y, expected, dtype):
    error = (y.double() - expected).abs()
    assert error.max() <= CLOSE[dtype] * expected.abs().max(), error.max()


SHAPES = st.tuples(
    st.sampled_from((1, 2, 3, 5, 7, 13, 31)), st.sampled_from((1, 15, 16, 17, 40)), st.booleans()
)


@calm
@given(SHAPES, st.integers(1, 3), st.sampled_from((32, 64, 96)), st.sampled_from((4, 8)))
def test_every_path_is_the_formula(shape, groups, group, bits):
    m, n, symmetric = shape
    spec = Int(bits, Tile(1, group), symmetric=symmetric)
    leaf = random_leaf(n, group * groups, spec)
    for dtype in CLOSE:
        x = activations(m, leaf.shape[1], dtype)
        expected = kernel.product(x, leaf.codes, leaf.scales, leaf.zeros, group)
        weight = int4_int8.pack("site", leaf, setting(dtype=dtype))
        for path in SUPPORTED:
            close(mm(x, *weight.for_mm(number(path))), expected, dtype)


@each_path
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_sums_inside_of_a_block_are_exact_integers(path, bits, zeros):
    """x of integers up to 127 in every block has scales of 1, so nothing is rounded."""
    m, n, k = 29, 19, 83
    x = integers(m, k, 127)
    x[:, ::32] = 127
    q = integers(n, k, 2 ** (bits - 1) - 1, seed=1).to(torch.int8)
    q[0], q[1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    z = integers(n, 1, 2 ** (bits - 1) - 1, seed=2).to(torch.int8) if zeros else None
    y = mm(x.float(), *of_ones(q, bits, z), number(path))
    exact = x @ (q.long() if z is None else q.long() - z.long()).mT
    assert torch.equal(y.long(), exact)


FUSED = [path for path in SUPPORTED if path in ("avx512_vnni", "amx")]


@pytest.mark.skipif(len(FUSED) < 2, reason="the processor has no AMX")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_tiles_of_tokens_have_the_bits_of_single_ones(bits, group, symmetric):
    """AMX takes 16 tokens or more and VNNI the rest, so a token's result is that of either."""
    leaf = random_leaf(40, 1152, Int(bits, Tile(1, group), symmetric=symmetric))
    weight = int4_int8.pack("site", leaf, setting(dtype=torch.float32))
    x = activations(290, 1152, torch.float32)
    alone = torch.cat([mm(row, *weight.for_mm()) for row in x.split(1)])
    for m in (15, 16, 17, 31, 47, 48, 63, 64, 65, 111, 127, 128, 129, 145, 290):
        for path in FUSED:
            assert torch.equal(mm(x[:m], *weight.for_mm(number(path))), alone[:m])


@each_path
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("a", [-127, 127])
@pytest.mark.parametrize("end", ["least", "most"])
def test_no_sum_of_extreme_codes_saturates(path, bits, a, end):
    code = -(2 ** (bits - 1)) if end == "least" else 2 ** (bits - 1) - 1
    q = torch.full((16, 64), code, dtype=torch.int8)
    for m in (1, 4, 12, 16):
        y = mm(torch.full((m, 64), float(a)), *of_ones(q, bits), number(path))
        assert (y == 64 * code * a).all()


@each_path
def test_zero_tokens_rows_and_blocks(path):
    q = integers(5, 64, 7).to(torch.int8)
    q[3] = 0
    weight = of_ones(q, 4)
    assert mm(torch.ones(0, 64), *weight, number(path)).shape == (0, 5)
    x = torch.randn(6, 64)
    x[2], x[4, :32], x[4, 32:] = 0, 1e-31, 1
    y = mm(x, *weight, number(path))
    assert (y[2] == 0).all() and (y[:, 3] == 0).all()
    assert torch.equal(y[4].long(), q[:, 32:].long().sum(1))


@each_path
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", list(CLOSE))
def test_what_is_not_finite_makes_its_own_token_nan(path, value, dtype):
    weight = of_ones(integers(20, 64, 7).to(torch.int8), 4)
    x = activations(5, 64, dtype)
    clean = mm(x, *weight, number(path))
    x[3, 40] = value
    y = mm(x, *weight, number(path))
    assert y[3].isnan().all()
    assert torch.equal(y[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


@pytest.mark.parametrize("m", [1, 5, 200])
def test_any_number_of_threads_gives_the_same_bits(m):
    leaf = random_leaf(300, 512, Int(4, Tile(1, 64)))
    weight, x = int4_int8.pack("site", leaf, setting()), activations(m, 512, torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(mm(x, *weight.for_mm()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_kernel_runs_in_the_threads_of_torch():
    leaf = random_leaf(512, 512, Int(4, Tile(1, 64)))
    weight, x = int4_int8.pack("site", leaf, setting()), activations(64, 512, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.randn(1000, 1000).exp()  # torch's own threads are there
        threads = set(os.listdir("/proc/self/task"))
        mm(x, *weight.for_mm())
        assert set(os.listdir("/proc/self/task")) <= threads
    finally:
        torch.set_num_threads(before)


def test_tokens_of_any_strides():
    leaf = random_leaf(24, 96, Int(4, Tile(1, 32)))
    weight, x = int4_int8.pack("site", leaf, setting()), activations(7, 200, torch.float16)
    for view in (x[:, 3:99], x.mT.contiguous().mT[:, :96], x[::2, :96], x[:1, :96].expand(4, 96)):
        assert torch.equal(mm(view, *weight.for_mm()), mm(view.contiguous(), *weight.for_mm()))


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_lose_nothing(scale_dtype):
    leaf = random_leaf(17, 64, Int(4, Tile(1, 32)), scale_dtype=scale_dtype)
    weight = int4_int8.pack("site", leaf, setting(dtype=torch.float32))
    assert weight.scales.dtype == scale_dtype
    assert torch.equal(kernels.INT4_INT8.dequantized(weight), dense(leaf, torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("tile", [Tile(1, 32), Tile(2, 64), Tile(1, None)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_hold_the_weight_of_every_grid(bits, tile, symmetric):
    leaf = random_leaf(34, 192 if tile.cols else 70, Int(bits, tile, symmetric=symmetric))
    module = QLinear("site", leaf, None, torch.float32, CPU, False, activations="int8")
    assert module.kernel is kernels.INT4_INT8 and module.inputs is None
    assert torch.equal(module.dequantized(), dense(leaf, torch.float32))
    x = activations(3, leaf.shape[1], torch.float32)
    rounded = (kernel.rounded(x)[0] * kernel.rounded(x)[1][..., None]).flatten(1)
    expected = rounded[:, : leaf.shape[1]].double() @ dense(leaf, torch.float64).mT
    close(module(x), expected, torch.float32)


def test_the_gradient_by_x_is_that_of_the_dequantized_weight():
    leaf = random_leaf(20, 64, Int(4, Tile(1, 32), symmetric=False))
    module = QLinear("site", leaf, None, torch.float32, CPU, False, activations="int8")
    x, g = activations(3, 64, torch.float32).requires_grad_(), activations(3, 20, torch.float32)
    with torch.enable_grad():
        module(x).backward(g)
    torch.testing.assert_close(x.grad, g @ dense(leaf, torch.float32))


OF_ROW = [0, 0, 0, 2, 3, 3, 3, 3, 3]  # the expert of every row


@pytest.mark.parametrize("symmetric", [True, False])
def test_experts_multiply_their_own_rows(symmetric):
    e, n, k = 4, 18, 64
    spec = Int(4, Tile(1, 32), symmetric=symmetric)
    one = random_leaf(e * n, k, spec)
    leaf = one.__class__(
        one.codes.view(e, n, k),
        one.scales.view(e, n, -1),
        None if symmetric else one.zeros.view(e, n, -1),
        spec,
    )
    module = QExperts("site", leaf, torch.float32, CPU, False, activations="int8")
    assert module.kernel is kernels.INT4_INT8
    x, ends = activations(9, k, torch.float32).requires_grad_(), torch.tensor([3, 3, 4, 9])
    with torch.enable_grad():
        y = module(x, None, ends)
        y.sum().backward()
    torch.testing.assert_close(x.grad, dense(leaf, torch.float32).sum(1)[OF_ROW])
    assert torch.equal(module.dequantized(), dense(leaf, torch.float32))
    for row, expert in enumerate(OF_ROW):
        part = int4_int8.expert(leaf, expert)
        single = QLinear("site", part, None, torch.float32, CPU, False, activations="int8")
        assert torch.equal(y[row], single(x[row : row + 1])[0])


def test_channels_in_another_order():
    spec = Int(4, Tile(1, 32))
    plain = random_leaf(16, 64, spec)
    perm = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    leaf = plain.__class__(plain.codes, plain.scales, None, spec, None, perm)
    module = QLinear("site", leaf, None, torch.float32, CPU, False, activations="int8")
    x = activations(3, 64, torch.float32)
    assert torch.equal(module.dequantized(), dense(leaf, torch.float32))
    expected = kernel.product(x[:, perm], leaf.codes, leaf.scales, None, 32)
    close(module(x), expected, torch.float32)


def test_a_compiled_graph_has_one_node_and_the_same_bits():
    leaf = random_leaf(48, 96, Int(4, Tile(1, 32)))
    bias = torch.randn(48)
    module = QLinear("site", leaf, bias, torch.bfloat16, CPU, False, activations="int8")
    x, seen = activations(3, 96, torch.bfloat16), []

    def look(graph):
        seen.extend(node for node in graph.nodes if "int4_int8" in str(node.target))

    options = inductor_options(**FROM_CPP, post_grad_custom_post_pass=look)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True, options=options)(x), module(x))
    assert [str(node.target) for node in seen] == ["qlab.int4_int8_forward.default"]


def test_torch_accepts_the_operators():
    leaf = random_leaf(16, 64, Int(4, Tile(1, 32)))
    weight = int4_int8.pack("site", leaf, setting())
    x = activations(3, 64, torch.bfloat16).requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(mm.default, (x, *weight.for_mm()), test_utils=tests)


# ---------------------------------------------------------------- the row
def test_the_row_is_for_those_who_ask_and_says_what_it_does_not_take():
    leaf = random_leaf(16, 64, Int(4, Tile(1, 32)))
    assert choose(leaf, setting()).kernel is kernels.INT4_INT8
    assert choose(leaf, setting(activations=None)).kernel is kernels.INT4
    for refused, why in (
        (random_leaf(16, 96, Int(4, Tile(1, 48))), "groups of 48 are no multiple of 32 channels"),
        (random_leaf(16, 64, Int(4, Tile(3, 32))), "blocks of 3x32 do not divide it"),
    ):
        reasons = dict(choose(refused, setting()).passed)
        assert reasons["int4_int8"] == why


def test_zero_points_that_are_no_integers_are_left_to_others():
    leaf = random_leaf(16, 64, Int(4, Tile(1, 32), symmetric=False))
    leaf = leaf.__class__(leaf.codes, leaf.scales, leaf.zeros.float() + 0.5, leaf.spec)
    assert "zero points are no integers" in dict(choose(leaf, setting()).passed)["int4_int8"]


def test_a_lowered_model_computes_nearly_what_it_did(saved, tmp_path):
    qlab.quantize(saved("llama"), qlab.rtn("int4-g32"), None, tmp_path / "q")
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    exact, fast = (
        qlab.lower(tmp_path / "q", dtype=torch.float32, activations=activations)
        for activations in (None, "int8")
    )
    rows = {module.kernel.name for module in fast.modules() if isinstance(module, QLinear)}
    assert rows == {"int4_int8"}
    with torch.no_grad():
        difference = (exact(ids).logits - fast(ids).logits).norm() / exact(ids).logits.norm()
    assert 0 < difference < 0.02


NO_COMPILER = """
import sys, warnings, torch, qlab
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = qlab.lower(sys.argv[1], activations="int8")
said = [str(one.message) for one in said if "activations" in str(one.message) or "kernel" in str(one.message)]
print(len(said), {m.kernel.name for m in model.modules() if hasattr(m, "kernel")}, *said)
"""  # noqa: E501


def test_without_a_compiler_one_warning_and_the_kernels_of_before(saved, tmp_path, monkeypatch):
    qlab.quantize(saved("llama"), qlab.rtn("int4-g32"), None, tmp_path / "q")
    for name, value in (("PATH", ""), ("QLAB_CACHE_DIR", str(tmp_path)), ("CXX", "")):
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", NO_COMPILER, str(tmp_path / "q")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out.startswith("1 {'int4'} weights are multiplied by 'int4', a slower kernel")
    assert "no C++ compiler here; install g++" in out


def test_a_model_in_a_process_without_the_kernel_is_refused_by_name(monkeypatch):
    def failing():
        raise Uncompiled("no compiler")

    monkeypatch.setattr(kernel, "best_path", failing)
    with pytest.raises(QlabError, match="cannot run here: no compiler; lower it without"):
        int4_int8._load(CPU)
    with pytest.raises(QlabError, match="for a CPU got x on meta"):
        int4_int8._load(torch.device("meta"))
