"""What a job holds: one block at a time, whatever the depth, and about as much as its plan says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

MiB = 1 << 20
JOB = """
import json, sys, torch
from qlab.calibration import from_ids
from qlab.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.quantize import quantize
from qlab.spec import parse_spec
torch.set_num_threads(1)
path, out, method, samples = sys.argv[1:]
model = open_checkpoint(path)
ids = torch.randint(0, 512, (int(samples), 128), generator=torch.Generator().manual_seed(0))
result = quantize(model, METHODS[method](parse_spec("int4-g64")), None if method == "rtn" else from_ids(model, ids), out)
print(json.dumps({"peak": result.peak_rss_bytes, "predicted": result.plan.peak_bytes, "held": dict(result.plan.memory)}))
"""


def llama(path, hidden: int, intermediate: int, blocks: int, dtype=torch.float32, vocabulary: int = 512):
    config = AutoConfig.for_model("llama", hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
                                  num_attention_heads=8, num_key_value_heads=8, vocab_size=vocabulary)  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(path)
    return path


def measure(path, method: str, samples: int = 4, **environment: str) -> dict:
    """The peak and the prediction of one job, in a process of its own."""
    command = [sys.executable, "-W", "error:::qlab", "-c", JOB, path, path.with_name("out"), method, str(samples)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_memory_does_not_grow_with_depth(tmp_path):
    # Freed memory goes back to the system at once here, so that the peak is what is held, not what malloc keeps for later.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {n: measure(llama(tmp_path / str(n) / "model", 512, 1536, n), "gptq", **at_once)["peak"] for n in (2, 6, 12)}
    block = 4 * (4 * 512 * 512 + 3 * 512 * 1536)
    assert max(peaks.values()) - min(peaks.values()) < block / 2, peaks  # ten more blocks: less than half a block


@pytest.mark.parametrize("method, dtype", [("rtn", torch.bfloat16), ("gptq", torch.float32), ("awq", torch.bfloat16)])
def test_the_plan_predicts_the_peak_of_a_wide_model(method, dtype, tmp_path):
    seen = measure(llama(tmp_path / "model", 1024, 4096, 1, dtype), method)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_plan_predicts_the_peak_of_a_small_model_with_a_large_vocabulary(method, tmp_path):
    seen = measure(llama(tmp_path / "model", 192, 512, 2, torch.bfloat16, 49152), method)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    assert any("embeddings" in what for what in seen["held"])
