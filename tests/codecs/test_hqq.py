"""HQQ as it lies in safetensors: words by hand, groups along both axes, zero points between codes,
what is refused."""

import pytest
import torch
from corruption import damaged, odd_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import hexes

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.codecs import reader
from qlab.errors import QlabError

PARTS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def config(bits=4, group=16, axis=1, **params):
    weights = {
        "nbits": bits,
        "channel_wise": True,
        "group_size": group,
        "optimize": True,
        "round_zero": True,
        "axis": axis,
        "view_as_float": False,
        **params,
    }
    table = {
        "weight_quant_params": weights,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }
    return {"quant_method": "hqq", "quant_config": table, "skip_modules": ["lm_head"]}


def pack(codes, bits):
    """Rows cut into parts, the first in the highest bits; one word at a time."""
    parts = PARTS[bits]
    codes = torch.cat([codes, torch.zeros(-len(codes) % parts, codes.shape[1], dtype=codes.dtype)])
    step = len(codes) // parts
    words = sum(
        codes[i * step : (i + 1) * step].long() << bits * (parts - 1 - i) for i in range(parts)
    )
    return words.to(torch.int32 if bits == 3 else torch.uint8)


def module(bits, o, k, group, axis, dtype=torch.float16, seed=0):
    """The tensors of module m, and its dense weight by the formula."""
    generator = torch.Generator().manual_seed(seed)
    size = group or (k if axis else o)
    shape = (o * k // size, size) if axis else (size, o * k // size)
    grid = (shape[0], 1) if axis else (1, shape[1])
    codes = torch.randint(2**bits, shape, generator=generator)
    scale = torch.rand(grid, generator=generator).to(dtype)
    zero = (torch.rand(grid, generator=generator) * 2**bits).to(dtype)
    tensors = {
        "W_q": pack(codes, bits),
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor([o, k]),
        "nbits": torch.tensor(bits).int(),
        "group_size": torch.tensor(group or 0).int(),
        "axis": torch.tensor(axis).int(),
        "quant_zero": torch.tensor(0).byte(),
        "packing": torch.tensor([52, 98]).byte(),
    }
    return {f"m.{name}": t for name, t in tensors.items()}, (
        (codes - zero.double()) * scale.double()
    ).reshape(o, k)


@settings(max_examples=80)
@given(
    st.sampled_from(list(PARTS)),
    st.integers(1, 6),
    st.sampled_from([8, 16, 40]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_weights_are_those_of_the_formula(bits, o, k, grouped, axis, dtype):
    o = 8 * o
    tensors, W = module(bits, o, k, 8 if grouped else None, axis, dtype)
    said = config(bits, 8 if grouped else None, axis)
    [spec] = reader(said).specs(said, tensors).values()
    leaf = reader(said).decode("m", tensors, spec)
    assert isinstance(leaf, QTensor) == (axis == 1)
    decoded = dense(leaf, torch.float64) if axis else leaf.double()
    assert (
        decoded.shape == W.shape
        and (decoded - W).abs().max() <= (0 if axis else 2.0**-7) * W.abs().max()
    )


def test_three_bit_codes_have_the_golden_word():
    tensors, _ = module(3, 10, 8, 8, 1)
    codes = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])[:, None].expand(10, 8)
    assert hexes(pack(codes, 3)[0, :1]) == "014e5dc1"
    said = config(3, 8)
    leaf = reader(said).decode(
        "m",
        {**tensors, "m.W_q": torch.full((1, 8), 0x014E5DC1, dtype=torch.int32)},
        Int(3, Tile(1, 8), False, zero_dtype=torch.float64),
    )
    assert torch.equal(leaf.codes, (codes - 4).to(torch.int8))


def test_four_bit_codes_have_the_first_half_in_the_high_nibble():
    tensors, _ = module(4, 2, 8, 8, 1)
    said = config(4, 8)
    [spec] = reader(said).specs(said, tensors).values()
    leaf = reader(said).decode(
        "m", {**tensors, "m.W_q": torch.full((1, 8), 0xA3, dtype=torch.uint8)}, spec
    )
    assert leaf.codes.tolist() == [[10 - 8] * 8, [3 - 8] * 8]


def test_modules_may_have_parameters_of_their_own():
    said = config()
    said["quant_config"] = {
        "self_attn.q_proj": config(8, 64)["quant_config"],
        "mlp.up_proj": config(3, 16)["quant_config"],
    }
    names = ["model.layers.0.self_attn.q_proj.W_q", "model.layers.1.mlp.up_proj.W_q"]
    assert [str(spec) for spec in reader(said).specs(said, names).values()] == [
        "int8-g64-asym",
        "int3-g16-asym",
    ]
    with pytest.raises(
        QlabError, match=r"no weight_quant_params for model\.layers\.0\.mlp\.gate_up_proj"
    ):
        reader(said).specs(said, ["model.layers.0.mlp.gate_up_proj.W_q"])


@pytest.mark.parametrize(
    "said, message",
    [
        (config(5), "^m has nbits 5"),
        (config(1.58), r"^m has nbits 1\.58"),
        (config(group=0), "^m has group_size 0"),
        (config(axis=2), "^m has axis 2"),
        (config(axis=True), "^m has axis True"),
        (config(view_as_float=True), "^m has its words stored as floats"),
        ({"quant_method": "hqq"}, "no weight_quant_params for m"),
        (
            {
                "quant_method": "hqq",
                "quant_config": {"weight_quant_params": {}, "zero_quant_params": {"nbits": 8}},
            },
            "quantized themselves",
        ),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(said, message):
    with pytest.raises(QlabError, match=message):
        reader(said).specs(said, ["m.W_q"])


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "nbits",
            torch.tensor(8).int(),
            "m has nbits 8, group_size 16 and axis 1, and its config says int4-g16-asym",
        ),
        ("axis", torch.tensor(0).int(), "axis 0"),
        ("quant_scale", torch.tensor(1).byte(), "quantized themselves"),
        ("shape", torch.tensor([2**40, 2**20]), "W_q is"),
        ("shape", torch.tensor([4, 30]), "do not divide"),
        ("zero", torch.full((8, 1), 1e-30), "too close to 0"),
    ],
)
def test_decode_refuses(name, value, message):
    tensors, _ = module(4, 4, 32, 16, 1)
    with pytest.raises(QlabError, match=message):
        reader(config()).decode(
            "m",
            {**tensors, f"m.{name}": value},
            Int(4, Tile(1, 16), False, zero_dtype=torch.float64),
        )


@settings(max_examples=200)
@given(st.data(), st.sampled_from([0, 1]))
def test_damaged_tensors_are_refused_or_make_no_difference(data, axis):
    tensors, W = module(4, 32, 64, 16, axis)
    spec = Int(4, Tile(1, 16), False, zero_dtype=torch.float64) if axis else None
    try:
        leaf = reader(config()).decode(
            "m", data.draw(damaged(tensors).filter(lambda t: "m.packing" in t)), spec
        )
    except QlabError:
        return
    decoded = dense(leaf, torch.float64) if axis else leaf.double()
    assert (decoded - W).abs().max() <= 2.0**-10 * W.abs().max()


@settings(max_examples=200)
@given(odd_configs(config()["quant_config"]["weight_quant_params"]), st.booleans())
def test_odd_configs_are_refused_or_mean_specs(params, flat):
    said = config()
    said["quant_config"] = (
        params if flat else {**said["quant_config"], "weight_quant_params": params}
    )
    try:
        specs = reader(said).specs(said, ["m.0.q.W_q", "m.1.q.W_q"])
    except QlabError:
        return
    assert all(spec is None or isinstance(spec, Int) for spec in specs.values())


def test_writing_is_refused():
    codec = reader(config())
    assert codec.refusal(Int(4, Tile(1, 16))).startswith(
        "qlab reads HQQ and does not write it; use compressed-tensors"
    )
    with pytest.raises(QlabError, match="does not write it"):
        codec.config({})
