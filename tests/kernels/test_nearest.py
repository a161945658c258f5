"""Rounding to nearest by the compiled kernel is torch's, bit for bit, on every path; what it does
not round is left to torch."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qlab
from qlab.algebra import bits, compiled, nearest
from qlab.algebra.graph import lone_weight
from qlab.algebra.measured import AT_ONCE, _errors_of, errors_of, errors_of_sums, joined_errors
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Tile, parse_spec, with_scale_dtype
from qlab.driver.solve import solve_alone
from qlab.methods.grid import encode, minmax, mse
from qlab_kernels import nearest as kernel
from qlab_kernels.buffers import reused

pytestmark = pytest.mark.processor

if kernel.why_not():
    pytest.skip(f"the kernel is not compiled here: {kernel.why_not()}", allow_module_level=True)

BF16 = torch.bfloat16
each_path = pytest.mark.parametrize("path", kernel.supported())
dtypes = st.sampled_from(kernel.DTYPES)
# what weights are multiplied by: small ones are subnormal, or have scales that are
sizes = st.sampled_from([1e-42, 1e-30, 1e-6, 1.0, 300.0])


@pytest.fixture
def worth_it(monkeypatch):
    """The kernel is loaded, as if many weights were rounded."""
    monkeypatch.setattr(compiled, "_demand", compiled._Demand())
    compiled.expect(compiled.MANY)


@st.composite
def weights(draw):
    """A weight, with rows of zeros, of one sign and of numbers between codes, and the spec of its
    grid."""
    group, groups = draw(st.sampled_from([(1, 5), (3, 4), (24, 2), (32, 1), (128, 2)]))
    rows, channel = draw(st.integers(1, 6)), draw(st.booleans())
    drawn = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    W_ok = torch.randn(rows, group * groups, generator=drawn, dtype=torch.float32)
    kind_o = torch.randint(0, 4, (rows, 1), generator=drawn, dtype=torch.int64)
    W_ok = torch.where(kind_o == 1, W_ok.abs(), W_ok) * (kind_o != 2)
    W_ok = torch.where(kind_o == 3, (2 * W_ok).round() / 2, W_ok)
    tile = Tile(1, None if channel else group)
    symmetric, scale = draw(st.booleans()), draw(dtypes)
    spec = Int(draw(st.integers(1, 8)), tile, symmetric, scale_dtype=scale)
    return (W_ok * draw(sizes)).to(draw(dtypes)), spec


def rounded(W_ok, spec, path="best", rows=4):
    return kernel.round_weight(
        W_ok,
        bits=spec.bits,
        group=spec.tile.cols or W_ok.shape[1],
        symmetric=spec.symmetric,
        scale_dtype=spec.scale_dtype,
        rows=rows,
        path=path,
    )


def same_bits(a, b):
    """Whether two tensors are one, NaNs and signs of zeros too."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@each_path
@given(weights())
def test_codes_scales_and_zeros_are_those_of_minmax(path, weight):
    W_ok, spec = weight
    made, expected = rounded(W_ok, spec, path), encode(minmax, W_ok.float(), spec)
    assert made is not None
    for part in ("codes", "scales", "zeros"):
        assert same_bits(getattr(made, part), getattr(expected, part)), part


@given(weights())
def test_errors_are_those_of_torch(weight):
    """Of the weight that was rounded, and of another one to which the codes do not belong."""
    W_ok, spec = weight
    for path in kernel.supported():
        made = rounded(W_ok, spec, path)
        leaf = QTensor(made.codes, made.scales, made.zeros, spec)
        for V_ok, sums in ((W_ok, made.sums), (W_ok.flip(0), None)):
            if sums is None:
                assert kernel.measures(made.codes, made.scales, made.zeros)
                sums = kernel.measure(V_ok, made.codes, made.scales, made.zeros, 4, path)
            parts = [
                _errors_of(V_ok[rows].float(), leaf.rows(rows, tiles), None)
                for rows, tiles in spec.tile.parts(leaf.shape, 4 * W_ok.shape[1])
            ]
            assert errors_of_sums(sums) == joined_errors(parts)


def test_a_scale_of_zero_is_left_to_torch(worth_it):
    spec = with_scale_dtype(parse_spec("int4-g8"), BF16)
    codes, scales = torch.ones(2, 8, dtype=torch.int8), torch.zeros(2, 1, dtype=BF16)
    W_ok = torch.ones(2, 8, dtype=BF16)
    assert kernel.measure(W_ok, codes, scales, None, 2) is None
    errors = errors_of(W_ok, QTensor(codes, scales, None, spec), None)
    assert errors.D == errors.W == 4.0


@pytest.mark.parametrize("spec", ["int4-g128", "int8-channel-asym"])
def test_a_weight_in_several_parts_has_the_errors_of_torch(worth_it, spec, monkeypatch):
    spec = with_scale_dtype(parse_spec(spec), BF16)
    drawn = torch.Generator().manual_seed(0)
    W_ok = torch.randn(AT_ONCE // 256 + 3, 256, generator=drawn, dtype=torch.float32).to(BF16)
    recipe = qlab.rtn(spec)
    by_kernel = solve_alone(lone_weight("w", W_ok), recipe)
    monkeypatch.setattr(compiled, "_demand", compiled._Demand())
    by_torch = solve_alone(lone_weight("w", W_ok), recipe)
    assert by_kernel.notes == by_torch.notes and by_kernel.notes["w"]["weight_error"] > 0
    for part in ("codes", "scales", "zeros"):
        ours, theirs = (getattr(g.params["weight"], part) for g in (by_kernel, by_torch))
        assert same_bits(ours, theirs), part


@each_path
@pytest.mark.parametrize("spec", ["int4-g16", "int8-g16-asym"])
def test_many_groups_and_many_threads_give_the_same(path, spec):
    """More groups in a row than are fitted at once, more parts than threads."""
    spec = with_scale_dtype(parse_spec(spec), BF16)
    drawn = torch.Generator().manual_seed(0)
    W_ok = torch.randn(37, 16 * 40, generator=drawn, dtype=torch.float32).to(BF16)
    expected, before, made = encode(minmax, W_ok.float(), spec), torch.get_num_threads(), {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made[threads] = rounded(W_ok, spec, path)
            sums = kernel.measure(W_ok, expected.codes, expected.scales, expected.zeros, 4, path)
            assert torch.equal(sums, made[threads].sums)
    finally:
        torch.set_num_threads(before)
    for part in ("codes", "scales", "zeros"):
        each = [getattr(one, part) for one in (*made.values(), expected)]
        assert same_bits(each[0], each[1]) and same_bits(each[0], each[2])
    assert torch.equal(made[1].sums, made[3].sums)


def test_outputs_take_the_memory_of_earlier_ones_while_somebody_asks_for_it():
    codes = torch.zeros((1 << 11, 1 << 11), dtype=torch.int8)
    with reused():
        with reused():
            place = kernel.pack(codes, 4).data_ptr()
        words = kernel.pack(codes, 4)
        assert words.data_ptr() == place
        assert kernel.pack(codes, 4).data_ptr() != place  # `words` is left
        assert kernel.unpack(words, 4).equal(codes)


def test_behind_a_mask_zeros_stay_and_the_kernel_is_not_asked(worth_it, monkeypatch):
    """Errors are from the weights that were left."""
    drawn = torch.Generator().manual_seed(0)
    weight = lone_weight("w", torch.randn(8, 32, generator=drawn, dtype=torch.float32))
    recipe = qlab.method("magnitude-2:4+rtn", "int4-g8-asym")
    with_kernel = solve_alone(weight, recipe)
    monkeypatch.setattr(compiled, "_demand", compiled._Demand())
    without = solve_alone(weight, recipe)
    assert with_kernel.notes == without.notes
    assert same_bits(with_kernel.params["weight"].codes, without.params["weight"].codes)
    assert int((qlab.dense(with_kernel.params["weight"]) == 0).sum()) >= 8 * 32 // 2


@each_path
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_numbers_that_are_not_finite_are_left_to_torch(path, bad, dtype):
    for at in (0, 31, 70):
        W_ok = torch.ones(2, 40, dtype=dtype)
        W_ok.view(-1)[at] = bad
        for spec in (Int(4, Tile(1, 8), scale_dtype=BF16), Int(4, Tile(1, 8), False, BF16)):
            assert rounded(W_ok, spec, path) is None


def test_what_overflows_is_left_to_torch():
    W_ok = torch.full((1, 8), 1e6, dtype=torch.float32)
    assert rounded(W_ok, Int(2, Tile(1, 8), scale_dtype=torch.float16)) is None  # its scale
    W_ok = torch.tensor([[3e38, -3e38]], dtype=torch.float32)
    assert rounded(W_ok, Int(4, Tile(1, 2), False, torch.float32)) is None  # its range


@pytest.mark.parametrize(
    "spec", ["fp8-channel", "int4-b2x2", "int8-tensor", "int4-g3"], ids=lambda spec: spec
)
def test_other_grids_are_left_to_torch(worth_it, spec):
    W_ok = torch.ones(4, 8, dtype=BF16)
    assert nearest.round_weight(W_ok, with_scale_dtype(parse_spec(spec), BF16)) is None


def test_a_weight_that_lies_otherwise_is_left_to_torch(worth_it):
    spec = with_scale_dtype(parse_spec("int4-g8"), BF16)
    W_ok = torch.ones(16, 8, dtype=BF16)
    for other in (W_ok.mT, W_ok.double(), W_ok[0]):
        assert nearest.round_weight(other, spec) is None
    assert nearest.round_weight(W_ok[::2], spec) is not None


@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_a_nan_is_refused_by_name_with_the_kernel_too(worth_it, name):
    W_ok = torch.ones(4, 8, dtype=BF16)
    W_ok[1, 2] = torch.nan
    recipe = qlab.rtn("int4-g8", {"minmax": minmax, "mse": mse}[name])
    with pytest.raises(qlab.QlabError, match=r"w\.weight holds NaN or Inf"):
        solve_alone(lone_weight("w", W_ok), recipe)


@each_path
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**16))
def test_packed_codes_are_the_streams_of_torch(path, width, rows, octets, seed):
    drawn, half = torch.Generator().manual_seed(seed), 2 ** (width - 1)
    shape = (rows, 8 * octets)
    codes = torch.randint(-half, half, shape, generator=drawn, dtype=torch.int8)
    words = kernel.pack(codes, width, path)
    assert kernel.packs(codes, width) and kernel.unpacks(words, width)
    assert same_bits(words, bits.pack(bits.unsigned(codes, width), width))
    assert same_bits(kernel.unpack(words, width, path), codes)


@given(st.integers(1, 8), st.integers(1, 70))
def test_streams_are_the_same_with_and_without_the_kernel(worth_it, width, k):
    drawn, half = torch.Generator().manual_seed(k), 2 ** (width - 1)
    codes = torch.randint(-half, half, (3, k), generator=drawn, dtype=torch.int8)
    words = bits.pack_signed(codes, width)
    assert same_bits(words, bits.pack(bits.unsigned(codes, width), width))
    assert same_bits(bits.unpack_signed(words, width, k), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_words_and_codes_of_another_dtype_are_left_to_torch(dtype):
    """The kernel would read beyond the end of narrower ones."""
    assert not kernel.unpacks(torch.zeros(1, 8, dtype=dtype), 4)
    assert not kernel.packs(torch.zeros(1, 64, dtype=dtype), 4)


REFUSED = """
import resource
import torch
from qlab_kernels import nearest as kernel

drawn = torch.Generator().manual_seed(0)
W_ok = torch.randn(16, 128, generator=drawn, dtype=torch.float32)
grid = {"bits": 4, "group": 128, "symmetric": True, "scale_dtype": torch.float32, "rows": 1}
torch.set_num_threads(1)
alone = kernel.round_weight(W_ok, **grid)
torch.set_num_threads(8)
pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + (1 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
beside = kernel.round_weight(W_ok, **grid)
for part in ("codes", "scales", "sums"):
    assert torch.equal(getattr(alone, part), getattr(beside, part)), part
"""


@pytest.mark.skipif(sys.platform != "linux", reason="another system bounds memory otherwise")
def test_where_the_system_refuses_threads_fewer_round():
    """No thread's stack fits into the memory that is left."""
    subprocess.run([sys.executable, "-c", REFUSED], check=True)
