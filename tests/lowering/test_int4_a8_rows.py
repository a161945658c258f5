"""The rows of int4 weights and activations of 8 bits, which run on GPUs: which weights they take
there, the laws of all rows with Triton interpreted, and the whole on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from lowering_cases import activations, random_leaf
from row_cases import Case
from test_row_laws import TOKENS, check, rounded

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.directories.schemes import first_capability
from qlab.errors import QlabError
from qlab.lowering.tuning import int4_a8 as timed
from qlab.lowering.tuning.shapes import Form
from qlab.lowering.tuning.tune import tune_shapes
from qlab.lowering.weights import int4_a8, kernels
from qlab.lowering.weights.int4 import expert
from qlab.lowering.weights.integers import rounded as codes_of
from qlab.lowering.weights.kernels import choose
from qlab.lowering.weights.setting import Setting
from qlab.methods.schemes import SCHEMES

CASES = [
    Case("int4_int8_cuda", "int4-g32-asym", inputs="int8-channel"),
    Case("int4_int8_cuda", "int3-channel", inputs="int8-tensor"),
    Case("int4_int8_cuda", "int4-b2x96-asym", activations="int8", k=192),
    Case("int4_int8_cuda", "int4-g64", inputs="int4-channel", k=128),
    Case("int4_fp8", "int4-g32-asym", inputs="fp8-channel"),
    Case("int4_fp8", "int2-channel", inputs="fp8-tensor", static=0.01),
]
LAWS = """
import sys
import torch
import test_row_laws as laws
from test_int4_a8_rows import CASES, check_codes
torch.cuda.get_device_name = lambda device=None: "NVIDIA"
capability = tuple(map(int, sys.argv[1].split(".")))
torch.cuda.get_device_capability = lambda device=None: capability
for case in CASES[int(sys.argv[2]) :: 2]:
    check_codes(case)
    laws.test_a_lowered_linear_agrees_with_interpret(case, False)
    for counts in ([0, 0], [1, 0, 20]):
        laws.test_each_row_meets_its_own_expert(case, counts)
    laws.test_leading_dimensions_and_strides_are_kept_and_taken(case)
    laws.test_gradients_by_x_are_those_of_the_dense_weight(case)
    laws.test_the_dense_weight_is_the_leaf(case)
    laws.test_copies_pickles_and_states_multiply_alike(case)
    laws.test_activations_in_another_dtype_are_refused(case)
laws.test_torch_accepts_the_product_and_sees_one_node(CASES[int(sys.argv[2])])
"""


def check_codes(case):
    """The kernel rounds as QuantizeInput does, bit for bit, in the order of the weight's codes."""
    weight = case.linear(case.leaf(shuffled=True)).packed
    x = activations(9, case.k, torch.bfloat16)
    x[4] = 0
    p, t, _ = codes_of(x, None, weight.in_scales, None, weight.spec)
    found = int4_a8.codes(x, weight.perm, weight.in_scales, weight.spec, int4_a8.launched(weight))
    octets = found.p.view(torch.uint8)
    assert torch.equal(octets[:, : case.k], p.view(torch.uint8)[:, weight.perm])
    assert torch.equal(found.t, t) and not octets[:, case.k :].any()


@pytest.mark.parametrize("capability, part", [("9.0", 0), ("8.9", 1)])
def test_the_laws_of_all_rows_hold_in_the_interpreter(capability, part, interpreted):
    interpreted(LAWS, capability, part)


TUNED = """
import torch
from lowering_cases import activations
from qlab.lowering.tuning import int4_a8 as timed, tune as tuning
from qlab.lowering.weights import int4_a8
from qlab_kernels import cache
HERE = torch.device("cpu")
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = timed.device_label = lambda device=None: "NVIDIA H200"
timed.check, timed.copies, timed.copy_rate = lambda *_: None, lambda *_: 2, lambda *_: 1e9

def invented(calls, *_):
    '''The deepest pipeline of the narrowest tile wins.'''
    products.append(calls[0]())
    torch.testing.assert_close(products[-1], products[0], rtol=1e-2, atol=1e-2)
    config = calls[0].args[-1]
    return 1000.0 + config.bn + config.bm - config.stages

timed.microseconds, lookup = invented, cache.lookup
for numbers, experts in (("int8", 0), ("fp8", 3)):
    products, found = [], []
    form, kernel = tuning.Form(64, True, experts), f"int4_{numbers}"
    how = {"dtype": "float16", "kernel": kernel, "budget": 600.0}
    [row] = tuning.tune_shapes([(64, 128)], [20], form, **how)
    assert row["op"] == f"int4_{numbers}{'_grouped' if experts else ''}_mm" and row["timings"] > 4
    cache.lookup = lambda problem: (found.append(lookup(problem)), found[-1])[1]
    weight = timed.weight(kernel, 64, 128, form, torch.float16, HERE, 0)
    x = activations(20, 128, torch.float16)
    if experts:
        int4_a8.grouped_mm(x, weight, None, torch.tensor([2, 2, 20]))
    else:
        int4_a8.mm(x, weight, None, None)
    cache.lookup = lookup
    [one] = found
    assert (one.source, one.stale) == ("user", False), one
    assert one.config.bn == 64 and one.config.bm == 16 and one.config.stages == 5, one
"""


def test_what_is_tuned_is_what_products_look_up(interpreted):
    """The key of the tuner is that of the operators, for linears and for experts; every candidate
    gives the same product."""
    interpreted(TUNED)


def test_what_is_not_tuned_is_refused():
    with pytest.raises(QlabError, match="int4_fp8 has configurations on a GPU alone, not on cpu"):
        tune_shapes([(64, 64)], [1], kernel="int4_fp8")
    with pytest.raises(QlabError, match="groups of 48 do not divide a weight of 64x64"):
        timed.check("int4_int8", [(64, 64)], Form(48), torch.device("cuda"))


# ---------------------------------------------------------------- which weights they take
@pytest.fixture
def gpu_of(monkeypatch):
    def of(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return of


def on_gpu(inputs=None, activations=None):
    rounding = None if inputs is None else QuantizeInput(parse_spec(inputs))
    how = {"inputs": rounding, "activations": activations}
    return Setting(dtype=torch.bfloat16, device=torch.device("cuda", 0), **how)


GROUPED = random_leaf(64, 256, Int(4, Tile(1, 128), symmetric=False))


def test_each_capability_takes_what_its_tensor_cores_multiply(gpu_of):
    int8, fp8 = on_gpu("int8-channel"), on_gpu("fp8-channel")
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
        gpu_of(*capability)
        assert choose(GROUPED, int8) == (kernels.INT4_INT8_CUDA, ())
        kernel, passed = choose(GROUPED, fp8)
        if capability >= (8, 9):
            assert (kernel, passed) == (kernels.INT4_FP8, ())
        else:
            assert kernel is kernels.INT4 and "8.9 is the first" in passed[0].short
    gpu_of(7, 5)
    for setting, row in ((int8, "int4_int8_cuda"), (fp8, "int4_fp8")):
        kernel, passed = choose(GROUPED, setting)
        assert kernel is kernels.INT4 and passed[0].row == row
        assert passed[0].short.startswith(f"not {row}: compute capability 7.5 has no ")
    gpu_of(6, 1)
    assert "no kernels for compute capability 6.1" in choose(GROUPED, int8).passed[0].reason


def test_activations_are_rounded_because_the_user_asks(gpu_of):
    gpu_of(9, 0)
    assert choose(GROUPED, on_gpu()).kernel is kernels.INT4
    assert choose(GROUPED, on_gpu(activations="int8")) == (kernels.INT4_INT8_CUDA, ())
    # the directory's own rounding goes before the user's
    assert choose(GROUPED, on_gpu("fp8-channel", "int8")).kernel is kernels.INT4_FP8


def test_a_cpu_is_told_nothing_of_kernels_for_gpus():
    here = replace(on_gpu("int8-channel"), device=torch.device("cpu"))
    assert {p.row for p in choose(GROUPED, here).passed} & {"int4_int8_cuda", "int4_fp8"} == set()


@pytest.mark.parametrize(
    "leaf, inputs, reason",
    [
        (GROUPED, "int8-g64", "several scales in a token"),
        (GROUPED, "fp8-g128", "several scales in a token"),
        (GROUPED, "int8-channel-asym", "have zero points"),
        (random_leaf(8, 96, Int(4, Tile(1, 48))), "int8-channel", "groups of 48 are no multiple"),
        (random_leaf(6, 64, Int(4, Tile(4, 64))), "int8-channel", "blocks of 4x64 do not divide"),
        (random_leaf(1, 2**17, Int(4, Tile(1, None))), "int8-channel", "do not fit in 32 bits"),
    ],
)
def test_what_is_not_taken_says_why(gpu_of, leaf, inputs, reason):
    gpu_of(9, 0)
    passed = choose(leaf, on_gpu(inputs)).passed
    assert passed[0].row in ("int4_int8_cuda", "int4_fp8") and reason in passed[0].reason


def test_wider_codes_go_to_their_own_rows(gpu_of):
    gpu_of(9, 0)
    leaf = random_leaf(64, 512, Int(5, Tile(1, None)))
    assert choose(leaf, on_gpu("int8-channel")) == (kernels.INT8_INT8, ())


# ---------------------------------------------------------------- on a GPU
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gpu_multiplies_what_the_reference_does(case):
    device, ends = torch.device("cuda", 0), torch.tensor([4, 9], device="cuda")
    leaf, experts = case.leaf(shuffled=True), case.experts(2)
    reason = kernels.kernel_named(case.row).takes(leaf, case.setting(device=device))
    if reason:
        pytest.skip(reason)
    module, several = case.linear(leaf, device=device), case.grouped(experts, device=device)
    for m in TOKENS:
        x = activations(m, case.k, torch.bfloat16)
        check(module(x.to(device)).cpu(), rounded(case, x), leaf)
    x = activations(9, case.k, torch.bfloat16)
    y, all_rounded = several(x.to(device), None, ends).cpu(), rounded(case, x)
    for e, rows in enumerate((slice(0, 4), slice(4, 9))):
        check(y[rows], all_rounded[rows], expert(experts, e))


def test_schemes_name_the_first_capability_that_multiplies_them():
    first = {name: first_capability(SCHEMES[name]) for name in ("W4A8", "W4A4", "W4AFP8", "W8A8")}
    assert first == {"W4A8": (8, 0), "W4A4": (8, 0), "W4AFP8": (8, 9), "W8A8": (7, 5)}
