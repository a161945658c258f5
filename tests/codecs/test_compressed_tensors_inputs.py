"""Inputs that are rounded at run time: the library's numbers, directories that evaluate with them,
and refusals."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import random_qtensor
from model_folders import directory, random_tokens
from transformers import AutoModelForCausalLM

import qlab
from qlab.algebra.graph import by_source
from qlab.algebra.grid import encode, minmax
from qlab.algebra.interpret import inputs_of
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import InputSpec, parse_input_spec, parse_spec, with_scale_dtype
from qlab.algebra.transform import chain, keep, rules
from qlab.codecs import CODECS
from qlab.codecs.compressed_tensors.scheme import PRESETS, args_of
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.model.loading import load_block, load_outside
from qlab.model.running import head, record_blocks
from qlab.model.skeleton import Skeleton

CODEC = CODECS["compressed-tensors"]
DYNAMIC = (
    "int8-token",
    "int4-token",
    "int8-token-asym",
    "fp8-token",
    "fp8-tensor",
    "fp8-g32",
    "mxfp4",
    "mxfp8",
)


@pytest.mark.parametrize("text", DYNAMIC)
@settings(max_examples=25)
@given(n=st.integers(1, 9), groups=st.integers(1, 4), seed=st.integers(0, 99))
def test_dynamic_inputs_are_rounded_as_the_library_does(text, n, groups, seed):
    spec = parse_input_spec(text.replace("-token-asym", "-channel-asym"))
    x = torch.randn(2, n, 32 * groups, generator=torch.Generator().manual_seed(seed)) * 3
    args = QuantizationArgs.model_validate(args_of(spec.spec, static=False, of_inputs=True))
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
    assert torch.equal(QuantizeInput(spec.spec)(x), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize(
    "text", ["fp8-tensor static", "int8-tensor static", "int8-tensor-asym static", "nvfp4 static"]
)
def test_stored_scales_are_written_read_and_used_as_the_library_does(text):
    spec, x = parse_input_spec(text), torch.randn(3, 5, 32)
    scale = None if spec.spec.outer else torch.tensor([[0.02]])
    zero = None if spec.spec.symmetric else torch.tensor([[3]], dtype=torch.int8)
    op = QuantizeInput(spec.spec, scale, zero, torch.tensor([900.0]) if spec.spec.outer else None)
    assert op.input_spec == spec and parse_input_spec(str(spec)) == spec
    weight = random_qtensor(
        with_scale_dtype(parse_spec("nvfp4" if spec.spec.outer else "fp8-channel"), torch.float32),
        4,
        32,
    )
    stored = CODEC.encode("m", weight, (op,))
    back = CODEC.decode_input("m", stored, spec)
    assert torch.equal(back(x), op(x)) and back.input_spec == spec
    args = QuantizationArgs.model_validate(args_of(spec.spec, static=True, of_inputs=True))
    if spec.spec.outer:
        local, zeros = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), op.outer)
        assert torch.equal(op(x), fake_quantize(x, local, zeros, args, op.outer))
    else:
        assert torch.equal(op(x), fake_quantize(x, scale, zero, args))


def of_preset(name, folder):
    """A tiny llama in the form of a preset, its unquantized numbers exact in bfloat16."""
    weights, rounded = PRESETS[name]
    model = tiny("llama", hidden_size=128, intermediate_size=256).bfloat16().float()
    spec = with_scale_dtype(parse_spec(weights), torch.float32)
    inputs = rounded and parse_input_spec(rounded)
    linears = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    online = ()
    if inputs:
        scale = torch.tensor([[0.03]]) if inputs.static and not inputs.spec.outer else None
        outer = torch.tensor([700.0])
        online = (QuantizeInput(inputs.spec, scale, None, outer if inputs.spec.outer else None),)
    codes = {}
    for path in linears:
        codes |= CODEC.encode(
            path, encode(minmax, model.get_submodule(path).weight.detach(), spec), online
        )
    config = CODEC.config(
        dict.fromkeys(linears, spec) | {"lm_head": None}, dict.fromkeys(linears, inputs)
    )
    return directory(model, folder, codes, config)


def logits(folder, ids):
    """What qlab computes of the directory."""
    reading = read(open_checkpoint(folder), qlab.from_ids(open_checkpoint(folder), ids))
    return head(reading.skeleton, ids, reading.hidden)


@pytest.mark.parametrize(
    "name",
    [
        "W8A8",
        "FP8",
        "FP8_DYNAMIC",
        "FP8_BLOCK",
        "W4A8",
        "W4AFP8",
        "W3A16",
        "NVFP4A16",
        "MXFP4A16",
        "MXFP4",
        "MXFP6A8",
        "MXFP8",
    ],
)
def test_transformers_computes_our_logits(name, tmp_path):
    folder = of_preset(name, tmp_path)
    ids = torch.arange(3, 35).reshape(2, 16)
    # The library makes bfloat16 weights of these, and does it in the first forward.
    narrow = name.startswith(("NV", "MX"))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if narrow else torch.float32
    ).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        if narrow:
            expected = torch.nn.Module.float(theirs)(ids).logits
    # NVFP4's scales are no powers of two, so that bfloat16 rounds its weights.
    limit = 0.02 if name.startswith("NV") else 1e-4
    assert (logits(folder, ids) - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize("weights", ["nvfp4", "mxfp6", "fp8-b48x48", "fp8-tensor", "mxfp8"])
def test_a_quantized_directory_of_floats_holds_the_dense_weights_of_its_codes(weights, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    model = open_checkpoint(tmp_path / "model")
    qlab.quantize(model, rtn(parse_spec(weights)), None, tmp_path / "out")
    out = open_checkpoint(tmp_path / "out")
    assert len(out.quantized) == 14 and out.dtype == torch.float32
    for module, spec in out.quantized.items():
        leaf, W = out.leaf(f"{module}.weight"), model.leaf(f"{module}.weight")
        assert (
            leaf.spec.bits == spec.bits
            and (dense(leaf, torch.float32) - W).norm() < 0.12 * W.norm()
        )


@pytest.mark.parametrize(
    "weights, rounded",
    [("int8-channel", "int8-channel"), ("fp8-b32x32", "fp8-g32"), ("mxfp4", "mxfp8")],
)
def test_qlab_writes_what_it_rounds_at_run_time(weights, rounded, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "model")
    model, ids = open_checkpoint(tmp_path / "model"), torch.arange(3, 35).reshape(2, 16)
    some = chain(rtn(parse_spec(weights)), quantize_inputs(parse_spec(rounded)))
    recipe = rules({"*.mlp.*": some, "*.q_proj": keep(), "*": rtn(parse_spec(weights))})
    result = qlab.quantize(model, recipe, None, tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    assert set(opened.inputs.values()) == {InputSpec(parse_spec(rounded))} and all(
        ".mlp." in m for m in opened.inputs
    )
    assert {name: row.get("inputs") for name, row in result.sites.items()} == {
        name: rounded if ".mlp." in name else None for name in result.sites
    }
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    if weights != "mxfp4":  # the library decompresses those to bfloat16
        with torch.no_grad():
            expected = theirs(ids).logits
        assert (logits(tmp_path / "out", ids) - expected).norm() < 1e-4 * expected.norm()
    qlab.quantize(
        model,
        rules({"*.q_proj": keep(), "*": rtn(parse_spec(weights))}),
        None,
        tmp_path / "weights only",
    )
    assert not torch.equal(logits(tmp_path / "out", ids), logits(tmp_path / "weights only", ids))


def test_a_global_scale_of_inputs_is_measured_on_the_calibration_data_and_read_again(
    saved, tmp_path
):
    source, spec = saved(), parse_spec("nvfp4")
    model, data = open_checkpoint(source), random_tokens(source)
    recipe = chain(rtn(spec), quantize_inputs(spec))
    result = qlab.quantize(model, recipe, data, tmp_path / "out", inputs="reference")
    assert {row["inputs"] for row in result.plan.sites.values()} == {"nvfp4 static"}
    opened = open_checkpoint(tmp_path / "out")
    assert (
        set(opened.inputs.values()) == {parse_input_spec("nvfp4 static")}
        and qlab.verify(opened, model).faults == []
    )
    skeleton = Skeleton(model, torch.float32)
    with torch.no_grad():
        load_outside(skeleton, with_head=False)
        hidden, calls = record_blocks(skeleton, data.ids)
    path, call = next(iter(calls.items()))
    graph = load_block(skeleton, path, call)
    first, *others = by_source(graph.sites).values()  # the others see what is rounded before them
    largest = (
        inputs_of(graph, [first[0].source], *call.inputs((hidden,)))[first[0].source].x.abs().max()
    )
    (scale,) = {opened.rounding(graph.where(site))[0].outer.item() for site in first}
    assert scale == pytest.approx(448 * 6 / float(largest))
    for sites in others:
        # One global scale: engines fuse these linears.
        assert len({opened.rounding(graph.where(site))[0].outer.item() for site in sites}) == 1
    assert torch.isfinite(logits(tmp_path / "out", data.ids)).all()


@given(
    st.sampled_from(
        ["int8-channel", "int4-channel-asym", "int8-tensor", "fp8-channel", "mxfp4", "int4-g16"]
    ),
    st.integers(0, 99),
)
@settings(max_examples=20)
def test_the_gradient_of_rounded_inputs_is_the_straight_through_one(text, seed):
    x, along = (
        torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(seed + i)) for i in (0, 1000)
    )
    op = QuantizeInput(parse_spec(text))
    with torch.no_grad():
        expected = op(x)
    loss = lambda x: (op(x).square() * along).sum()
    x.requires_grad_()
    assert torch.equal(op(x), expected)
    loss(x).backward()
    assert torch.equal(x.grad, 2 * expected * along)
    assert torch.equal(torch.func.grad(loss)(x.detach()), x.grad)


def test_an_input_spec_is_read_as_it_is_written():
    with pytest.raises(QlabError, match="'fp8-token sometimes' is unknown"):
        parse_input_spec("fp8-token sometimes")
