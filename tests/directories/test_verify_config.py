"""A directory's config.json is held to the reference's and to what was certified of it; each
difference is named."""

import json
import shutil

import pytest
import torch
from model_folders import rewrite

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, outside
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g32")
ROPE = "rope_parameters.rope_theta"


@pytest.mark.parametrize(
    "edited, words",
    [
        (
            lambda c: c["rope_parameters"].update(rope_theta=5000),
            f"config.json has {ROPE} 5000 where the reference has 10000.0",
        ),
        (
            lambda c: c.update(num_attention_heads=8),
            "config.json has num_attention_heads 8 where the reference has 4",
        ),
        (
            lambda c: c.update(rms_norm_eps=1e-5),
            "config.json has rms_norm_eps 1e-05 where the reference has 1e-06",
        ),
        (
            lambda c: c.update(hidden_act="gelu"),
            'config.json has hidden_act "gelu" where the reference has "silu"',
        ),
        (
            lambda c: c.update(tie_word_embeddings=True),
            "config.json has tie_word_embeddings true where the reference has false",
        ),
        (
            lambda c: c.update(logit_scale=0.5),
            "config.json has logit_scale 0.5 where the reference has none",
        ),
        (
            lambda c: c.update(head_dim=None, num_key_value_heads=None),
            "config.json has num_key_value_heads 4 where the reference has 2",
        ),
    ],
)
def test_a_configuration_of_another_model_is_named_by_key(edited, words, copy, original):
    rewrite(copy / "config.json", edited)
    assert verify(copy, original).faults == [words]
    assert list(verify(copy, original).json()["config"]) == [words.split()[2]]


@pytest.mark.parametrize(
    "edited",
    [
        lambda c: c.update(
            transformers_version="4.0",
            torch_dtype="float32",
            _name_or_path="here",
            use_cache=False,
            eos_token_id=[2, 3],
        ),
        lambda c: c.pop("dtype"),
        lambda c: c.update(
            rms_norm_eps=float(torch.tensor(1e-6))
        ),  # through float32, as GGUF files store it
        lambda c: [
            c.pop(key) for key in ("attention_bias", "hidden_act", "head_dim")
        ],  # transformers' defaults
        lambda c: c.update(
            rope_theta=c.pop("rope_parameters")["rope_theta"], rope_scaling=None
        ),  # as older releases say it
    ],
)
def test_another_way_to_say_the_same_configuration_is_no_fault(edited, copy, original):
    rewrite(copy / "config.json", edited)
    assert verify(copy, original).faults == []


def test_a_configuration_that_transformers_refuses_is_compared_as_it_stands(copy, original):
    rewrite(
        copy / "config.json",
        lambda c: c.update(num_hidden_layers=10**6, rms_norm_eps=float("nan"), window=None),
    )
    assert [fault.split()[2] for fault in verify(copy, original).faults] == [
        "num_hidden_layers",
        "rms_norm_eps",
    ]
    rewrite(copy / "config.json", lambda c: c.pop("mlp_bias"))
    assert (
        "config.json has no mlp_bias where the reference has false" in verify(copy, original).faults
    )
    model = shutil.copytree(original, copy.with_name("model"))
    shutil.copy(copy / "config.json", model)
    assert verify(copy, model).faults == []  # NaN is NaN


@pytest.mark.parametrize(
    "words",
    [
        "rope_theta 5000 where the reference has 10000",
        "no window where the reference has 64",
        "rope.factor 8 where the reference has none",
    ],
)
def test_the_configuration_of_an_architecture_that_nobody_knows_is_compared_as_it_stands(
    words, original, tmp_path
):
    model = shutil.copytree(original, tmp_path / "model")
    said = {"model_type": "nobody_knows", "rope_theta": 10000, "window": 64}
    (model / "config.json").write_text(json.dumps(said))
    out = quantize_files(model, rtn(SPEC), tmp_path / "out").path
    assert verify(out, model).faults == []
    key, value = words.split()[:2] if not words.startswith("no ") else ("window", None)
    other = {"rope": {"factor": 8}} if "." in key else {key: value and int(value)}
    rewrite(out / "config.json", lambda c: c.update(other))
    assert verify(out, model).faults == [f"config.json has {words}"]


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}


@pytest.mark.parametrize(
    "edited",
    [
        lambda q: q.update(ignore=[]),
        lambda q: q.update(kv_cache_scheme=INT8),
        lambda q: q["config_groups"]["group_0"].update(
            input_activations=INT8 | {"strategy": "token"}
        ),
        lambda q: q["config_groups"]["group_0"].update(format="int-quantized"),
    ],
)
def test_a_quantization_config_that_was_edited_is_found(edited, copy, original):
    rewrite(copy / "config.json", lambda c: edited(c["quantization_config"]))
    faults = verify(copy, original).faults
    assert (
        len(faults) == 1
        and "quantization_config of its config.json is not the one that was written with its codes"
        in faults[0]
    )
    assert verify(copy, original).json()["retold"]
    (copy / "qlab.json").unlink()
    assert verify(copy, original).faults == []  # who could say


def test_a_hash_of_the_configuration_that_is_gone_is_missed(copy, original):
    rewrite(copy / "qlab.json", lambda record: record.pop("quantization_config"))
    assert len(verify(copy, original).faults) == 1 and verify(copy, original).retold


@pytest.mark.parametrize("codec", ["compressed-tensors", "awq"])
def test_a_head_that_the_recipe_untied_is_no_fault_of_the_configuration(codec, saved, tmp_path):
    source = saved("llama", torch.float16, tie_word_embeddings=True)
    recipe = chain(rtn(SPEC), at("lm_head", outside(rtn(SPEC))))
    out = quantize(open_checkpoint(source), recipe, None, tmp_path / "out").path
    there = convert(out, codec, tmp_path / "there").path
    anew = convert(out, codec, tmp_path / "anew", requantize=parse_spec("int4-g16")).path
    assert [verify(path, source).faults for path in (out, there, anew)] == [[], [], []]
    plain = quantize(open_checkpoint(source), rtn(SPEC), None, tmp_path / "plain").path
    # The head is the embedding still.
    rewrite(plain / "config.json", lambda c: c.update(tie_word_embeddings=False))
    assert verify(plain, source).faults == [
        "config.json has tie_word_embeddings false where the reference has true"
    ]
