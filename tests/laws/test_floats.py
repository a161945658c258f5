"""Floats: the numbers of compressed-tensors' own quantizer bit for bit, error bounds, projections,
equivariance."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st
from segments import correlated, segment
from weights import KINDS, weight

from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import dense, round_codes, steps
from qlab.algebra.spec import NAMED, Float, Tile, parse_spec
from qlab.algebra.stats import Moment
from qlab.errors import QlabError
from qlab.methods.awq import awq
from qlab.methods.gptq import gptq
from qlab.methods.grid import GRIDS
from qlab.methods.rtn import rtn

TEXTS = ("fp8-tensor", "fp8-channel", "fp8-g16", "fp8-b8x16", *NAMED)
specs = pytest.mark.parametrize("text", TEXTS)


def bits(x):
    return x.view(torch.uint8) if x.itemsize == 1 else x


@st.composite
def problems(draw, kinds=KINDS):
    """A weight of any magnitude; blocks of 8x16 need not divide it."""
    o, k = draw(st.integers(1, 20)), 32 * draw(st.integers(1, 4))
    W = weight(o, k, draw(st.integers(0, 999)), draw(st.sampled_from(kinds)))
    return W * 2.0 ** draw(st.integers(-30, 30))


def library_args(spec):
    """The QuantizationArgs that mean the spec."""
    strategy = {(None, None): "tensor", (1, None): "channel"}.get(
        (spec.tile.rows, spec.tile.cols), "group"
    )
    more = {"strategy": strategy}
    if spec.tile.rows not in (None, 1):
        more = {"strategy": "block", "block_structure": [spec.tile.rows, spec.tile.cols]}
    elif strategy == "group":
        more |= {
            "strategy": "tensor_group" if spec.outer else "group",
            "group_size": spec.tile.cols,
        }
    if spec.scale_dtype is not None and spec.scale_dtype.itemsize == 1:
        more["scale_dtype"] = torch.float8_e4m3fn if spec.outer else torch.uint8
    return QuantizationArgs(num_bits=spec.bits, type="float", symmetric=True, **more)


@specs
@given(W=problems())
def test_scales_and_codes_are_the_librarys_bit_for_bit(text, W):
    spec, q = parse_spec(text), encode(minmax, W, parse_spec(text))
    args, x = library_args(spec), spec.tile.split(W)
    outer = generate_gparam(W.min(), W.max()) if spec.outer else None
    scales, zeros = calculate_qparams(x.amin(-1), x.amax(-1), args, outer)
    assert (q.outer is None) == (outer is None) and (outer is None or torch.equal(q.outer, outer))
    assert torch.equal(q.scales.float(), scales)
    flat = (scales.flatten(), zeros.flatten()) if args.strategy == "tensor" else (scales, zeros)
    assert torch.equal(
        bits(q.codes), bits(quantize(W, *flat, args, global_scale=outer).to(torch.float8_e4m3fn))
    )
    assert torch.equal(dense(q, torch.float32), fake_quantize(W, *flat, args, global_scale=outer))


@specs
@given(W=problems())
def test_projecting_onto_a_fixed_grid_is_idempotent(text, W):
    q = encode(minmax, W, parse_spec(text))
    again = round_codes(dense(q, torch.float32), q.scales, None, q.spec, q.outer)
    assert torch.equal(again.float(), q.codes.float())


@specs
@given(W=problems(kinds=("normal", "outlier", "offset")), j=st.integers(-12, 12))
def test_powers_of_two_scale_the_weight_and_leave_codes(text, W, j):
    ours, scaled = (encode(minmax, w, parse_spec(text)) for w in (W, W * 2.0**j))
    assert torch.equal(ours.codes.float(), scaled.codes.float())
    assert torch.equal(dense(ours, torch.float32) * 2.0**j, dense(scaled, torch.float32))


@specs
@given(W=problems())
def test_errors_are_half_a_step_of_the_mantissa_or_the_smallest_step(text, W):
    """|w - w'| <= 2^-(m+1) |w| for normals and half the subnormal step below them; MX and NVFP4
    saturate above max."""
    q = encode(minmax, W, parse_spec(text))
    s = steps(q.scales, q.outer, torch.float32)[..., None].expand_as(q.spec.tile.split(W))
    s = q.spec.tile.join(s.contiguous(), W.shape)
    m, smallest = q.spec.mantissa, 2.0 ** (1 - (2 ** (q.spec.exponent - 1) - 1) - q.spec.mantissa)
    bound = torch.maximum(W.abs() * 2.0 ** -(m + 1), s * smallest / 2)
    above = (W.abs() - q.spec.max * s).clamp_min(0)
    assert ((dense(q, torch.float32) - W).abs() <= torch.maximum(bound, above) * (1 + 1e-5)).all()
    if q.spec.scale_dtype is None:  # a scale of its own dtype saturates nothing
        assert (above <= W.abs() * 1e-6).all()


@pytest.mark.parametrize(
    "text, values",
    [
        ("mxfp4", (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -9.0)),
        (
            "mxfp6",
            (0.0625, 0.1875, 1.9375, 2.125, 2.375, 4.25, 7.75, -0.0625, -0.1875, -2.125, -9.0),
        ),
    ],
)
def test_ties_go_to_the_even_code_and_what_is_too_large_saturates(text, values):
    expected = {
        "mxfp4": (0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -6),
        "mxfp6": (0, 0.25, 2, 2, 2.5, 4, 7.5, -0.0, -0.25, -2, -7.5),
    }
    rounded = parse_spec(text).nearest_(torch.tensor(values))
    assert torch.equal(rounded, torch.tensor(expected[text])) and rounded.signbit().tolist() == [
        v < 0 for v in values
    ]


@pytest.mark.parametrize(
    "text, absmax, exponent",
    [
        ("mxfp4", 6.0, 127),
        ("mxfp4", 6.99, 127),
        ("mxfp4", 7.0, 128),
        ("mxfp4", 0.0, 0),
        ("mxfp4", 1e-39, 0),
        ("mxfp6", 7.5, 127),
        ("mxfp6", 7.74, 127),
        ("mxfp6", 7.75, 128),
        ("mxfp8", 447.0, 127),
        ("mxfp8", 448.0, 128),
        ("mxfp4", 3.4e38, 253),
    ],
)
def test_powers_of_two_go_up_where_the_largest_code_would_saturate(text, absmax, exponent):
    q = encode(minmax, torch.full((1, 32), absmax), parse_spec(text))
    assert q.scales.view(torch.uint8).item() == exponent


GOLDEN = [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6, 0.25]


def test_the_golden_row():
    mx = encode(minmax, torch.tensor([GOLDEN * 2]), NAMED["mxfp4"])
    nv = encode(minmax, torch.tensor([GOLDEN]), NAMED["nvfp4"])
    assert mx.scales.view(torch.uint8).tolist() == [[0x7F]] and nv.scales.view(
        torch.uint8
    ).tolist() == [[0x7E]]
    assert nv.outer.tolist() == [448.0]
    assert mx.codes.float()[0, :16].tolist() == nv.codes.float()[0].tolist() == [*GOLDEN[:-1], 0]


@specs
@pytest.mark.parametrize(
    "grid", [g for g in GRIDS.values() if g.name != "signed"], ids=lambda g: g.name
)
def test_no_tile_is_worse_than_under_minmax(text, grid):
    spec, W, x = parse_spec(text), weight(12, 64, 1), correlated(32, 64, 2)
    H = x.T @ x / 32
    h = H.diagonal() if grid.weighted else torch.ones(64)
    error = lambda q: spec.tile.split(h * (dense(q, torch.float32) - W).square()).sum(-1)
    assert (
        error(encode(grid, W, spec, H.diagonal()))
        <= error(encode(minmax, W, spec)) * (1 + 1e-5) + 1e-9
    ).all()


def white(seg):
    """Second moments of inputs that have no direction."""
    sizes = {site.source: seg.graph.weight_ok(site).shape[1] for site in seg.graph.sites}
    return {(source, "second_moment"): Moment(8 * torch.eye(k), 8) for source, k in sizes.items()}


@specs
def test_gptq_on_white_inputs_gives_rtns_codes(text):
    seg, spec = segment("llama"), parse_spec(text)
    ours, _ = gptq(spec, minmax, sweeps=0)[0].apply(seg.graph, white(seg))
    theirs, _ = rtn(spec)[0].apply(seg.graph, {})
    for site in seg.graph.sites:
        a, b = ours.params[site.weight], theirs.params[site.weight]
        assert torch.equal(bits(a.scales), bits(b.scales)) and torch.equal(
            a.codes.float(), b.codes.float()
        )


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4", "fp8-channel", "fp8-b48x48"])
def test_gptq_and_its_sweeps_beat_rounding_on_what_they_minimize(text):
    seg, spec = segment("llama"), parse_spec(text)
    losses = [
        seg.solve(t)[0].notes
        for t in (rtn(spec, GRIDS["weighted"]), gptq(spec, sweeps=0), gptq(spec))
    ]
    rounded, solved, swept = (sum(note["loss"] for note in notes.values()) for notes in losses)
    assert swept <= solved < rounded


def test_nvfp4_has_one_global_scale_per_input():
    seg = segment("llama")
    for method in (rtn(NAMED["nvfp4"]), awq(NAMED["nvfp4"])):
        graph, _ = seg.solve(method)
        outers = {}
        for site in graph.sites:
            outers.setdefault(site.source, set()).add(graph.params[site.weight].outer.item())
        assert [len(scales) for scales in outers.values()] == [1] * len(outers) and len(outers) == 4


@specs
def test_names_are_read_as_they_are_written(text):
    assert str(parse_spec(text)) == text


@pytest.mark.parametrize("o, k, shape", [(200, 300, (2, 3)), (128, 256, (1, 2)), (1, 1, (1, 1))])
def test_blocks_at_the_edge_are_filled_up(o, k, shape):
    tile, W = Tile(128, 128), weight(o, k, 0)
    assert tile.scales_shape(W.shape) == shape and torch.equal(tile.join(tile.split(W), W.shape), W)
    q = encode(minmax, W, parse_spec("fp8-b128x128"))
    assert q.scales[-1, -1] == W[128 * (shape[0] - 1) :, 128 * (shape[1] - 1) :].abs().max() / 448


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Float(3, 2, Tile(1, 32)), "e3m2 is not a float qlab knows"),
        (lambda: parse_spec("fp5-channel"), "'fp5-channel' is unknown"),
        (lambda: parse_spec("fp8-channel-asym"), "'fp8-channel-asym' is unknown"),
        (lambda: parse_spec("nvfp4", symmetric=False), "'nvfp4' has no zero point"),
        (lambda: parse_spec("fp8-channel", symmetric=False), "'fp8-channel' has no zero point"),
        (lambda: parse_spec("fp8-b0x16"), "groups of 0x16"),
        (
            lambda: encode(minmax, torch.ones(2, 48), NAMED["mxfp4"]),
            "groups of 32 do not divide the 48 input channels",
        ),
        (
            lambda: replace(encode(minmax, torch.ones(2, 32), NAMED["nvfp4"]), outer=None),
            "nvfp4 has one outer scale per weight",
        ),
        (
            lambda: replace(encode(minmax, torch.ones(2, 32), NAMED["mxfp4"]), outer=torch.ones(1)),
            "mxfp4 has no outer scale",
        ),
    ],
)
def test_what_is_no_float_is_refused(make, message):
    with pytest.raises(QlabError, match=message):
        make()
