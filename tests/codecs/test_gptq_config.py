"""The GPTQ config: one spec or one per pattern, the version it chooses, files of its own, and what
is refused."""

import json
import re

import pytest
import torch
from corruption import odd_configs
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS, LEGACY_CONFIGS, reader
from qlab.errors import QlabError

F16 = torch.float16
V1 = CODECS["gptq"]
INT4, ASYM = Int(4, Tile(1, 32), True, F16), Int(4, Tile(1, 32), False, F16)
NAMES = [
    f"h.{i}.{name}"
    for i in range(3)
    for name in ("q", "fc1", "fc2", "experts.0.w1", "experts.1.w1")
] + ["lm_head"]
CHOICES = [
    None,
    *(Int(b, Tile(1, g), s) for b, g, s in [(4, 128, True), (3, 32, False), (8, None, True)]),
]


def file_names(specs):
    """The tensors of a directory whose modules are stored like this."""
    return [f"{path}.{'qweight' if spec else 'weight'}" for path, spec in specs.items()]


@settings(max_examples=80)
@given(
    st.fixed_dictionaries(dict.fromkeys(NAMES, st.sampled_from(CHOICES))).filter(
        lambda specs: any(specs.values())
    )
)
def test_specs_inverts_config(specs):
    config = V1.config(specs)
    assert V1.specs(json.loads(json.dumps(config)), file_names(specs)) == {
        path: spec for path, spec in specs.items() if spec
    }
    # No module matches two patterns, and none that is skipped is matched by another.
    for path, spec in specs.items():
        matching = [p for p in config["dynamic"] or {} if re.match(p[2:], path)]
        assert len(matching) <= 1 and (
            path == "lm_head" or (matching[:1] or "+")[0].startswith("-") == (spec is None)
        )


def test_the_config_of_one_spec_is_the_plain_one():
    config = CODECS["gptq_v2_desc_act"].config({"a.0.q": INT4, "a.1.q": INT4, "lm_head": None})
    expected = {
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "format": "gptq_v2",
        "lm_head": False,
        "dynamic": None,
        "pack_dtype": "int32",
    }
    assert expected.items() <= config.items()
    assert V1.config({"q": Int(8, Tile(1, None)), "lm_head": INT4})["lm_head"] is True
    mixed = V1.config(
        {"a.0.q": INT4, "a.1.q": INT4, "a.0.v": ASYM, "a.1.v": ASYM, "a.0.o": INT4, "a.1.o": None}
    )
    asymmetric = {"bits": 4, "group_size": 32, "sym": False}
    assert mixed["dynamic"] == {r"+:^a\.\d+\.v$": asymmetric, r"-:^a\.1\.o$": {}}


def test_patterns_match_as_in_gptqmodel():
    dynamic = {
        r".*\.18\..*gate.*": {"bits": 8, "group_size": 64},
        "+:.*gate": {"bits": 2},
        r"-:.*\.up": {},
        "h.1": {"sym": False},
    }
    config = {"bits": 4, "group_size": 128, "dynamic": dynamic}
    paths = ["h.18.gate_proj", "h.1.gate_proj", "h.1.down", "h.10.down", "g.h.1.down"]
    specs = V1.specs(config, [f"{path}.qweight" for path in paths])
    assert [str(specs[path]) for path in paths] == [
        "int8-g64",
        "int2-g128",
        "int4-g128-asym",
        "int4-g128-asym",
        "int4-g128",
    ]
    with pytest.raises(
        QlabError, match=r"^h\.2\.up has codes in the files, and '-:\.\*\\\\.up' in `dynamic` says"
    ):
        V1.specs(config, ["h.2.up.qweight"])
    assert V1.specs(config, ["h.2.up.weight"]) == {}


@pytest.mark.parametrize(
    "config, name",
    [
        ({}, "gptq"),
        ({"checkpoint_format": "gptq"}, "gptq"),
        ({"format": "gptq_v2"}, "gptq_v2"),
        (
            {"checkpoint_format": "GPTQ_V2", "format": "gptq_v2", "desc_act": True},
            "gptq_v2_desc_act",
        ),
        ({"desc_act": True}, "gptq_desc_act"),
    ],
)
def test_the_config_chooses_the_version(config, name):
    assert reader({"quant_method": "gptq", **config}) is CODECS[name]


@pytest.mark.parametrize(
    "config, message",
    [
        ({"format": "marlin"}, "GPTQ format marlin; qlab reads gptq or gptq_v2"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "GPTQ format gptq and gptq_v2"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"desc_act": "yes"}, "desc_act 'yes'"),
        ({"bits": 5}, "^m has bits 5; qlab reads 2, 3, 4, 8"),
        ({"bits": True}, "^m has bits True"),
        ({"group_size": 0}, "^m has group_size 0"),
        ({"group_size": None}, "^m has group_size None"),
        ({"sym": 1}, "^m has sym 1"),
        ({"pack_dtype": "int64"}, "^m has pack_dtype 'int64'"),
        ({"adapter": {"rank": 8}}, "^m has adapter {'rank': 8}"),
        ({"dynamic": ["m"]}, "no table of patterns"),
        ({"dynamic": {"m": 4}}, "no table of patterns"),
        ({"dynamic": {"(": {}}}, r"the pattern '\(' in `dynamic`, which is no regular expression"),
        ({"dynamic": {"+:m": {"bits": 16}}}, "^m has bits 16"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(config, message):
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, **config}
    with pytest.raises(QlabError, match=message):
        reader(config).specs(config, ["m.qweight"])


def test_configs_in_files_of_their_own_are_read():
    raw = {
        "bits": 4,
        "group_size": 128,
        "damp_percent": 0.1,
        "desc_act": False,
        "sym": True,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
    }
    config = LEGACY_CONFIGS["quantize_config.json"](raw)
    assert reader(config).specs(config, ["m.qweight"]) == {"m": Int(4, Tile(1, 128))}
    assert LEGACY_CONFIGS["quantize_config.json"]({"quant_method": "awq"})["quant_method"] == "awq"


@settings(max_examples=200)
@given(odd_configs(V1.config({"m.0.q": INT4, "m.1.q": ASYM, "m.2.q": None})))
def test_odd_configs_are_refused_or_mean_specs(config):
    config = {**config, "quant_method": "gptq"}
    try:
        specs = reader(config).specs(config, ["m.0.q.qweight", "m.1.q.qweight", "m.2.q.weight"])
    except QlabError:
        return
    assert all(isinstance(spec, Int) and spec.bits in (2, 3, 4, 8) for spec in specs.values())
