"""qlab::dequantize and qlab::int4_mm on a CPU: the right numbers for every shape, and operators
that torch accepts."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowering_cases import GROUPS, activations, calm, check_product, lowered, problems, random_leaf

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.errors import QlabError
from qlab.lowering import QLinear
from qlab.lowering.weights import cpu
from qlab.lowering.weights.nibbles import planes_of
from qlab.lowering.weights.ops import dequantize, int4_mm

pytestmark = pytest.mark.processor

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@calm
@given(problems(), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_a_lowered_linear_agrees_with_interpret(problem, dtype, biased, dense_cache):
    leaf, m = problem
    bias = activations(1, leaf.shape[0], dtype, seed=7)[0] if biased else None
    x = activations(m, leaf.shape[1], dtype)
    check_product(lowered(leaf, dtype, bias, dense_cache)(x), x, leaf, bias)


@calm
@given(problems(), st.sampled_from(DTYPES))
def test_a_dequantized_weight_is_the_leaf_rounded_once(problem, dtype):
    leaf, _ = problem
    # Kernels hold scales in the activations' dtype.
    stored = QTensor(leaf.codes, leaf.scales.to(dtype), leaf.zeros, leaf.spec)
    W = lowered(leaf, dtype).dequantized()
    assert torch.equal(W, dense(stored, torch.float64).to(dtype))


@pytest.mark.parametrize("kind", ["int4pack", "dense"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_both_ways_of_multiplying_agree(kind, group, symmetric, monkeypatch):
    monkeypatch.setattr(cpu, "kind", lambda *args: kind)
    leaf = random_leaf(70, 256, Int(4, Tile(1, group), symmetric))
    for m in (1, 3, 70):
        x = activations(m, 256, torch.bfloat16)
        check_product(lowered(leaf)(x), x, leaf)


def test_groups_that_no_kernel_reads_are_cut_into_some_that_repeat_a_scale():
    leaf, x = random_leaf(40, 1536, Int(4, Tile(1, 768))), activations(3, 1536, torch.bfloat16)
    assert lowered(leaf).packed.group == 256
    check_product(lowered(leaf)(x), x, leaf)


@pytest.mark.parametrize("dense_cache", [False, True])
@pytest.mark.parametrize("m", [3, 70])
def test_channels_that_share_groups_in_an_order_of_their_own_are_gathered(m, dense_cache):
    leaf, x = random_leaf(40, 128, Int(4, Tile(1, 32), False)), activations(m, 128, torch.bfloat16)
    leaf = QTensor(
        leaf.codes,
        leaf.scales,
        leaf.zeros,
        leaf.spec,
        perm=torch.randperm(128, generator=torch.Generator().manual_seed(3)),
    )
    layer = lowered(leaf, dense_cache=dense_cache)
    check_product(layer(x), x, leaf)
    stored = QTensor(leaf.codes, leaf.scales.bfloat16(), leaf.zeros, leaf.spec, perm=leaf.perm)
    assert torch.equal(layer.dequantized(), dense(stored, torch.float64).bfloat16())


def test_leading_dimensions_are_kept():
    layer, x = lowered(random_leaf(40, 64, Int(4, Tile(1, 32)))), activations(6, 64, torch.bfloat16)
    assert torch.equal(layer(x.view(2, 3, 64)).view(6, 40), layer(x))
    assert layer(x[0]).shape == (40,) and layer(x[:0].view(0, 1, 64)).shape == (0, 1, 40)


def strided(m, k):
    """Activations [m, k] that are not contiguous: columns of wider ones, a transpose, one token
    repeated."""
    x = activations(m, 2 * k, torch.bfloat16)
    return {
        "columns": x[:, :k],
        "transposed": x.view(2, k, m)[0].mT,
        "repeated": x[:1, :k].expand(m, k),
    }


@pytest.mark.parametrize("form", strided(1, 1))
@pytest.mark.parametrize("m", [6, 80])
@pytest.mark.parametrize(
    "spec, k",
    [(Int(4, Tile(1, 64)), 128), (Int(4, Tile(1, None)), 100), (Int(8, Tile(1, 64)), 128)],
)
def test_activations_need_not_be_contiguous(form, m, spec, k):
    leaf, x = random_leaf(70, k, spec), strided(m, k)[form]
    check_product(lowered(leaf)(x), x, leaf)


@pytest.mark.parametrize("bits, symmetric", [(4, True), (3, False), (8, False)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_accepts_the_operators(bits, symmetric, dtype):
    layer = lowered(
        random_leaf(70, 100, Int(bits, Tile(1, None), symmetric)), dtype, dense_cache=bits == 3
    )
    torch.library.opcheck(torch.ops.qlab.dequantize.default, layer.packed.for_dequantize())
    for m in (0, 1, 70):
        arguments = layer.packed.for_mm(activations(m, 100, dtype), layer.dense)
        torch.library.opcheck(torch.ops.qlab.int4_mm.default, arguments)


def test_four_bits_cost_four_bits_and_eight_cost_eight():
    for bits, expected in ((2, 4), (4, 4), (5, 8), (8, 8)):
        layer = lowered(random_leaf(64, 256, Int(bits, Tile(1, 64))))
        assert layer.words.numel() * 8 == expected * 64 * 256


def test_the_least_instruction_set_reads_its_own_order():
    """ATEN_CPU_CAPABILITY makes torch pack in another order. That of AVX2 is asked of all these
    tests when CI runs them again."""
    code = """
import torch
from lowering_cases import activations, check_product, lowered, random_leaf
from qlab.algebra.spec import Int, Tile
leaf = random_leaf(100, 128, Int(4, Tile(1, 64), False))
for m in (1, 70):
    x = activations(m, 128, torch.bfloat16)
    check_product(lowered(leaf)(x), x, leaf)
"""
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "default",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_words_of_another_machine_are_refused():
    layer = lowered(random_leaf(64, 64, Int(4, Tile(1, 32))))
    packed = (layer.words, layer.scales, layer.zeros)
    with pytest.raises(QlabError, match="packed as int4pack-8-halves cannot be read here"):
        dequantize(*packed, 64, 64, 32, 1, "int4pack-8-halves")
    with pytest.raises(QlabError, match="packed as mma2 cannot be read here"):
        int4_mm(activations(1, 64, torch.bfloat16), *packed, None, 64, 32, 1, "mma2")


def test_what_no_kernel_holds_is_refused_by_name():
    with pytest.raises(
        QlabError,
        match=r"site: groups of 16 have no int4 kernel; quantize with groups of 32, 64, 128, 256",
    ):
        planes_of("site", random_leaf(8, 64, Int(4, Tile(1, 16))))
    leaf = random_leaf(8, 64, Int(4, Tile(1, 32)))
    with pytest.raises(
        QlabError, match=r"lowered for torch.bfloat16 got torch.float32 activations"
    ):
        lowered(leaf)(activations(1, 64, torch.float32))


def test_an_entry_of_the_cache_decides_the_kind():
    from qlab_kernels import Config, cache
    from qlab_kernels.entries import Entry

    arguments = (torch.bfloat16, False, 64, 256, 64, False)
    assert (cpu.kind(2, *arguments), cpu.kind(512, *arguments)) == ("int4pack", "dense")
    assert (cpu.kind(16, *arguments), cpu.kind(16, torch.bfloat16, True, *arguments[2:])) == (
        "int4pack",
        "dense",
    )
    entry = dict(
        us=1.0,
        gbps=1.0,
        trials=1,
        device="here",
        triton="",
        torch="",
        source="measured",
        date="2026-01-01",
    )
    cache.store(cpu.problem(2, *arguments), Entry(Config("dense"), **entry))
    cache.refresh()
    assert cpu.kind(2, *arguments) == "dense"
    # No int4 kernel takes float16, whatever the cache says.
    assert cpu.kind(2, torch.float16, *arguments[1:]) == "dense"


# The upper of two planes has 16 times the scale.
@pytest.mark.parametrize("bits, largest", [(4, 7e4), (8, 5e3), (4, 1e-8)])
def test_scales_that_float16_does_not_hold_are_refused(bits, largest):
    leaf = random_leaf(16, 64, Int(bits, Tile(1, 32)))
    leaf = replace(leaf, scales=torch.full_like(leaf.scales, largest))
    with pytest.raises(
        QlabError,
        match=(
            r"a\.site has scales up to .*, which torch\.float16 does not hold; lower to "
            r"torch\.bfloat16"
        ),
    ):
        QLinear("a.site", leaf, None, torch.float16, torch.device("cpu"), False)
    assert (
        QLinear("a.site", leaf, None, torch.bfloat16, torch.device("cpu"), False)
        .dequantized()
        .isfinite()
        .all()
    )


def test_planted_faults_are_seen():
    """The tolerance is tight enough for a swapped nibble, a lost zero point and a straddled
    group."""
    leaf, x = random_leaf(64, 128, Int(4, Tile(1, 32), False)), activations(3, 128, torch.bfloat16)
    for spoil in ("words", "zero", "group"):
        layer = lowered(leaf)
        if spoil == "words":
            layer.words[:1, :32] = (layer.words[:1, :32] >> 4) | (layer.words[:1, :32] << 4)
        elif spoil == "zero":
            layer.scales[..., 1] = 0
        else:
            layer.scales.copy_(layer.scales.roll(1, 0))
        with pytest.raises(AssertionError):
            check_product(layer(x), x, leaf)
