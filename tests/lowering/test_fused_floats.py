"""4- and 8-bit floats on a GPU: which weights the row takes and why not others, and its kernels in
Triton's interpreter as the row launches them."""

from dataclasses import replace

import pytest
import torch
from lowering_cases import CPU
from row_cases import Case
from test_coded import leaf_of

from qlab.algebra.spec import Float, Tile, parse_spec
from qlab.errors import QlabError
from qlab.lowering.weights import fused_floats
from qlab.lowering.weights.kernels import choose
from qlab.lowering.weights.setting import Setting

GPU = torch.device("cuda", 0)


def on_gpu(**changes):
    return Setting(**{"dtype": torch.bfloat16, "device": GPU} | changes)


@pytest.fixture
def ampere(monkeypatch):
    """A GPU of capability 8.6, as far as choosing rows asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))


@pytest.mark.parametrize(
    "name", ["nvfp4", "mxfp4", "mxfp8", "fp8-channel", "fp8-tensor", "fp8-b128x128", "fp4-g128"]
)
def test_floats_are_fused_on_a_gpu(ampere, name):
    leaf = leaf_of(parse_spec(name), 256, 256)
    assert choose(leaf, on_gpu()) == (fused_row(), ())
    assert choose(leaf, on_gpu(device=CPU)).kernel is not fused_row()
    assert not fused_floats.meant(leaf, on_gpu(device=CPU))


def fused_row():
    from qlab.lowering.weights.kernels import FUSED_FLOATS

    return FUSED_FLOATS


@pytest.mark.parametrize(
    "spec, dtype, reason",
    [
        (parse_spec("mxfp6"), torch.bfloat16, "no kernel multiplies floats of 6 bits"),
        (parse_spec("fp4-g8"), torch.bfloat16, "not in groups of 8"),
        (parse_spec("fp4-g32"), torch.bfloat16, "more than 3 bits of mantissa"),
        (parse_spec("nvfp4"), torch.float32, "float16 and bfloat16 activations, not with float32"),
    ],
)
def test_what_no_kernel_takes_says_why(ampere, spec, dtype, reason):
    leaf = leaf_of(spec, 64, 96)
    kernel, passed = choose(leaf, on_gpu(dtype=dtype))
    assert kernel.name == "codes" and [one.row for one in passed] == ["fused_floats"]
    assert reason in passed[0].reason


@pytest.mark.parametrize(
    "capability, reason",
    [((7, 5), "Triton compiles no tensor-core product"), ((6, 1), "no kernels for compute")],
)
def test_capabilities_without_tensor_cores_of_triton_say_so(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    leaf = leaf_of(parse_spec("nvfp4"), 64, 96)
    (passed,) = choose(leaf, on_gpu(dtype=torch.float16)).passed
    assert reason in passed.reason


def test_scales_that_bytes_do_not_hold_are_refused_by_the_name_of_the_weight():
    leaf = leaf_of(replace(parse_spec("mxfp4"), scale_dtype=torch.float32), 8, 64)
    far = replace(leaf, scales=torch.tensor([[1.0, 2.0**-40]]).expand(8, 2))
    with pytest.raises(QlabError, match=r"layers.7: scales of one row span more than 2\^28"):
        fused_floats.pack("layers.7", far, on_gpu(device=CPU))


INTERPRETED = """
import torch
from test_row_laws import check, rounded
from row_cases import Case
from qlab.algebra.experts import rows_of
from qlab.lowering.weights import fused_floats
from qlab.lowering.weights.int4 import expert
from lowering_cases import activations
torch.cuda.get_device_name = lambda device=None: "a GPU"
DENSE = fused_floats.dense_product
def refused(*_): raise AssertionError("a dense product")
fused_floats.dense_product = refused
ends, kinds = torch.tensor([2, 2, 7]), set()
from qlab_kernels import cache
lookup = cache.lookup
cache.lookup = lambda p: (found := lookup(p), kinds.add((p.op, found.config.kind)))[0]
for capability, layout in (((9, 0), "wgmma"), ((8, 6), "mma2")):
    torch.cuda.get_device_capability = lambda device=None: capability
    fused_floats.ON_CPU = layout
    for case in CASES:
        for dtype in case.dtypes:
            setting, leaf, several = case.setting(dtype), case.leaf(), case.experts(3)
            weight = fused_floats.pack("site", leaf, setting)
            experts = fused_floats.pack("site", several, setting)
            x = activations(7, case.k, dtype)
            y = fused_floats.launched_mm(x, fused_floats._packed(*weight[:3], *weight[4:7], weight.layout))
            check(y, x.double(), leaf)
            packed = fused_floats._packed(*experts[:3], *experts[4:7], experts.layout)
            y = fused_floats.launched_grouped_mm(x, packed, ends)
            for e, rows in enumerate(rows_of(ends)):
                check(y[rows], x[rows].double(), expert(several, e))
            assert fused_floats.launched_grouped_mm(x[:0], packed, 0 * ends).shape == (0, case.few)
            assert fused_floats.launched_mm(x[:0], packed).shape == (0, case.few)
assert {op for op, _ in kinds} == {"float4_mm", "float8_mm", "float4_grouped_mm", "float8_grouped_mm"}, kinds
"""  # noqa: E501


def test_the_cache_chooses_and_the_kernels_multiply(interpreted):
    """Every format as the row packs and launches it, on shapes that divide nothing, without a dense
    product."""
    cases = [
        Case("fused_floats", "nvfp4", dtypes=(torch.float16,)),
        Case("fused_floats", "mxfp4", dtypes=(torch.bfloat16,)),
        Case("fused_floats", "mxfp8", dtypes=(torch.float16,)),
        Case("fused_floats", "fp8-b64x64", k=192, dtypes=(torch.bfloat16,)),
        Case("fused_floats", "fp8-tensor", dtypes=(torch.float16,)),
    ]
    interpreted(INTERPRETED.replace("CASES", repr(cases)))


def test_a_last_group_that_is_not_full_is_multiplied():
    """Files of other writers may have groups that do not divide the channels."""
    case = Case("fused_floats", "mxfp4", k=80)
    spec = Float(2, 1, Tile(1, 32), torch.float8_e8m0fnu)
    wide = leaf_of(spec, 24, 96)
    leaf = replace(wide, codes=wide.codes[:, :80].contiguous())
    x = torch.eye(80, dtype=torch.bfloat16)
    y = case.linear(leaf)(x)
    assert torch.equal(y.mT, leaf.dense(torch.bfloat16))
