"""A configuration alone plans as the model whose files it describes, in bounded memory and time."""

import json
import shutil

import pytest
from model_folders import rewrite

import qlab
from qlab import cli
from qlab.algebra.spec import parse_spec
from qlab.data.calibration import unread_windows
from qlab.driver.plan import plan
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.model.config_alone import is_alone, open_config

INT4 = parse_spec("int4-g16")
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


@pytest.fixture
def alone(saved, tmp_path):
    """alone(family, **edits) -> a folder with its config.json and nothing else."""

    def copy(family="llama", **edits):
        folder = tmp_path / family
        folder.mkdir()
        shutil.copy(saved(family) / "config.json", folder)
        rewrite(folder / "config.json", lambda config: config.update(edits))
        return folder

    return copy


def planned(model):
    return plan(model, gptq(INT4), unread_windows(4, 16), ranks=2)


@pytest.mark.parametrize("family", ["llama", "olmo2", "qwen3_moe", "deepseek_v3"])
def test_a_configuration_alone_plans_as_the_whole_model(saved, alone, family):
    whole, bare = planned(open_checkpoint(saved(family))), planned(open_config(alone(family)))
    assert bare.sites == whole.sites and bare.passes == whole.passes
    assert bare.expenses == whole.expenses and bare.unquantized == whole.unquantized
    memory = [{**each.memory, "process": 0} for each in (bare, whole)]
    assert memory[0] == memory[1]


def test_a_file_of_json_is_a_configuration_and_a_folder_with_weights_is_none(saved, alone):
    folder = alone()
    assert is_alone(folder) and is_alone(folder / "config.json") and not is_alone(saved("llama"))
    named = shutil.copy(folder / "config.json", folder / "another.json")
    assert open_config(named).stored.keys() == open_config(folder).stored.keys()


def test_fp8_takes_a_byte_for_each_weight_of_linears_and_a_scale_for_each_tile(alone):
    model = open_config(alone("deepseek_v3", quantization_config=FP8))
    shapes = {name: tensor.shape for name, tensor in model.stored.items()}
    experts = [name for name in shapes if ".experts." in name and name.endswith("_proj.weight")]
    assert experts and all(model.stored[name].dtype == "F8_E4M3" for name in experts)
    assert {str(spec) for spec in model.quantized.values()} == {"fp8-b16x16"}
    for name in experts:
        o, k = shapes[name]
        assert shapes[f"{name}_scale_inv"] == (-(-o // 16), -(-k // 16))
    for plain in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert plain in shapes and f"{plain}_scale_inv" not in shapes
    router = next(name for name in shapes if name.endswith("mlp.gate.weight"))
    assert model.stored[router].dtype != "F8_E4M3"
    assert planned(model).passes == 1


def test_modules_that_the_configuration_leaves_out_are_not_in_fp8(alone):
    kept = FP8 | {"modules_to_not_convert": ["lm_head", "self_attn"]}
    quantized = open_config(alone(quantization_config=kept)).quantized
    assert quantized and not any("self_attn" in name for name in quantized)


@pytest.mark.parametrize(
    "family, edits, words",
    [
        ("llama", {"num_hidden_layers": 10**9}, ("num_hidden_layers", "1000000000", "2,000")),
        ("gpt2", {"n_layer": 10**9}, ("n_layer", "1000000000")),
        ("llama", {"text_config": {"num_hidden_layers": 10**9}}, ("num_hidden_layers",)),
        ("mixtral", {"num_local_experts": 10**9}, ("config.json",)),
        ("llama", {"hidden_size": 2**60}, ("hidden_size", str(2**60), "2,147,483,648")),
        ("llama", {"hidden_size": 2**31}, ("embed_tokens.weight of 128 x 2147483648 numbers",)),
        ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("gptq", "fp8")),
        ("llama", {"dtype": "int8"}, ("dtype", "int8", "bfloat16")),
        ("llama", {"model_type": "nobody"}, ("nobody",)),
    ],
)
def test_what_no_model_has_is_refused_in_a_sentence(alone, family, edits, words):
    with pytest.raises(QlabError) as error:
        open_config(alone(family, **edits))
    said = str(error.value)
    assert "\n" not in said and "config.json" in said and all(word in said for word in words), said


def test_only_a_plan_takes_a_configuration_alone(alone, tmp_path, command):
    folder = alone()
    code, _, said = command(
        cli.main, "quantize", folder, "--method", "rtn", "--out", tmp_path / "o"
    )
    assert code == 2 and "safetensors" in said and "no weights" in said
    text = tmp_path / "my.jsonl"
    text.write_text('{"text": "a"}\n')
    code, _, said = command(cli.main, "plan", folder, "--calib", text)
    assert code == 2 and "--calib would not be used" in said and "--samples" in said


def test_hours_on_given_devices_are_printed_and_written(alone, tmp_path, command):
    rates = {"--device-flops": 1e9, "--device-read": 1e6, "--device-memory": 1e12, "--link": 1e6}
    options = [word for pair in rates.items() for word in pair]
    out = tmp_path / "plan.json"
    arguments = ("plan", alone(), "--spec", "int4-g16", "--samples", 4, "--length", 16)
    code, said, _ = command(cli.main, *arguments, "--ranks", 2, *options, "--json", out)
    assert code == 0 and "hours on 2 such devices" in said and "traffic per block" in said
    written = json.loads(out.read_text())
    assert written["devices"]["float32"] == 1e9 / 8 and written["ranks"] == 2
    seconds = written["seconds_of_stages"]
    assert seconds.keys() == {"read", "forward", "statistics", "gptq", "codes"}
    assert written["hours"] == pytest.approx(sum(seconds.values()) / 3600)
    code, _, said = command(cli.main, *arguments, "--device-memory", 1e6)
    assert code == 2 and "the budget is 1 MiB" in said


@pytest.mark.parametrize(
    "options, words",
    [
        (("--device-flops", "1e9"), ("--device-read",)),
        (("--device-read", "1e9"), ("--device-flops",)),
        (("--device-flops", "1e9", "--device-read", "1e9", "--ranks", "2"), ("--link",)),
        (("--device-flops", "-1", "--device-read", "1e9"), ("flops", "-1")),
        (("--device-memory", "nan"), ("--device-memory",)),
    ],
)
def test_figures_that_are_missing_or_no_rates_are_refused(alone, command, options, words):
    code, _, said = command(cli.main, "plan", alone(), *options)
    assert code == 2 and all(word in said for word in words)


def test_windows_on_paper_take_no_memory():
    windows = unread_windows(10**6, 4096)
    assert windows.count == 4096 * 10**6 and windows.ids.untyped_storage().nbytes() == 8


def test_a_plan_in_python_counts_ranks_from_one(saved):
    with pytest.raises(QlabError, match="ranks"):
        qlab.plan(saved("llama"), qlab.rtn("int4-g16"), ranks=0)
