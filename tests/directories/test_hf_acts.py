"""What people do with from_pretrained and the model that it gave: options, copies, dense weights;
each works or is one sentence."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from families import tiny
from library import write_with_the_library
from model_folders import bits_equal, tensors
from rotations import CASES
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    GPTQConfig,
)

import qlab
from qlab.algebra.spec import parse_spec
from qlab.directories.convert import convert
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering.weights.modules import QuantizedWeight
from qlab.methods.rtn import rtn

pytestmark = [pytest.mark.usefixtures("door"), pytest.mark.filterwarnings("ignore:no int4 kernel")]
IDS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """made(codec, family) -> a tiny model in the format of the codec."""
    folder, written = tmp_path_factory.mktemp("made"), {}

    def make(codec="compressed-tensors", family="llama"):
        if (codec, family) not in written:
            first = qlab.quantize(
                open_checkpoint(saved(family, torch.bfloat16)),
                rtn(parse_spec("int4-g32")),
                None,
                folder / f"{family}-{codec}-first",
            ).path
            converted = codec != "compressed-tensors"
            written[codec, family] = (
                convert(first, codec, folder / f"{family}-{codec}").path if converted else first
            )
        return written[codec, family]

    return make


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def is_dense(model):
    return not any(isinstance(module, QuantizedWeight) for module in model.modules())


@pytest.mark.parametrize(
    "codec, option",
    [
        ("gptq", GPTQConfig(bits=4)),
        ("awq", AwqConfig(bits=4)),
        ("compressed-tensors", CompressedTensorsConfig()),
        ("gptq", {"quant_method": "gptq", "bits": 4}),
    ],
)
@pytest.mark.filterwarnings("error:.*quantization_config")
def test_the_methods_own_config_is_taken_beside_the_directorys(codec, option, quantized):
    model = load(quantized(codec), quantization_config=option)
    assert torch.equal(logits(model), logits(load(quantized(codec)))) and not is_dense(model)
    assert (
        model.config.quantization_config.to_dict()
        == json.loads((quantized(codec) / "config.json").read_text())["quantization_config"]
    )


def test_what_such_a_config_cannot_change_is_named(quantized):
    with pytest.warns(
        UserWarning, match=r"the directory says .*bits 4.* changes nothing of what is written there"
    ):
        load(quantized("gptq"), quantization_config=GPTQConfig(bits=8))
    with pytest.warns(
        UserWarning,
        match="backend of quantization_config chooses other kernels than qlab's and has no effect",
    ):
        load(quantized("gptq"), quantization_config=GPTQConfig(bits=4, backend="marlin"))
    with pytest.raises(
        QlabError, match="is quantized by gptq and quantization_config asks for bitsandbytes"
    ):
        load(quantized("gptq"), quantization_config=BitsAndBytesConfig(load_in_8bit=True))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("asked", ["option", "method"])
def test_a_dense_model_is_given_where_it_is_asked_for(family, asked, quantized, tmp_path):
    option = (
        {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        if asked == "option"
        else {}
    )
    model = load(quantized(family=family), dtype=torch.float32, **option)
    packed = load(quantized(family=family), dtype=torch.float32)
    if asked == "method":
        model = model.dequantize()
    assert (
        is_dense(model)
        and not hasattr(model.config, "quantization_config")
        and not model.is_quantized
    )
    torch.testing.assert_close(logits(model), logits(packed), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "dense")
    assert open_checkpoint(tmp_path / "dense").quantized == {} and torch.equal(
        logits(load(tmp_path / "dense")), logits(model)
    )


def test_no_dense_model_is_made_of_what_is_rotated_at_run_time(tmp_path):
    write_with_the_library(tiny("llama"), tmp_path / "quip", transforms=CASES["inputs and outputs"])
    with pytest.raises(
        QlabError, match="rotates or rounds at run time, which no dense weight does"
    ):
        load(tmp_path / "quip", quantization_config=CompressedTensorsConfig(dequantize=True))


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_copy_computes_and_saves_the_same(again, family, quantized, tmp_path):
    model = load(quantized(family=family))
    expected, second = logits(model), again(model)
    del model
    assert torch.equal(logits(second), expected)
    second.save_pretrained(tmp_path / "again")
    old, new = tensors(quantized(family=family)), tensors(tmp_path / "again")
    assert old.keys() == new.keys() and all(
        bits_equal(old[name].to(new[name].dtype), new[name]) for name in old
    )


def test_training_reaches_what_is_not_quantized(quantized):
    model = load(quantized(), dtype=torch.float32)
    model(input_ids=IDS, labels=IDS).loss.backward()
    plain = load(
        quantized(),
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    plain(input_ids=IDS, labels=IDS).loss.backward()
    for name in (
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
    ):
        gradient, expected = (m.get_parameter(name).grad for m in (model, plain))
        assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.filterwarnings("ignore:.*torch_dtype")
@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.float32},
        {"dtype": "float32"},
        {"dtype": "auto"},
        {"device_map": torch.device("cpu")},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
        {"attn_implementation": "eager"},
        {"revision": "main"},
        {"local_files_only": True},
        {"use_safetensors": True},
        {"max_memory": {"cpu": "1GB"}, "device_map": "auto"},
        {"key_mapping": {"^nothing": "something"}},
        {"ignore_mismatched_sizes": True},
        {"use_cache": False},
    ],
)
def test_options_that_change_nothing_of_the_weights(options, quantized):
    model, loaded = load(quantized(), **options, output_loading_info=True)
    assert (
        not loaded["missing_keys"]
        and not loaded["unexpected_keys"]
        and not loaded["mismatched_keys"]
    )
    dtype = torch.float32 if "float32" in str(options) else torch.bfloat16
    assert model.dtype == dtype and model.config._attn_implementation == options.get(
        "attn_implementation", "qlab_one_token"
    )
    torch.testing.assert_close(
        logits(model), logits(load(quantized(), dtype=dtype)), rtol=0.05, atol=0.05
    )


def test_a_model_in_a_subfolder_and_one_with_a_config_object(quantized, tmp_path):
    shutil.copytree(quantized(), tmp_path / "all" / "inner")
    expected = logits(load(quantized()))
    assert torch.equal(logits(load(tmp_path / "all", subfolder="inner")), expected)
    assert torch.equal(
        logits(load(quantized(), config=AutoConfig.from_pretrained(quantized()))), expected
    )


def test_other_weights_than_the_directorys_are_refused(quantized, tmp_path):
    other = shutil.copytree(quantized(), tmp_path / "other")
    shutil.copy(next(other.glob("*.safetensors")), other / "model.fp16.safetensors")
    with pytest.raises(
        QlabError, match=r"chose model\.fp16\.safetensors \(by variant or use_safetensors\)"
    ):
        load(other, variant="fp16")
    with pytest.raises(QlabError, match="was given no files"):
        type(tiny("llama")).from_pretrained(
            None, config=AutoConfig.from_pretrained(quantized()), state_dict=tensors(quantized())
        )
    with pytest.raises(
        QlabError,
        match="quantized experts have an implementation of their own, and 'eager' was asked for",
    ):
        load(quantized(family="mixtral"), experts_implementation="eager")


def test_names_that_only_a_key_mapping_explains_are_refused(quantized, tmp_path):
    renamed = shutil.copytree(quantized(), tmp_path / "renamed")
    state = tensors(renamed)
    for file in renamed.glob("*.safetensors*"):
        file.unlink()
    save_file(
        {name.replace("model.", "old.", 1): t for name, t in state.items()},
        renamed / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(QlabError, match=r"names that only a key_mapping explains|are no linear"):
        load(renamed, key_mapping={"^old": "model"})
