"""AutoRound's configs over GPTQ's and AWQ's tensors."""

from dataclasses import replace

import pytest
import torch
from corruption import odd_configs
from hypothesis import given, settings
from leaves import assert_same, random_qtensor

from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS, reader
from qlab.errors import QlabError

CONFIG = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "data_type": "int",
    "iters": 200,
    "autoround_version": "0.16.1",
    "block_name_to_quantize": "model.layers",
}


@pytest.mark.parametrize(
    "packing, layout",
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
        ("auto_round", "gptq_v2"),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_tensors_are_those_of_the_packing_format(packing, layout, symmetric):
    q = random_qtensor(Int(4, Tile(1, 32), symmetric, torch.float16), 32, 64)
    assert (q.scales < 0).any()
    if not symmetric:
        q = replace(q, zeros=q.zeros.clamp(min=-7))
    tensors = CODECS[layout].encode("m", q)
    tensors.pop("m.g_idx", None)  # auto_round:auto_gptq writes none
    config = {**CONFIG, "packing_format": packing, "sym": symmetric}
    [spec] = reader(config).specs(config, tensors).values()
    assert_same(reader(config).decode("m", tensors, replace(spec, scale_dtype=torch.float16)), q)


def test_exact_names_win_over_patterns_and_earlier_patterns_over_later_ones():
    extra = {
        "h.1": {"bits": 16},
        r"h\.\d+\.mlp": {"bits": 2},
        "mlp.up": {"bits": 3},
        "h.1.mlp.up": {"group_size": 64},
    }
    config = {**CONFIG, "extra_config": {**extra, "lm_head": {"bits": 16}}}
    names = [
        "h.0.mlp.up.qweight",
        "m.h.0.mlp.up.qweight",
        "h.1.mlp.up.qweight",
        "h.2.q.qweight",
        "h.1.weight",
        "lm_head.weight",
    ]
    specs = reader(config).specs(config, names)
    assert {path: str(spec) for path, spec in specs.items()} == {
        "h.0.mlp.up": "int2-g32",
        "m.h.0.mlp.up": "int2-g32",
        "h.1.mlp.up": "int4-g64",
        "h.2.q": "int4-g32",
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"packing_format": "auto_round:fp8_static"},
            "packing_format 'auto_round:fp8_static'; qlab reads auto_round:auto_gptq, ",
        ),
        ({"packing_format": None}, "packing_format None"),
        ({"data_type": "mx_fp"}, "^m has data_type 'mx_fp'"),
        ({"act_bits": 8}, "^m has act_bits 8"),
        ({"extra_config": {"m": {"bits": 16}}}, "^m has bits 16"),
        ({"extra_config": {"m": {"rotation_config": {"a": 1}}}}, "^m has rotation_config"),
        ({"extra_config": {"m": 4}}, "no table of names"),
        (
            {"extra_config": {"(": {}}},
            r"'\(' in `extra_config`, which is neither a module of this model nor a regular "
            r"expression",
        ),
        ({"packing_format": "auto_round:auto_awq", "bits": 3}, "^m has bits 3; qlab reads 4"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(changes, message):
    config = {**CONFIG, **changes}
    with pytest.raises(QlabError, match=message):
        reader(config).specs(config, ["m.qweight"])


@settings(max_examples=200)
@given(odd_configs({**CONFIG, "extra_config": {"m": {}}, "act_bits": 16}))
def test_odd_configs_are_refused_or_mean_specs(config):
    config = {**config, "quant_method": "auto-round"}
    try:
        specs = reader(config).specs(config, ["m.0.q.qweight", "m.1.q.qweight"])
    except QlabError:
        return
    assert all(isinstance(spec, Int) and spec.bits in (2, 3, 4, 8) for spec in specs.values())
