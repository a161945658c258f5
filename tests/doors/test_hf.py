"""After `import qlab.hf`, from_pretrained gives what qlab.lower gives, saves what it read, and never invents a weight."""

import importlib
import json
import shutil

import pytest
import torch
from directories import bits_equal, contents, tensors
from families import MIXTURES
from test_verify import edit
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers import auto

import qlab
from qlab.convert import convert
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.lower.linear import QExperts, QLinear
from qlab.methods.rtn import rtn
from qlab.quantize import quantize
from qlab.spec import parse_spec

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def door():
    """qlab.hf is imported, and transformers has its own readers back when the test ends."""
    mappings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    before = [dict(mapping) for mapping in mappings]
    importlib.import_module("qlab.hf").register()
    yield
    for mapping, was in zip(mappings, before):
        mapping.clear()
        mapping.update(was)


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """made(codec, family) -> a tiny model in the format of the codec."""
    written = {}

    def make(codec="compressed-tensors", family="llama"):
        if (codec, family) not in written:
            source, folder = saved(family, torch.bfloat16), tmp_path_factory.mktemp("made")
            first = quantize(open_checkpoint(source), rtn(parse_spec("int4-g32")), None, folder / "first").path
            written[codec, family] = first if codec == "compressed-tensors" else convert(first, codec, folder / "out").path
        return written[codec, family]

    return make


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("codec", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_from_pretrained_is_lower(codec, made):
    model, lowered = AutoModelForCausalLM.from_pretrained(made(codec)), qlab.lower(made(codec))
    assert model.dtype == torch.bfloat16 and sum(isinstance(m, QLinear) for m in model.modules()) == 14
    assert not any(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert torch.equal(logits(model), logits(lowered))
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "opt", "gpt_neox"])
def test_families_with_biases_and_tied_heads(family, made):
    model = AutoModelForCausalLM.from_pretrained(made(family=family))
    assert torch.equal(logits(model), logits(qlab.lower(made(family=family))))


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_of_packed_codes(family, made, tmp_path):
    model, lowered = AutoModelForCausalLM.from_pretrained(made(family=family)), qlab.lower(made(family=family))
    assert sum(isinstance(m, QExperts) for m in model.modules()) == sum(isinstance(m, QExperts) for m in lowered.modules()) > 0
    assert not any(p.is_meta for p in model.parameters()) and torch.equal(logits(model), logits(lowered))
    model.save_pretrained(tmp_path / "again")
    old, new = tensors(made(family=family)), tensors(tmp_path / "again")
    assert old.keys() == new.keys()
    # transformers keeps a router's correction in float32, which holds what the file says
    assert [name for name in old if not bits_equal(old[name].to(new[name].dtype), new[name])] == []


@pytest.mark.parametrize("codec", ["compressed-tensors", "awq"])
def test_what_is_saved_is_what_was_read(codec, made, tmp_path):
    AutoModelForCausalLM.from_pretrained(made(codec)).save_pretrained(tmp_path / "again")
    old, new = tensors(made(codec)), tensors(tmp_path / "again")
    assert old.keys() == new.keys() and all(bits_equal(old[name], new[name]) for name in old)
    configs = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (made(codec), tmp_path / "again")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(qlab.lower(made(codec))))


@pytest.mark.filterwarnings("ignore:no int4 kernel")
def test_dtype_and_device_map(made):
    model = AutoModelForCausalLM.from_pretrained(made(), dtype=torch.float32, device_map="cpu")
    assert model.dtype == torch.float32 and torch.equal(logits(model), logits(qlab.lower(made(), dtype=torch.float32)))
    assert AutoModelForCausalLM.from_pretrained(made(), device_map="auto").device == model.device
    with pytest.raises(QlabError, match=r"qlab puts a model on one device"):
        AutoModelForCausalLM.from_pretrained(made(), device_map={"model": "cpu", "lm_head": "meta"})
    with pytest.raises(QlabError, match=r"no kernel takes torch.float64"):
        AutoModelForCausalLM.from_pretrained(made(), dtype=torch.float64)
    if not torch.cuda.is_available():
        with pytest.raises(QlabError, match="no CUDA device"):
            AutoModelForCausalLM.from_pretrained(made(), device_map="cuda")


UP = "mlp.up_proj.weight"


@pytest.mark.parametrize("name", [f"model.layers.0.{UP}_packed", f"model.layers.1.{UP}_scale", "model.norm.weight"])
def test_no_weight_is_ever_random(name, made, tmp_path):
    broken = shutil.copytree(made(), tmp_path / "broken")
    edit(broken, name, lambda tensor: None)
    with pytest.raises(QlabError, match=name.removesuffix("_packed").removesuffix("_scale")):
        AutoModelForCausalLM.from_pretrained(broken)


def test_a_model_of_another_class_is_refused(made):
    with pytest.raises(QlabError, match="holds a LlamaForCausalLM, which AutoModelForCausalLM loads, and not a LlamaModel"):
        AutoModel.from_pretrained(made())


def test_the_directory_is_left_alone(made):
    before = contents(made())
    AutoModelForCausalLM.from_pretrained(made())
    assert contents(made()) == before
