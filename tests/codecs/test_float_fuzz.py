"""Damaged tensors and configs of compressed-tensors and fp8 end in a value or in one QlabError,
never in anything else."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import random_qtensor

from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import parse_input_spec, parse_spec, with_scale_dtype
from qlab.codecs import CODECS, reader
from qlab.codecs.compressed_tensors.scheme import PRESETS
from qlab.errors import QlabError

CT = CODECS["compressed-tensors"]
FP8 = reader({"quant_method": "fp8"})
TEXTS = (
    "int4-g32-asym",
    "int3-channel",
    "int8-tensor-asym",
    "fp8-channel",
    "fp8-b16x24",
    "mxfp4",
    "mxfp6",
    "mxfp8",
    "nvfp4",
)
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float8_e4m3fn,
    torch.bool,
)
NAMES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "weight_scale_inv",
    "compressed",
    "bitmask",
    "shape",
)
shapes = st.lists(st.integers(0, 9), max_size=3)


@st.composite
def damages(draw):
    """What may happen to a tensor: it is gone, of another shape, dtype or content."""
    kind = draw(st.sampled_from(["drop", "replace", "cast", "cut", "bytes", "huge"]))
    shape, dtype, seed = draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)

    def damage(old):
        if kind == "drop":
            return None
        if kind == "huge":
            return torch.tensor([2**62, 2**62 - 1])
        if kind == "replace" or old is None:
            return torch.randint(0, 255, shape, generator=generator).to(dtype)
        if kind == "cast":
            return old.float().to(dtype)
        if kind == "cut":
            return old[..., : old.shape[-1] // 2] if old.ndim else old
        raw = old.contiguous().flatten().view(torch.uint8).clone()
        raw[
            torch.randint(0, max(len(raw), 1), (3,), generator=generator).clamp_max(
                max(len(raw) - 1, 0)
            )
        ] = 255
        return raw.view(old.dtype).reshape(old.shape)

    return damage


def survives(codec, tensors, spec):
    try:
        leaf = codec.decode("m", tensors, spec)
    except QlabError as error:
        assert "\n" not in str(error)
        return
    W = dense(leaf, torch.float32)
    assert leaf.shape == W.shape and not W.isnan().any()
    assert not isinstance(leaf, QTensor) or leaf.codes.numel() <= 32 * sum(
        t.numel() for t in tensors.values()
    )


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=80)
@given(name=st.sampled_from(NAMES), damage=damages(), other=st.sampled_from(TEXTS))
def test_damaged_tensors_of_compressed_tensors(text, name, damage, other):
    tensors = CT.encode(
        "m", random_qtensor(with_scale_dtype(parse_spec(text), torch.float32), 8, 96)
    )
    tensors[f"m.{name}"] = damage(tensors.get(f"m.{name}"))
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    survives(CT, tensors, parse_spec(text))
    survives(CT, tensors, parse_spec(other))
    survives(CT, tensors, None)


@settings(max_examples=150)
@given(
    name=st.sampled_from(["weight", "weight_scale_inv", "weight_scale"]),
    damage=damages(),
    text=st.sampled_from(["fp8-b16x24", "fp8-tensor"]),
)
def test_damaged_tensors_of_fp8(name, damage, text):
    q = random_qtensor(with_scale_dtype(parse_spec(text), torch.float32), 8, 96)
    tensors = {"m.weight": q.codes, "m.weight_scale_inv": q.scales}
    tensors[f"m.{name}"] = damage(tensors.get(f"m.{name}"))
    survives(
        FP8,
        {key: tensor for key, tensor in tensors.items() if tensor is not None},
        parse_spec(text),
    )


@settings(max_examples=100)
@given(
    name=st.sampled_from(["input_scale", "input_zero_point", "input_global_scale"]),
    damage=damages(),
    text=st.sampled_from(
        ["fp8-tensor static", "int8-tensor-asym static", "nvfp4 static", "int8-token"]
    ),
)
def test_damaged_scales_of_inputs(name, damage, text):
    stored = {
        "m.input_scale": torch.tensor([0.1]),
        "m.input_zero_point": torch.tensor([1], dtype=torch.int8),
    }
    stored[f"m.{name}"] = damage(stored.get(f"m.{name}"))
    for codec in (CT, FP8) if text == "fp8-tensor static" else (CT,):
        try:
            op = codec.decode_input(
                "m", {key: t for key, t in stored.items() if t is not None}, parse_input_spec(text)
            )
        except QlabError:
            continue
        assert isinstance(op, QuantizeInput) and op(torch.ones(2, 16)).isfinite().all()


WORDS = ("", "re:(", "Linear", "torch.uint8", "group", "float")
KEYS = ("weights", "targets", "x", "num_bits")
junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(config, path=()):
    """Every path into a JSON value."""
    yield path
    items = (
        config.items()
        if isinstance(config, dict)
        else enumerate(config)
        if isinstance(config, list)
        else ()
    )
    for key, value in items:
        yield from places(value, (*path, key))


def put(config, path, value):
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


@settings(max_examples=400)
@given(st.data(), st.sampled_from([name for name, (weights, _) in PRESETS.items() if weights]))
def test_damaged_configs(data, preset):
    weights, rounded = PRESETS[preset]
    inputs = {"m": parse_input_spec(rounded)} if rounded else {}
    config = copy.deepcopy(CT.config({"m": parse_spec(weights), "lm_head": None}, inputs))
    fp8 = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "fmt": "e4m3",
    }
    for whole, codec in ((config, CT), (fp8, FP8)):
        extra = (
            [
                ("config_groups", "group_0", "weights", "actorder"),
                ("config_groups", "group_0", "weights", "block_structure"),
                ("sparsity_config", "format"),
                ("kv_cache_scheme",),
                ("transform_config",),
            ]
            if codec is CT
            else []
        )
        put(whole, data.draw(st.sampled_from([*places(whole), *extra][1:])), data.draw(junk))
        names = ["m.weight", "m.weight_scale", "m.weight_packed", "lm_head.weight"]
        for read in (
            codec.specs,
            codec.inputs,
            lambda config, names, codec=codec: {"m": codec.extras(config, names)},
        ):
            try:
                assert set(read(whole, names)) <= {"m"}
            except QlabError as error:
                assert "\n" not in str(error)
