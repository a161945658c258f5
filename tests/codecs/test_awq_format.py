"""The AWQ codec: words by hand, the bijection, symmetric weights under zero points, names that
readers look for."""

import json
from dataclasses import replace

import pytest
import torch
from corruption import damaged, odd_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same, hexes, random_qtensor

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS, LEGACY_CONFIGS, reader
from qlab.errors import QlabError

F16, AWQ = torch.float16, CODECS["awq"]
SYM, ASYM = Int(4, Tile(1, 32), True, F16), Int(4, Tile(1, 32), False, F16)


@st.composite
def leaves(draw):
    group = draw(st.sampled_from([None, 1, 5, 32]))
    spec = Int(4, Tile(1, group), draw(st.booleans()), draw(st.sampled_from([F16, torch.bfloat16])))
    return random_qtensor(
        spec,
        8 * draw(st.integers(1, 5)),
        (group or 7) * draw(st.integers(1, 6)),
        draw(st.integers(0, 99)),
    )


@settings(max_examples=100)
@given(leaves())
def test_decode_inverts_encode_bit_for_bit(q):
    tensors = AWQ.encode("m.q", q)
    assert_same(AWQ.decode("m.q", tensors, q.spec), q)
    config = json.loads(json.dumps(AWQ.config({"m.q": q.spec, "lm_head": None})))
    [(path, spec)] = reader(config).specs(config, [*tensors, "lm_head.weight"]).items()
    assert path == "m.q"
    assert_same(replace(AWQ.decode("m.q", tensors, spec), spec=q.spec), q)


def test_codes_lie_in_words_as_by_hand():
    # Unsigned 0 to 7 down the rows, in every column.
    codes = torch.arange(-8, 0, dtype=torch.int8)[:, None].repeat(1, 3)
    tensors = AWQ.encode(
        "m", QTensor(codes, torch.ones(8, 1, dtype=F16), codes[:, :1], Int(4, Tile(1, None), False))
    )
    assert hexes(tensors["m.qweight"]) == "75316420 75316420 75316420"
    assert hexes(tensors["m.qzeros"]) == "75316420"
    assert tensors["m.scales"].shape == (1, 8)


def test_a_symmetric_leaf_has_zero_points_of_8():
    tensors = AWQ.encode("m", random_qtensor(SYM, 8, 64))
    assert hexes(tensors["m.qzeros"]) == "88888888 88888888"


def test_the_formula_of_the_format_gives_the_dense_weight():
    q = random_qtensor(ASYM, 16, 64)
    t = AWQ.encode("m", q)
    inverse = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of a column
    nibble = lambda words, row, n: int(words[row, n // 8]) >> 4 * inverse[n % 8] & 15
    W = torch.tensor(
        [
            [
                float(t["m.scales"][k // 32, n])
                * (nibble(t["m.qweight"], k, n) - nibble(t["m.qzeros"], k // 32, n))
                for k in range(64)
            ]
            for n in range(16)
        ]
    )
    assert torch.equal(W.half(), dense(q))


def test_weights_larger_than_a_chunk_pack_alike():
    q = random_qtensor(ASYM, 64, 1 << 15)
    tensors = AWQ.encode("m", q)
    assert_same(AWQ.decode("m", tensors, q.spec), q)
    some = AWQ.encode(
        "m", replace(q, codes=q.codes[:, :32], scales=q.scales[:, :1], zeros=q.zeros[:, :1])
    )
    assert torch.equal(tensors["m.qweight"][:32], some["m.qweight"])


# ------------------------------------------------------------------ configs
NAMES = [f"h.{i}.{name}" for i in range(2) for name in ("q", "fc1", "fc2")] + ["lm_head"]


@settings(max_examples=50)
@given(
    st.sampled_from([Int(4, Tile(1, g), s) for g in (128, None) for s in (True, False)]),
    st.sets(st.sampled_from(NAMES)),
)
def test_specs_inverts_config(spec, left):
    if left == set(NAMES):
        return
    specs = {name: None if name in left else spec for name in NAMES}
    config = json.loads(json.dumps(AWQ.config(specs)))
    names = [f"{path}.{'qweight' if spec else 'weight'}" for path, spec in specs.items()]
    assert AWQ.specs(config, names) == {path: spec for path, spec in specs.items() if spec}
    assert config["zero_point"] is True and (config["modules_to_not_convert"] or []) == [
        n for n in NAMES if n in left
    ]


def test_a_name_inside_a_quantized_one_is_refused():
    with pytest.raises(
        QlabError, match=r"^AWQ cannot leave h\.0\.gate unquantized.*find it in h\.0\.gate_proj too"
    ):
        AWQ.config({"h.0.gate": None, "h.0.gate_proj": SYM})
    assert AWQ.config({"h.1.gate": None, "h.11.gate_proj": SYM})["modules_to_not_convert"] == [
        "h.1.gate"
    ]


def test_two_specs_are_refused():
    with pytest.raises(
        QlabError,
        match=r"^AWQ has one spec for all modules, and a has int4-g32 where b has int4-g32-asym",
    ):
        AWQ.config({"a": SYM, "b": ASYM})
    assert AWQ.config({"a": SYM, "b": replace(SYM, scale_dtype=None)})["group_size"] == 32


@pytest.mark.parametrize(
    "changes, spec",
    [
        ({}, Int(4, Tile(1, 128), False)),
        ({"version": "GEMM", "group_size": -1}, Int(4, Tile(1, None), False)),
        ({"zero_point": False, "format": "gemm", "sym": True}, Int(4, Tile(1, 128), True)),
        ({"symmetric": True}, Int(4, Tile(1, 128), True)),
        ({"dynamic": {"+:m": {"group_size": 32}}}, Int(4, Tile(1, 32), False)),
    ],
)
def test_configs_of_others_are_read(changes, spec):
    config = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, **changes}
    assert reader(config).specs(config, ["m.qweight", "n.weight"]) == {"m": spec}


def test_configs_in_files_of_their_own_are_read():
    config = LEGACY_CONFIGS["quant_config.json"](
        {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    )
    assert reader(config).specs(config, ["m.qweight"]) == {"m": Int(4, Tile(1, 64), False)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"version": "marlin"}, "AWQ version marlin; qlab reads gemm, gemv, gemv_fast, llm-awq"),
        ({"version": "gemv", "format": "gemm"}, "AWQ versions gemm and gemv; it must name one"),
        ({"pack_dtype": "int16"}, "pack_dtype 'int16'; AWQ gemm has int32 words"),
        ({"version": "gemv_fast", "pack_dtype": "int32"}, "AWQ gemv_fast has int16 words"),
        ({"bits": 8}, "^m has bits 8; qlab reads 4"),
        ({"group_size": "128"}, "^m has group_size '128'"),
        ({"zero_point": None}, "^m has zero_point None"),
        ({"symmetric": 1}, "^m has sym 1"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(changes, message):
    with pytest.raises(QlabError, match=message):
        AWQ.specs(
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, **changes},
            ["m.qweight"],
        )


# ------------------------------------------------------------------ refusals and damage
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(spec=Int(3, Tile(1, 32), True, F16)), "has no int3-g32; it holds integers of 4 bits"),
        (dict(perm=torch.arange(64)), "AWQ has no place for; write gptq_desc_act"),
        (
            dict(codes=torch.zeros(4, 64, dtype=torch.int8), scales=torch.ones(4, 2, dtype=F16)),
            "4 rows do not fill int32 words",
        ),
        (dict(scales=torch.ones(16, 2)), "scales are torch.float32 and AWQ stores torch.float16"),
    ],
)
def test_encode_refuses(change, message):
    with pytest.raises(QlabError, match=rf"^m\.q: .*{message}"):
        AWQ.encode("m.q", replace(random_qtensor(SYM, 16, 64), **change))


@pytest.mark.parametrize("left", ["q", "m.0", "m.0.q"])
def test_codes_of_a_module_that_is_said_to_be_unquantized_are_refused(left):
    config = AWQ.config({"m.0.q": SYM, "m.0.q_norm": None})
    assert AWQ.specs(config, ["m.0.q.qweight"]).keys() == {"m.0.q"}
    with pytest.raises(
        QlabError,
        match=rf"^m\.0\.q has codes in the files, and '{left}' in modules_to_not_convert says",
    ):
        AWQ.specs(config | {"modules_to_not_convert": ["other", left]}, ["m.0.q.qweight"])


def test_zero_points_that_a_symmetric_spec_would_drop_are_refused():
    with pytest.raises(
        QlabError, match=r"^m\.qzeros is not 8 everywhere.*must say zero_point true"
    ):
        AWQ.decode("m", AWQ.encode("m", random_qtensor(ASYM, 16, 64)), SYM)


@settings(max_examples=200)
@given(st.data())
def test_damaged_tensors_are_refused(data):
    q = random_qtensor(data.draw(st.sampled_from([SYM, ASYM])), 64, 96)
    tensors = data.draw(damaged(AWQ.encode("m.q", q)))
    with pytest.raises(QlabError, match=r"^m\.q\."):
        AWQ.decode("m.q", tensors, q.spec)


@settings(max_examples=200)
@given(
    odd_configs(
        {
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "symmetric": True,
            "dynamic": None,
            "backend": "autoawq",
            "modules_to_not_convert": None,
        }
    )
)
def test_odd_configs_are_refused_or_mean_specs(config):
    try:
        specs = AWQ.specs(config, ["m.0.q.qweight", "m.1.q.qweight"])
    except QlabError:
        return
    assert all(isinstance(spec, Int) and spec.bits == 4 for spec in specs.values())
