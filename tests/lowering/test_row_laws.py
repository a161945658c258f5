"""What holds for every row of the table of kernels: products are those of `interpret`, for experts
and shuffled channels too, under gradients, in one node of a program, and in copies and states."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from lowering_cases import activations
from row_cases import LAW_ROWS, LEFT_OUT
from tolerances import PRODUCT, UNIT
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.algebra.experts import rows_of
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.lowering.weights.int4 import expert
from qlab.lowering.weights.kernels import KERNELS, kernel_named

pytestmark = pytest.mark.processor

each_case = pytest.mark.parametrize("case", LAW_ROWS, ids=str)
TOKENS = (0, 1, 3, 33)
# test_schema is left out: it compares no 8-bit floats.
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def rounded(case, x):
    """x as the product sees it: in fp64, on the grid of its rounding."""
    rounding = case.rounding
    if rounding is None and case.activations is not None:
        rounding = QuantizeInput(parse_spec("int8-channel"))
    return x.double() if rounding is None or not len(x) else rounding(x.float()).double()


def check(y, x, leaf, bias=None):
    """y is x @ W.T + b, x in fp64, within the tolerances of y's dtype."""
    W = dense(leaf, torch.float64)
    size = W.abs()
    if leaf.zeros is not None:
        offset = QTensor(
            torch.zeros_like(leaf.codes), leaf.scales, leaf.zeros, leaf.spec, perm=leaf.perm
        )
        size = size + dense(offset, torch.float64).abs()
    expected, scale = x @ W.mT, x.abs() @ size.mT
    if bias is not None:
        expected, scale = expected + bias.double(), scale + bias.double().abs()
    assert y.shape == expected.shape
    worst = ((y.double() - expected).abs() / (scale + 1e-30)).max().item() if y.numel() else 0.0
    assert worst <= PRODUCT[y.dtype] * UNIT[y.dtype], worst


def test_every_row_has_cases():
    rows = {case.row for case in LAW_ROWS} | {"int4_int8"}  # test_int4_int8.py has its laws
    rows |= {"int4_int8_cuda", "int4_fp8"}  # test_int4_a8_rows.py runs these laws on them
    assert rows | LEFT_OUT == {kernel.name for kernel in KERNELS}


@each_case
@pytest.mark.parametrize("dense_cache", [False, True])
def test_a_lowered_linear_agrees_with_interpret(case, dense_cache):
    for dtype in case.dtypes:
        for m in TOKENS:
            leaf = case.leaf(seed=m, shuffled=m == 3)
            bias = activations(1, case.o, dtype, seed=7)[0] if m != 1 else None
            module, x = case.linear(leaf, bias, dtype, dense_cache), activations(m, case.k, dtype)
            y = module(x)
            assert y.dtype == dtype and module.kernel.name == case.row
            check(y, rounded(case, x), leaf, bias)


@each_case
@pytest.mark.parametrize("counts", [[0, 0], [1, 0, 20], [3, 9]])
def test_each_row_meets_its_own_expert(case, counts):
    leaf = case.experts(len(counts), shuffled=len(counts) == 3)
    x, ends = activations(sum(counts), case.k, torch.bfloat16), torch.tensor(counts).cumsum(0)
    bias = activations(len(counts), case.few, torch.bfloat16, seed=7)
    module = case.grouped(leaf)
    y, all_rounded = module(x, bias, ends), rounded(case, x)
    assert y.shape == (sum(counts), case.few) and len(module) == len(counts)
    for e, rows in enumerate(rows_of(ends)):
        check(y[rows], all_rounded[rows], expert(leaf, e), bias[e])


@each_case
def test_leading_dimensions_and_strides_are_kept_and_taken(case):
    module, x = case.linear(case.leaf()), activations(6, 2 * case.k, torch.bfloat16)[:, ::2]
    y = module(x.contiguous())
    assert torch.equal(module(x), y) and torch.equal(module(x.mT.contiguous().mT), y)
    assert torch.equal(module(x.reshape(2, 3, case.k)).view(6, case.o), y)
    assert module(x[:0].reshape(0, 1, case.k)).shape == (0, 1, case.o)


class Called(TorchDispatchMode):
    """The products of qlab that are called, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "qlab" and "round_input" not in str(func):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@each_case
def test_torch_accepts_the_product_and_sees_one_node(case):
    module, x = case.linear(case.leaf()), activations(5, case.k, torch.bfloat16)
    several = case.grouped(case.experts(2))
    for m in (5, 0):
        with Called() as called:
            module(x[:m])
            several(x[:m], None, torch.tensor([min(m, 2), m]))
        for operator, arguments in called.calls[:: len(called.calls) - 1 or 1]:
            torch.library.opcheck(operator, arguments, test_utils=CHECKS)
    # torch.export counts the buffers of an outermost module, those that are None among them
    program = torch.export.export(
        torch.nn.Sequential(module),
        (x,),
        dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=64)},),
    )
    products = [
        node.target
        for node in program.graph.nodes
        if getattr(node.target, "namespace", "") == "qlab" and "round_input" not in str(node.target)
    ]
    assert len(products) == 1
    assert program.module()(x[:3]).shape == (3, case.o)


@each_case
def test_gradients_by_x_are_those_of_the_dense_weight(case):
    module, several = case.linear(case.leaf(shuffled=True)), case.grouped(case.experts(2))
    ends = torch.tensor([4, 9])
    with torch.enable_grad():
        x = activations(9, case.k, torch.bfloat16).requires_grad_()
        g = activations(9, case.o, torch.bfloat16, seed=3)
        (by_x,) = torch.autograd.grad(module(x), x, g)
        (by_x_of_experts,) = torch.autograd.grad(several(x, None, ends), x, g[:, : case.few])
        (expected,) = torch.autograd.grad(F.linear(x, module.dequantized()), x, g)
    W = several.dequantized()
    for_experts = torch.cat([g[rows, : case.few] @ W[e] for e, rows in enumerate(rows_of(ends))])
    for got, right in ((by_x, expected), (by_x_of_experts, for_experts)):
        assert (got.double() - right.double()).norm() <= 0.02 * right.double().norm()


@each_case
def test_the_dense_weight_is_the_leaf(case):
    for leaf, module in (
        (case.leaf(shuffled=True), case.linear(case.leaf(shuffled=True))),
        (case.experts(2, shuffled=True), case.grouped(case.experts(2, shuffled=True))),
    ):
        W, right = module.dequantized(), dense(leaf, torch.float64)
        assert W.dtype == torch.bfloat16 and W.shape == right.shape
        assert (W.double() - right).norm() <= 2**-7 * right.norm()


@each_case
def test_copies_pickles_and_states_multiply_alike(case):
    module, other = case.linear(case.leaf()), case.linear(case.leaf(seed=5))
    x = activations(3, case.k, torch.bfloat16)
    y = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y) and twin.kernel is module.kernel
        assert repr(twin) == repr(module)
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)
    state = module.state_dict() | {"_extra_state": torch.tensor(list(b"other"), dtype=torch.uint8)}
    with pytest.raises(QlabError, match="packed as other and the module reads"):
        module.load_state_dict(state)


@each_case
def test_activations_in_another_dtype_are_refused(case):
    with pytest.raises(
        QlabError, match=r"lowered for torch.bfloat16 got torch.float32 activations"
    ):
        case.linear(case.leaf())(activations(2, case.k, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_case
def test_a_gpu_multiplies_what_the_reference_does(case):
    device, kernel = torch.device("cuda", 0), kernel_named(case.row)
    leaf, experts, ends = case.leaf(), case.experts(2), torch.tensor([4, 9], device="cuda")
    setting = case.setting(device=device)
    reason = kernel.takes(leaf, setting) if kernel.meant(leaf, setting) else "it is for CPUs"
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
    assert (module.dequantized().cpu() - case.linear(leaf).dequantized()).abs().max() == 0
