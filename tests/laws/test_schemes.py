"""Schemes mean what llm-compressor's presets mean, by its own quantizer, and compose with any
method."""

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import refused
from quick import QUICK
from segments import segment

import qlab
from qlab.algebra.grid import encode, minmax
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import dense
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import STATS
from qlab.methods.inputs import RANGES, rounding
from qlab.methods.schemes import SCHEMES, Scheme

PRESETS = sorted(set(PRESET_SCHEMES) & set(SCHEMES))
WEIGHTS = [name for name, scheme in SCHEMES.items() if scheme.weights]
seeds = settings(max_examples=5)


def test_every_preset_that_is_no_alias_or_neighbour_has_a_scheme():
    left = {"UNQUANTIZED", "W7A16", "INT8", "MXFP4XFP8", "MXFP6A16", "MXFP6A8", "MXFP8A16"}
    narrow = {f"W{w}A{a}" for w in range(2, 8) for a in (4, 8)} - {"W4A8", "W4A4"}
    assert set(PRESET_SCHEMES) - left - narrow == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
@seeds
@given(o=st.integers(1, 3), seed=st.integers(0, 99))
def test_weights_of_a_preset_get_the_librarys_codes(name, o, seed):
    args, spec = preset_name_to_scheme(name, ["Linear"]).weights, qlab.scheme(name).weights
    W = torch.randn(128 * o, 256, generator=torch.Generator().manual_seed(seed))
    outer = generate_gparam(W.min(), W.max()) if spec.outer else None
    x = spec.tile.split(W)
    scales, zeros = calculate_qparams(x.amin(-1), x.amax(-1), args, outer)
    flat = (scales.flatten(), zeros.flatten()) if args.strategy == "tensor" else (scales, zeros)
    q = encode(minmax, W, spec)
    codes = quantize(W, *flat, args, global_scale=outer)
    assert torch.equal(q.codes.float(), codes.float())
    assert torch.equal(dense(q, torch.float32), fake_quantize(W, *flat, args, global_scale=outer))


@pytest.mark.parametrize("name", PRESETS)
@seeds
@given(n=st.integers(1, 9), seed=st.integers(0, 99))
def test_inputs_of_a_preset_become_the_librarys_numbers(name, n, seed):
    args, scheme = preset_name_to_scheme(name, ["Linear"]).input_activations, qlab.scheme(name)
    assert (args is None) == (scheme.inputs is None)
    if args is None:
        return
    x = torch.randn(2, n, 256, generator=torch.Generator().manual_seed(seed)) * 3
    rows = x.flatten(0, 1)
    stats = {"absmax": rows.abs().amax(0), "minmax": (rows.amin(0), rows.amax(0))}
    static = RANGES["absmax"] if scheme.inputs.static else None
    ours = rounding(scheme.inputs.spec, static, stats)(x)
    if args.dynamic is False:
        scale, zero = calculate_qparams(x.min().view(1), x.max().view(1), args)
        assert torch.equal(ours, fake_quantize(x, scale, zero, args))
        return
    outer = generate_gparam(x.min(), x.max()) if scheme.inputs.spec.outer else None
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), outer)
    assert torch.equal(ours, fake_quantize(x, scale, zero, args, outer))


@pytest.mark.parametrize("name", WEIGHTS)
def test_any_method_fills_any_scheme(name):
    scheme = SCHEMES[name]
    for method in (m for m in QUICK if m != "kv"):
        recipe = scheme.recipe(QUICK[method])
        rounded = [stage for stage in recipe if stage.spec]
        assert rounded and {stage.spec for stage in rounded} == {scheme.weights}, method
        assert (recipe[-1].name == "quantize_inputs") == (scheme.inputs is not None)
        masks = [stage for stage in recipe if stage.detail.startswith("pattern 2:4")]
        pruned = scheme.sparsity is not None or method.endswith("-2:4")
        assert len(masks) == pruned, method


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "wanda+gptq"])
def test_a_sparse_scheme_leaves_two_of_every_four(family, method):
    scheme = Scheme(name="sparse", weights=qlab.parse_spec("int4-g16"), sparsity="2:4")
    method = method.replace("wanda", "wanda-2:4")
    graph, _ = segment(family).solve(scheme.recipe(method))
    for site in (site for site in graph.sites if not site.router):
        W = dense(graph.params[site.weight], torch.float32)
        kept = (W.unflatten(-1, (-1, 4)) != 0).sum(-1)
        assert (kept <= 2).all() and (kept == 2).float().mean() > 0.5


def test_parts_compose_and_their_numbers_are_their_names():
    scheme = qlab.scheme("w4a8-g64")
    recipe = qlab.chain(qlab.smoothquant(), scheme.recipe("gptq"))
    assert [s.name for s in recipe] == ["smoothquant", "absorb", "gptq", "quantize_inputs"]
    assert str(scheme.weights) == "int4-g64" and scheme.bits_per_weight == 4.25
    assert scheme.name == "W4A8-g64" and SCHEMES["W4A8"].weights.tile.cols == 128
    static = qlab.scheme("FP8").recipe(qlab.gptq, static="quantile")
    assert [sorted(stage.needs) for stage in static] == [["second_moment"], ["sample"]]
    assert qlab.scheme("KV_INT8_TOKEN").filled("gptq") == ()
    (cached,) = qlab.scheme("KV_INT8_TOKEN").recipe()
    assert cached.detail == "int8-token-head"


def test_a_mask_comes_behind_what_turns_weights():
    for method, last in {
        "smoothquant+gptq": ["absorb", "sparsegpt", "gptq"],
        "rtn": ["magnitude", "rtn"],
        "quarot+rtn": ["absorb", "magnitude", "rtn"],
        "aim_at_reference+gptq": ["sparsegpt", "aim_at_reference", "gptq"],
    }.items():
        names = [stage.name for stage in qlab.scheme("W4A16_2:4").recipe(method)]
        assert names[-len(last) :] == last, method


@pytest.mark.parametrize("covers", ["tensor", "head", "token"])
def test_a_cache_has_a_scale_for_what_its_name_says(covers):
    seg = segment("llama")
    graph, _ = seg.solve(qlab.scheme(f"KV_INT8_{covers}").recipe())
    for name in ("self_attn:key", "self_attn:value"):
        (op,) = graph.inserts[name]
        assert isinstance(op, QuantizeInput)
        assert (op.scales is None) == (covers == "token")
        n, channels, heads = 5, 32, 2
        count = {"tensor": 1, "head": heads, "token": n * heads}[covers]
        scales = op.spec.tile.scales_shape(torch.Size((n, channels)))
        assert scales[0] * scales[1] == count


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda: qlab.scheme("W4A17"), ("'W4A17' is unknown", "W4A16")),
        (lambda: qlab.scheme("kv_int8"), ("nearest are", "KV_INT8_HEAD")),
        (lambda: qlab.scheme("W8A8-g64"), ("W8A8-g64 gives a size to groups", "int8-channel")),
        (lambda: qlab.scheme("MXFP4-g16"), ("has none of its own (mxfp4)",)),
        (lambda: qlab.scheme("W4A16-g0"), ("is unknown",)),
        (lambda: qlab.scheme(4), ("name is 4; give a string",)),
        (lambda: qlab.scheme("W4A16").recipe("kv"), ("the method of W4A16 rounds no weights",)),
        (lambda: qlab.scheme("W4A16").recipe("gtpq"), ("'gtpq' is unknown",)),
        (lambda: qlab.scheme("FP8").recipe("rtn", "median"), ("'median' measures no scale",)),
        (
            lambda: qlab.scheme("W4A16_2:4").recipe("wanda-4:8+gptq"),
            ("W4A16_2:4 keeps 2:4 and wanda has the pattern 4:8",),
        ),
    ],
)
def test_bad_names_are_refused_in_one_sentence(act, words):
    refused(act, *words)


@pytest.mark.parametrize("text", ["int8-tensor", "fp8-tensor", "nvfp4"])
@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("rows", [torch.zeros(0, 32), torch.zeros(4, 32)])
def test_no_scale_is_stored_of_what_no_token_reached(rows, name, text):
    spec, empty = qlab.parse_spec(text), not len(rows)
    observation = Observation(rows, torch.arange(len(rows)))
    none = {name: stat.nothing(32) for name, stat in STATS.items() if name in ("minmax", "absmax")}
    stats = none if empty else {k: STATS[k].lift(observation) for k in ("minmax", "absmax")}
    stats["sample"] = STATS["sample"].lift(observation)
    needed = {key: stats[key] for key in RANGES[name].needs}
    for static, seen in ((RANGES[name], needed), (None, {"absmax": stats["absmax"]})):
        if static is None and text != "nvfp4":
            continue
        refused(
            lambda static=static, seen=seen: rounding(spec, static, seen, "mlp.down_proj:in"),
            "no token of the calibration data reached mlp.down_proj:in",
            "more text",
        )
    nonzero = {
        key: STATS[key].lift(Observation(torch.ones(4, 32), torch.arange(4))) for key in needed
    }
    op = rounding(spec, RANGES[name], nonzero)
    assert all(t is None or (t > 0).all() for t in (op.scales, op.outer))
