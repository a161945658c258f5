"""What a job holds: one block at a time, whatever the depth, and about as much as its plan says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from model_folders import bits_equal, tensors
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

MiB = 1 << 20
JOB = """
import json, os, sys, torch
from qlab.data.calibration import from_ids
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.driver.quantize import quantize
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import rules
torch.set_num_threads(1)
path, out, method, samples, memory = sys.argv[1:]
model = open_checkpoint(path)
ids = torch.randint(0, 512, (int(samples), int(os.environ.get("LENGTH", "128"))), generator=torch.Generator().manual_seed(0))
gptq, rtn = METHODS["gptq"], METHODS["rtn"]
METHODS = METHODS | {"gptq in attention": lambda spec: rules({"*.self_attn.*": gptq(spec), "*": rtn(spec)})}
result = quantize(model, METHODS[method](parse_spec("int4-g64")), None if method == "rtn" else from_ids(model, ids), out,
                  memory=int(memory) or None)
print(json.dumps({"peak": result.peak_rss_bytes, "predicted": result.plan.peak_bytes, "held": dict(result.plan.memory),
                  "at_once": result.plan.experts_at_once}))
"""  # noqa: E501


def llama(
    path, hidden: int, intermediate: int, blocks: int, dtype=torch.float32, vocabulary: int = 512
):
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
    )
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    return path


def measure(path, method: str, samples: int = 4, memory: int = 0, **environment: str) -> dict:
    """The peak and the prediction of one job, in a process of its own."""
    arguments = [path, path.with_name(f"out-{memory}"), method, str(samples), str(memory)]
    command = [sys.executable, "-W", "error:::qlab", "-c", JOB, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_depth(tmp_path):
    # Freed memory goes back to the system at once here, so that the peak is what is held, not what
    # malloc keeps for later.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "262144"}
    models = {
        blocks: llama(tmp_path / str(blocks) / "model", 512, 1536, blocks) for blocks in (2, 12)
    }
    peaks = [measure(path, "gptq in attention", **at_once)["peak"] for path in models.values()]
    block = 4 * (4 * 512 * 512 + 3 * 512 * 1536)
    assert peaks[1] - peaks[0] < block, [peak // MiB for peak in peaks]  # for ten blocks more


@pytest.mark.parametrize(
    "method, dtype, intermediate",
    [
        ("rtn", torch.bfloat16, 4096),
        ("gptq", torch.float32, 4096),
        ("awq", torch.bfloat16, 2048),
    ],
)
def test_the_plan_predicts_the_peak_of_a_wide_model(method, dtype, intermediate, tmp_path):
    seen = measure(llama(tmp_path / "model", 1024, intermediate, 1, dtype), method)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen


def test_the_plan_predicts_the_peak_of_a_small_model_with_a_large_vocabulary(tmp_path):
    seen = measure(llama(tmp_path / "model", 192, 512, 2, torch.bfloat16, 49152), "gptq")
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    assert any("embeddings" in what for what in seen["held"])


def test_the_plan_counts_the_scores_of_an_attention_that_is_written_out(tmp_path):
    """Softcapped scores are a number for every head and pair of tokens, first in the model's dtype
    and then in fp32, twice."""
    config = AutoConfig.for_model(
        "gemma2",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=16,
        vocab_size=512,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    seen = measure(tmp_path / "model", "gptq", samples=1, LENGTH="2048")
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    written_out = (
        model.config._attn_implementation == "eager"
    )  # transformers 5.17 has one operation for it
    assert (seen["held"]["activations"] > 16 * 2048**2 * (2 + 4 + 4)) == written_out


def test_experts_whose_statistics_do_not_fit_are_observed_in_parts_that_do(tmp_path):
    at_once = {"MALLOC_MMAP_THRESHOLD_": "262144"}
    config = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=1024,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=32,
        num_experts_per_tok=2,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        vocab_size=512,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(
        tmp_path / "model"
    )
    free = measure(
        tmp_path / "model", "rtn-weighted", 17, **at_once
    )  # two batches, so that moments are added up
    budget = int(
        free["peak"] - 200 * MiB
    )  # a second moment has 4 MiB, there are 32, and up to three of each at a time
    tight = measure(tmp_path / "model", "rtn-weighted", 17, budget, **at_once)
    assert free["at_once"] is None and tight["at_once"] in (4, 8, 16)
    assert tight["peak"] <= budget and tight["predicted"] <= budget, (free, tight)
    first, second = (tensors(tmp_path / f"out-{memory}") for memory in (0, budget))
    assert first.keys() == second.keys() and all(
        bits_equal(t, second[name]) for name, t in first.items()
    )


LIMITED = """
import json, resource, sys
import psutil, torch
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn
from qlab.driver.quantize import quantize
from qlab.algebra.spec import parse_spec
torch.set_num_threads(1)
path, out, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
result = quantize(open_checkpoint(path), rtn(parse_spec("int4-g64")), None, out)
print(json.dumps({"data": psutil.Process().memory_info().data, "sites": len(result.sites)}))
"""


def limited(*arguments):
    # what is freed goes back to the system at once, so that the limit is on what is held
    command, environment = (
        [sys.executable, "-c", LIMITED, *map(str, arguments)],
        {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    )
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def large_llama(path, size):
    """A model directory of at least this many bytes, block by block: it never is in memory. Returns
    the number of its sites."""
    hidden, intermediate = 1024, 4096
    per_block = 2 * (4 * hidden * hidden + 3 * hidden * intermediate)
    blocks = -(-size // per_block)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        vocab_size=256,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    one = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict()
    config.num_hidden_layers = blocks
    config.save_pretrained(path)
    for i in range(blocks):
        own = {
            name.replace("layers.0.", f"layers.{i}."): tensor
            for name, tensor in one.items()
            if "layers.0." in name
        }
        save_file(own, path / f"block-{i}.safetensors")
    save_file(
        {name: tensor for name, tensor in one.items() if "layers.0." not in name},
        path / "outside.safetensors",
    )
    return 7 * blocks


def test_a_model_four_times_larger_than_the_memory_is_quantized(tmp_path):
    large_llama(tmp_path / "one", 1)  # what is left when one block is done is the program itself
    limit = limited(tmp_path / "one", tmp_path / "first", 0)["data"] + 192 * MiB
    sites = large_llama(tmp_path / "model", 4 * limit)
    size = sum(file.stat().st_size for file in (tmp_path / "model").glob("*.safetensors"))
    done = limited(tmp_path / "model", tmp_path / "out", limit)
    assert done["sites"] == sites and size >= 4 * limit
