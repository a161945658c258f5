"""The CUDA implementations: their choice and their plumbing with Triton interpreted, and the whole
on a GPU where there is one."""

import pytest
import torch
from lowering_cases import activations, check_product, random_leaf
from torch.utils import _pytree as pytree

import qlab
from qlab.algebra.experts import rows_of
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import QExperts, QLinear, inductor_options, lower
from qlab.lowering.weights import cuda
from qlab.lowering.weights.packed import Packed
from qlab.methods.rtn import rtn
from qlab_kernels import target

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
INTERPRETED = """
import torch
from lowering_cases import activations, check_product, random_leaf
from qlab.lowering.weights import cuda
from qlab.lowering.weights.nibbles import planes_of
from qlab.lowering.weights.packed import stacked
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Int, Tile
from qlab_kernels import cache
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
kinds = set()
lookup = cache.lookup
cache.lookup = lambda problem: (found := lookup(problem), kinds.add(found.config.kind))[0]
cases = [(100, 128, Int(4, Tile(1, 64), False)), (64, 100, Int(3, Tile(1, None))), (70, 96, Int(8, Tile(1, 32), False))]
for n, k, spec in cases:
    leaf = random_leaf(n, k, spec, scale_dtype=torch.float16)
    planes = planes_of("site", leaf, whole_rows=True)
    packed = cuda.pack(planes, torch.float16)
    W = cuda.dequantize(packed)
    assert W.shape == (n, k) and W.is_contiguous()
    torch.testing.assert_close(W, dense(leaf), rtol=1e-3, atol=1e-6)  # rounded once, two planes together
    for m in (0, 1, 5, 600):
        x = activations(m, k, torch.float16)
        check_product(cuda.int4_mm(x, packed, None), x, leaf)
        check_product(cuda.int4_mm(x, packed, W), x, leaf)
assert "dequant" in kinds and len(kinds) > 1, kinds

from qlab.algebra.experts import rows_of
ends = torch.tensor([2, 2, 7])
for capability in ((9, 0), (7, 5)):  # one grouped kernel, and expert by expert
    torch.cuda.get_device_capability = lambda device=None: capability
    for n, k, spec in cases:
        leaves = [random_leaf(n, k, spec, seed=e, scale_dtype=torch.float16) for e in range(3)]
        planes = [planes_of("site", leaf, whole_rows=True) for leaf in leaves]
        packed = stacked([cuda.pack(p, torch.float16) for p in planes])
        x = activations(7, k, torch.float16)
        y = cuda.int4_grouped_mm(x, packed, None, ends)
        for leaf, rows in zip(leaves, rows_of(ends)):
            check_product(y[rows], x[rows], leaf)
        assert cuda.int4_grouped_mm(x[:0], packed, None, 0 * ends).shape == (0, n)
"""  # noqa: E501


def test_the_cache_chooses_and_the_kernels_multiply(interpreted):
    """Fused and dequantizing configurations, two planes, whole rows and ragged shapes, in Triton's
    interpreter."""
    interpreted(INTERPRETED)


TUNED = """
import torch
from lowering_cases import activations, check_product, random_leaf
from qlab.algebra.experts import rows_of
from qlab.lowering.weights import cuda, int4
from qlab.lowering.weights.packed import stacked
from qlab.lowering.tuning import tune as tuning
from qlab.lowering.weights.nibbles import planes_of
from qlab.algebra.spec import Int, Tile
from qlab_kernels import cache
HERE = torch.device("cpu")
int4.implementation = lambda device: cuda
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = tuning.device_label = lambda device=None: "NVIDIA H200"
tuning.copies = lambda *_: 2
tuning.copy_rate = tuning.matmul_rate = lambda *_: 1e9
products = []

def invented(calls, *_):
    '''The widest tile wins; every candidate multiplies the same.'''
    products.append(calls[0]())
    torch.testing.assert_close(products[-1], products[0], rtol=1e-2, atol=1e-2)
    config = calls[0].args[-1]
    return 1000.0 - config.bm if config.kind == "gemm" else 2000.0

tuning.microseconds = invented
leaves = [random_leaf(64, 128, Int(4, Tile(1, 64), False), seed=e, scale_dtype=torch.float16) for e in range(3)]
planes = [planes_of("site", leaf, whole_rows=True) for leaf in leaves]
each = [cuda.pack(p, torch.float16) for p in planes]
x, lookup = activations(20, 128, torch.float16), cache.lookup
for experts in (0, 3):
    products.clear()
    [product] = tuning._products_on_gpu([(64, 128)], [20], tuning.Form(64, True, experts), "float16", HERE)
    row = tuning._tune(product, 600.0, False, lambda _: None)
    assert row["timings"] > 4 and (row["m"], row["experts"]) == (32, max(experts, 1)), row
    found = []
    cache.lookup = lambda problem: (found.append(lookup(problem)), found[-1])[1]
    if experts:
        ends = torch.tensor([2, 2, 20])
        y = cuda.int4_grouped_mm(x, stacked(each), None, ends)
    else:
        ends = torch.tensor([20])
        y = cuda.int4_mm(x, each[0], None)
    for leaf, rows in zip(leaves, rows_of(ends)):
        check_product(y[rows], x[rows], leaf)
    assert [(f.source, f.config.kind, f.config.bm, f.stale) for f in found] == [("user", "gemm", row["config"]["bm"], False)]
"""  # noqa: E501


def test_what_is_tuned_for_a_gpu_is_what_its_products_look_up(interpreted):
    """The key of the tuner is the key of the operators, for linears and for experts; every
    candidate gives the same product."""
    interpreted(TUNED)


def test_capabilities_and_dtypes_without_kernels_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    with pytest.raises(QlabError, match=r"no kernels for compute capability 6\.1"):
        cuda.layout(torch.device("cpu"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.raises(
        QlabError, match="multiplies float16 activations with int4 weights, not bfloat16"
    ):
        cuda.layout(torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    nothing = torch.empty(0, dtype=torch.float16)
    with pytest.raises(
        QlabError, match="packed as wgmma cannot be read on Tesla T4, whose layout is rows"
    ):
        cuda.launched(
            Packed(nothing, nothing, None, None, n=1, k=1, group=32, planes=1, layout="wgmma")
        )


def dtypes():
    """Of the activations that this GPU's kernels take."""
    return target(torch.cuda.get_device_capability()).dtypes


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "spec",
    [
        Int(4, Tile(1, 128)),
        Int(4, Tile(1, 64), False),
        Int(3, Tile(1, None)),
        Int(8, Tile(1, 32), False),
    ],
)
def test_a_lowered_linear_agrees_with_interpret_on_a_gpu(spec):
    leaf = random_leaf(200, 256, spec)
    for dtype in dtypes():
        layer = QLinear("site", leaf, None, dtype, torch.device("cuda"), False)
        for m in (0, 1, 17, 700):
            x = activations(m, 256, dtype).cuda()
            check_product(layer(x).cpu(), x.cpu(), leaf)
            torch.library.opcheck(torch.ops.qlab.int4_mm.default, layer.packed.for_mm(x, None))


def stacked(*parts):
    return None if parts[0] is None else torch.stack(parts)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "spec", [Int(4, Tile(1, 128)), Int(4, Tile(1, 64), False), Int(8, Tile(1, 32), False)]
)
def test_lowered_experts_agree_with_interpret_on_a_gpu(spec):
    leaves = [random_leaf(200, 256, spec, seed=e) for e in range(4)]
    ends = torch.tensor([3, 3, 40, 41])
    for dtype in dtypes():
        module = QExperts(
            "site", pytree.tree_map(stacked, *leaves), dtype, torch.device("cuda"), False
        )
        x = activations(41, 256, dtype).cuda()
        y = module(x, None, ends.cuda()).cpu()
        for leaf, rows in zip(leaves, rows_of(ends)):
            check_product(y[rows], x[rows].cpu(), leaf)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "options", [{}, {"triton.cudagraphs": True}], ids=["compiled", "CUDA graphs"]
)
def test_a_lowered_model_compiles_and_generates_on_a_gpu(saved, tmp_path, options):
    result = qlab.quantize(
        open_checkpoint(saved()), rtn(parse_spec("int4-g32")), None, tmp_path / "out"
    )
    dtype = dtypes()[0]
    on_gpu, ids = lower(result, "cuda", dtype), torch.randint(3, 128, (2, 9)).cuda()
    reference = lower(result, "cpu", torch.float32, dense_cache=True)(input_ids=ids.cpu()).logits
    compiled = torch.compile(
        on_gpu, fullgraph=True, dynamic=not options, options=inductor_options(**options)
    )
    for _ in range(3):  # CUDA graphs are recorded in the second call
        logits = compiled(input_ids=ids, use_cache=False).logits
    assert (logits.cpu().float() - reference).norm() / reference.norm() < 0.05
    assert on_gpu.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= 13
