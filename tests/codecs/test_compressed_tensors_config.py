"""The compressed-tensors config: which modules a group names, as the format's own library reads it,
and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.algebra.spec import parse_spec
from qlab.codecs import CODECS
from qlab.errors import QlabError

CODEC = CODECS["compressed-tensors"]
INT4, INT8, ASYM = parse_spec("int4-g16"), parse_spec("int8-channel"), parse_spec("int3-g32-asym")
LINEARS = [
    name for name, module in tiny("llama").named_modules() if isinstance(module, torch.nn.Linear)
]
NAMES = [
    f"h.{i}.{name}"
    for i in range(3)
    for name in ("q", "mlp.fc1", "mlp.fc2", "experts.0.w1", "experts.1.w1")
]


def some_specs(paths):
    choices = st.sampled_from([None, INT4, INT8, ASYM])
    return st.fixed_dictionaries(dict.fromkeys(paths, choices)).filter(
        lambda specs: any(specs.values())
    )


def library_reads(config):
    """What compressed-tensors attaches to each linear of a tiny llama: bits, symmetric, group."""
    model = tiny("llama")
    apply_quantization_config(model, QuantizationConfig.model_validate(config), show_progress=False)
    schemes = {
        path: getattr(model.get_submodule(path), "quantization_scheme", None) for path in LINEARS
    }
    return {
        p: s and (s.weights.num_bits, s.weights.symmetric, s.weights.group_size)
        for p, s in schemes.items()
    }


def file_names(specs):
    """The tensors of a directory whose modules are stored like this."""
    return [f"{path}.weight_packed" if spec else f"{path}.weight" for path, spec in specs.items()]


def as_read(specs):
    return {p: s and (s.bits, s.symmetric, s.tile.cols) for p, s in specs.items()}


@settings(max_examples=60)
@given(some_specs([*NAMES, "lm_head"]))
def test_specs_inverts_config(specs):
    quantized = {path: spec for path, spec in specs.items() if spec}
    assert CODEC.specs(CODEC.config(specs), file_names(specs)) == quantized


@settings(max_examples=20)
@given(some_specs(LINEARS))
def test_the_library_gives_every_module_the_same_spec(specs):
    assert library_reads(CODEC.config(specs)) == as_read(specs)


def test_config_is_what_the_library_would_write():
    config = CODEC.config({"a": INT4, "b": INT8, "lm_head": None})
    written = QuantizationConfig.model_validate(config).model_dump()
    assert written == {key: config.get(key) for key in written}
    assert json.dumps(config) == json.dumps(config, sort_keys=True)


def test_config_is_compact_and_its_targets_are_disjoint():
    one = CODEC.config(
        {"h.0.q": INT4, "h.1.q": replace(INT4, scale_dtype=torch.float16), "lm_head": None}
    )
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"] and one["ignore"] == ["lm_head"]
    groups = CODEC.config({"h.0.q": INT4, "h.1.q": INT4, "h.0.v": INT4, "h.1.v": INT8})[
        "config_groups"
    ]
    assert [g["targets"] for g in groups.values()] == [["h.0.v", r"re:h\.\d+\.q$"], ["h.1.v"]]


def test_overlapping_targets_are_read_as_the_library_reads_them():
    attention = "model.layers.1.self_attn"
    groups = [
        (2, ["Linear"]),
        (3, ["re:.*q_proj"]),
        (4, ["re:.*attn"]),
        (5, [f"{attention}.q_proj"]),
    ]
    config = CODEC.config({"m": INT4})
    scheme = config["config_groups"]["group_0"]
    config["config_groups"] = {
        str(i): scheme | {"targets": targets, "weights": scheme["weights"] | {"num_bits": bits}}
        for i, (bits, targets) in enumerate(groups)
    }
    config["ignore"] = [f"re:{attention}.k", "lm_head"]
    expected = library_reads(config)
    specs = CODEC.specs(config, file_names(expected))
    assert as_read(specs) == {path: read for path, read in expected.items() if read}
    assert {s.bits for s in specs.values()} == {2, 4, 5}
    config["ignore"] = ["Linear"]
    assert set(library_reads(config).values()) == {None}
    with pytest.raises(QlabError, match="names no spec for it"):
        CODEC.specs(config, file_names(expected))


def test_configs_of_older_releases_are_read():
    weights = {
        "num_bits": 4,
        "type": "int",
        "group_size": 16,
        "actorder": None,
        "observer": "minmax",
        "block_structure": None,
        "observer_kwargs": {},
        "scale_dtype": None,
        "zp_dtype": None,
    }
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": None,
        "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
    }
    assert CODEC.specs(config, ["a.weight_packed"]) == {"a": INT4}


@pytest.mark.parametrize(
    "where, change, message",
    [
        ("config", {"quant_method": "gptq"}, "quant_method 'gptq'"),
        ("config", {"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ("config", {"sparsity_config": {"format": "marlin-24"}}, "marlin-24"),
        ("config", {"moe_sparsity_config": {"format": "dense"}}, "moe_sparsity_config"),
        ("config", {"config_groups": {"W9A16": ["Linear"]}}, "group W9A16 is neither"),
        ("config", {"config_groups": ["W4A16"]}, "config_groups .*no JSON object"),
        ("config", {"ignore": [["lm_head"]]}, "ignore .*no list of names"),
        ("config", {"ignore": ["re:("]}, "no regular expression"),
        ("group", {"format": "marlin-24"}, "group_0 has format 'marlin-24'"),
        ("group", {"format": "mxfp4-pack-quantized"}, "which holds no int4-g16"),
        ("group", {"weights": None}, "names no spec for it"),
        (
            "group",
            {"input_activations": {"num_bits": 8, "strategy": "channel", "dynamic": True}},
            "inputs have a scale per",
        ),
        ("group", {"output_activations": {"num_bits": 8}}, "group_0 has output_activations"),
        ("group", {"targets": ["Conv1d"]}, "knows the classes Linear and Embedding only"),
        ("group", {"scheme": "x"}, "unknown key 'scheme'"),
        ("weights", {"type": "float"}, "fp4 with strategy 'group'"),
        ("weights", {"type": "complex"}, "type 'complex'"),
        ("weights", {"dynamic": True}, "group_0 weights has dynamic True"),
        ("weights", {"actorder": "random"}, "actorder 'random'"),
        (
            "weights",
            {"strategy": "block", "block_structure": "128"},
            "strategy 'block' with group_size 16",
        ),
        (
            "weights",
            {"strategy": "block", "group_size": None, "block_structure": "128"},
            "block_structure",
        ),
        ("weights", {"num_bits": "4"}, "num_bits '4'"),
        ("weights", {"group_size": [16]}, "group_size"),
        ("weights", {"strategy": "channel"}, "strategy 'channel' with group_size 16"),
        ("weights", {"num_bits": 16}, "int16 is not a grid"),
    ],
)
def test_specs_refuses_by_name(where, change, message):
    config = CODEC.config({"a": INT4})
    group = config["config_groups"]["group_0"]
    {"config": config, "group": group, "weights": group["weights"]}[where].update(change)
    with pytest.raises(QlabError, match=message):
        CODEC.specs(config, ["a.weight_packed"])
