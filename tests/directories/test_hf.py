"""After `import qlab.hf`, from_pretrained gives what qlab.lower gives, saves what it read, and
never invents a weight."""

import json
import shutil

import pytest
import torch
from families import MIXTURES, VISION, tiny
from foreign import DENSE, FORMATS, directory
from library import write_with_the_library
from model_folders import bits_equal, contents, rewrite, tensors
from rotations import CASES
from test_verify import edit
from tolerances import MODEL
from torchao.quantization import Int8WeightOnlyConfig
from torchao.utils import TorchAOBaseTensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FineGrainedFP8Config,
    TorchAoConfig,
)
from transformers.quantizers import auto
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import qlab
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.directories.convert import convert
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering.weights.modules import QExperts, QLinear, QuantizedWeight
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn
from qlab.model.running import head

pytestmark = pytest.mark.usefixtures("door")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """made(codec, family) -> a tiny model in the format of the codec."""
    written = {}

    def make(codec="compressed-tensors", family="llama"):
        if (codec, family) not in written:
            source, folder = saved(family, torch.bfloat16), tmp_path_factory.mktemp("made")
            first = quantize(
                open_checkpoint(source), rtn(parse_spec("int4-g32")), None, folder / "first"
            ).path
            written[codec, family] = (
                first
                if codec == "compressed-tensors"
                else convert(first, codec, folder / "out").path
            )
        return written[codec, family]

    return make


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_what_is_turned_at_run_time_is_turned_and_saved(tmp_path):
    write_with_the_library(
        tiny("llama").bfloat16(), tmp_path / "quip", transforms=CASES["inputs and outputs"]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "quip")
    assert torch.equal(logits(model), logits(qlab.lower(tmp_path / "quip")))
    model.save_pretrained(tmp_path / "again")
    before, after = tensors(tmp_path / "quip"), tensors(tmp_path / "again")
    assert before.keys() == after.keys() and all(
        bits_equal(before[name], after[name]) for name in before
    )
    assert torch.equal(logits(qlab.lower(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("codec", ["compressed-tensors", "gptq", "gptq_v2", "awq"])
def test_from_pretrained_is_lower(codec, quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized(codec))
    lowered = qlab.lower(quantized(codec))
    assert (
        model.dtype == torch.bfloat16 and sum(isinstance(m, QLinear) for m in model.modules()) == 14
    )
    assert not any(p.is_meta for p in model.parameters()) and not any(
        b.is_meta for b in model.buffers()
    )
    assert torch.equal(logits(model), logits(lowered))
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "opt", "gpt_neox"])
def test_families_with_biases_and_tied_heads(family, quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized(family=family))
    assert torch.equal(logits(model), logits(qlab.lower(quantized(family=family))))


@pytest.mark.parametrize("family", MIXTURES)
def test_fused_experts_of_packed_codes(family, quantized, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(quantized(family=family))
    lowered = qlab.lower(quantized(family=family))
    assert (
        sum(isinstance(m, QExperts) for m in model.modules())
        == sum(isinstance(m, QExperts) for m in lowered.modules())
        > 0
    )
    assert not any(p.is_meta for p in model.parameters()) and torch.equal(
        logits(model), logits(lowered)
    )
    model.save_pretrained(tmp_path / "again")
    old, new = tensors(quantized(family=family)), tensors(tmp_path / "again")
    assert old.keys() == new.keys()
    # transformers keeps a router's correction in float32, which holds what the file says
    assert [name for name in old if not bits_equal(old[name].to(new[name].dtype), new[name])] == []


@pytest.mark.filterwarnings("ignore:no .*kernel")
@pytest.mark.parametrize(
    "family, weights, inputs",
    [
        ("mixtral", "nvfp4", None),
        ("deepseek_v3", "fp8-channel", None),
        ("qwen3_moe", "int8-channel", "int8-channel"),
        ("qwen2_vl", "fp8-b32x32", "fp8-g32"),
        ("llava", "int4-g16", None),
    ],
)
def test_mixtures_and_decoders_behind_a_tower_of_any_spec(family, weights, inputs, saved, tmp_path):
    rounding = () if inputs is None else quantize_inputs(parse_spec(inputs))
    path = quantize(
        open_checkpoint(saved(family)),
        chain(rtn(parse_spec(weights)), rounding),
        None,
        tmp_path / "out",
    ).path
    maker = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    model, loaded = maker.from_pretrained(path, output_loading_info=True)
    expected = reference(path)
    assert not loaded["unexpected_keys"] and not loaded["missing_keys"]
    # Sums of integers are exact and those of the reference are not: what is rounded behind them may
    # land on the neighbouring code.
    within = MODEL[torch.float32 if inputs is None else torch.bfloat16]
    assert (logits(model) - expected).norm() < within * expected.norm()
    model.save_pretrained(tmp_path / "again")
    old, new = tensors(path), tensors(tmp_path / "again")
    assert (
        old.keys() == new.keys()
        and [key for key in old if not bits_equal(old[key].to(new[key].dtype), new[key])] == []
    )


@pytest.mark.parametrize("codec", ["compressed-tensors", "awq"])
def test_what_is_saved_is_what_was_read(codec, quantized, tmp_path):
    AutoModelForCausalLM.from_pretrained(quantized(codec)).save_pretrained(tmp_path / "again")
    old, new = tensors(quantized(codec)), tensors(tmp_path / "again")
    assert old.keys() == new.keys() and all(bits_equal(old[name], new[name]) for name in old)
    configs = [
        json.loads((path / "config.json").read_text())["quantization_config"]
        for path in (quantized(codec), tmp_path / "again")
    ]
    assert configs[0] == configs[1]
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")),
        logits(qlab.lower(quantized(codec))),
    )


def reference(path):
    """The logits of qlab's own reading, in float32."""
    reading = read(open_checkpoint(path), qlab.from_ids(open_checkpoint(path), IDS))
    return head(reading.skeleton, IDS, reading.hidden)


@pytest.mark.filterwarnings("ignore:no .*kernel")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_comes_up_as_qlab_reads_it_and_is_saved_as_it_was(name, tmp_path):
    path = directory(name, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, device_map="cpu")
    computed, expected = logits(model), reference(path)
    # sums of integers are exact and those of the reference are not, as above
    within = MODEL[torch.bfloat16 if name == "W8A8" else torch.float32]
    assert (computed - expected).norm() < within * expected.norm()
    assert model.dtype == torch.float32
    assert sum(isinstance(m, QuantizedWeight) for m in model.modules()) == (
        0 if name in DENSE else 14
    )
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    model.to("cpu").save_pretrained(tmp_path / "again")
    old, new = tensors(path), tensors(tmp_path / "again")
    assert (
        old.keys() == new.keys()
        and [key for key in old if not bits_equal(old[key], new[key])] == []
    )
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (path, tmp_path / "again")
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["fp8 blocks", "nvfp4", "W8A8", "hqq", "gptq, desc_act"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:no .*kernel")
def test_every_dtype_of_activations(name, dtype, tmp_path):
    path = directory(name, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    computed, expected = logits(model), reference(path)
    assert computed.dtype == dtype and (computed - expected).norm() < MODEL[dtype] * expected.norm()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] <= 11


def test_slow_weights_are_announced(tmp_path):
    with pytest.warns(UserWarning, match=r"no kernel takes the codes of 14 weights \(mxfp4\)"):
        AutoModelForCausalLM.from_pretrained(directory("mxfp4", tmp_path, torch.bfloat16))


@pytest.mark.filterwarnings("ignore:no .*kernel")
@pytest.mark.parametrize(
    "codec, file", [("gptq", "quantize_config.json"), ("awq", "quant_config.json")]
)
def test_a_config_in_a_file_of_its_own_is_found(codec, file, quantized, tmp_path):
    """Older writers left config.json as it was; transformers alone would fill such a model at
    random."""
    legacy = shutil.copytree(quantized(codec), tmp_path / "legacy")
    config = json.loads((legacy / "config.json").read_text())
    said = config.pop("quantization_config")
    if codec == "awq":
        said = {
            "w_bit": said["bits"],
            "q_group_size": said["group_size"],
            "zero_point": True,
            "version": "GEMM",
        }
    (legacy / "config.json").write_text(json.dumps(config))
    (legacy / file).write_text(json.dumps({k: v for k, v in said.items() if k != "quant_method"}))
    model = AutoModelForCausalLM.from_pretrained(legacy)
    assert torch.equal(logits(model), logits(qlab.lower(quantized(codec))))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model)
    )
    assert open_checkpoint(tmp_path / "again").quantized == open_checkpoint(legacy).quantized


def test_unquantized_models_load_as_before(saved):
    path = saved("llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    assert getattr(model.config, "quantization_config", None) is None and torch.equal(
        logits(model), logits(tiny("llama"))
    )


@pytest.mark.filterwarnings("ignore:no int4 kernel")
def test_dtype_and_device_map(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized(), dtype=torch.float32, device_map="cpu")
    assert model.dtype == torch.float32 and torch.equal(
        logits(model), logits(qlab.lower(quantized(), dtype=torch.float32))
    )
    placed = AutoModelForCausalLM.from_pretrained(
        quantized(), dtype=torch.bfloat16, device_map="auto"
    )
    assert placed.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(QlabError, match=r"qlab puts a model on one device"):
        AutoModelForCausalLM.from_pretrained(
            quantized(), device_map={"model": "cpu", "lm_head": "meta"}
        )
    with pytest.raises(QlabError, match=r"no kernel takes torch.float64"):
        AutoModelForCausalLM.from_pretrained(quantized(), dtype=torch.float64)
    if not torch.cuda.is_available():
        with pytest.raises(QlabError, match="no CUDA device"):
            AutoModelForCausalLM.from_pretrained(quantized(), device_map="cuda")


@pytest.mark.filterwarnings("ignore:no .*kernel")
def test_tensors_of_other_names_in_the_files_have_the_dtype_that_was_asked_for(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized(family="mixtral"), dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(
        logits(model), logits(qlab.lower(quantized(family="mixtral"), dtype=torch.float32))
    )


UP = "mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name", [f"model.layers.0.{UP}_packed", f"model.layers.1.{UP}_scale", "model.norm.weight"]
)
def test_no_weight_is_ever_random(name, quantized, tmp_path):
    broken = shutil.copytree(quantized(), tmp_path / "broken")
    edit(broken, name, lambda tensor: None)
    with pytest.raises(QlabError, match=name.removesuffix("_packed").removesuffix("_scale")):
        AutoModelForCausalLM.from_pretrained(broken)


def test_a_model_of_another_class_is_refused(quantized):
    with pytest.raises(
        QlabError,
        match="holds a LlamaForCausalLM and not a LlamaModel; load it with the auto class",
    ):
        AutoModel.from_pretrained(quantized())


def test_the_directory_is_left_alone(quantized):
    before = contents(quantized())
    AutoModelForCausalLM.from_pretrained(quantized())
    assert contents(quantized()) == before


@pytest.mark.parametrize(
    "options, words",
    [
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight is not in it"),
        (
            {"num_hidden_layers": 1},
            r"model\.layers\.1\.input_layernorm\.weight is of shape \(64,\) in it",
        ),
        ({"mlp_bias": True}, r"model\.layers\.0\.mlp\.down_proj\.bias is not in it"),
        ({"vocab_size": 256}, r"lm_head\.weight is of shape \(128, 64\) in it"),
    ],
)
def test_options_that_ask_for_another_model_than_the_directorys_are_refused(
    options, words, quantized
):
    with pytest.raises(
        QlabError, match=f"of another model than from_pretrained was asked for: {words}"
    ):
        AutoModelForCausalLM.from_pretrained(quantized(), **options)


@pytest.mark.parametrize(
    "said", [lambda config: config, lambda config: config.to_dict()], ids=["object", "dict"]
)
def test_quantizing_while_loading_is_left_to_transformers(said, saved):
    config = FineGrainedFP8Config(dequantize=True)
    assert (
        type(auto.AutoHfQuantizer.from_config(said(config), pre_quantized=False))
        is FineGrainedFP8HfQuantizer
    )
    assert (
        type(auto.AutoHfQuantizer.from_config(config.to_dict(), pre_quantized=True)).__module__
        == "qlab.hf"
    )
    theirs = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(saved(), quantization_config=theirs)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, TorchAOBaseTensor)


def test_the_key_of_older_compressed_tensors_is_read(quantized, tmp_path):
    older = shutil.copytree(quantized(), tmp_path / "older")
    rewrite(
        older / "config.json", lambda c: c.update(compression_config=c.pop("quantization_config"))
    )
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(older)), logits(qlab.lower(quantized()))
    )
    assert open_checkpoint(older).quantized == open_checkpoint(quantized()).quantized
    there = convert(older, "awq", tmp_path / "awq").path
    assert "compression_config" not in json.loads((there / "config.json").read_text())
