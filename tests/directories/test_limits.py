"""Directories four times larger than the memory that a process may take: every path without a model
stays below the limit.

The limit is set over what the imports took. Loading the model at once, under the same limit, has to
fail: it bites.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from qlab.files.directory import INDEX
from qlab.files.tensors import write

MiB = 1 << 20
JOB = """
import gc, json, os, resource, sys, torch
import transformers, qlab, qlab.lowering
from qlab.files.checkpoint import open_checkpoint
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
torch.set_num_threads(1)
small = torch.randn(256, 256) @ torch.randn(256, 256)
for action, path, out, limit in json.loads(sys.argv[1]):
    child = os.fork()  # the imports are paid for once
    if not child:
        break
    if os.waitpid(child, 0)[1]:
        sys.exit(action)
else:
    sys.exit()
model, recipe = open_checkpoint(path), qlab.rtn(qlab.parse_spec("int4-g32"))
gc.collect()
taken = 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1])
resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
if action == "model-free":
    quantize_files(model, recipe, out)
elif action == "convert":
    convert(model, "gptq", out)
elif action == "verify":
    assert not verify(model, out).faults
gc.collect()
try:
    held = [model.tensor(name) for name in model.stored]
    sys.exit("the limit does not bite")
except RuntimeError:
    print("done")
"""  # noqa: E501


def run(*actions):
    """Each action in a process of its own, which ends with an error where it fails."""
    # freed memory goes back to the system at once, so that the limit is on what is held, not on
    # what malloc keeps for later
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, "-c", JOB, json.dumps(actions, default=str)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["done"] * len(actions), done.stdout + done.stderr[-2000:]


def size(path):
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """256 MiB of an architecture that nobody knows."""
    path = tmp_path_factory.mktemp("unknown")
    names = [f"layers.{i}.proj.weight" for i in range(64)]
    for part in range(4):
        chosen = names[part::4]
        write(
            path / f"{part}.safetensors",
            ((name, torch.randn(1024, 2048).to(torch.bfloat16)) for name in chosen),
        )
    (path / "config.json").write_text(json.dumps({"model_type": "nobody_knows"}))
    (path / INDEX).write_text(
        json.dumps(
            {
                "weight_map": {
                    name: f"{part}.safetensors" for part in range(4) for name in names[part::4]
                }
            }
        )
    )
    return path


def test_the_model_free_path_and_what_follows_it(unknown, tmp_path):
    quarter = size(unknown) // 4
    run(
        ("model-free", unknown, tmp_path / "out", quarter),
        ("verify", tmp_path / "out", unknown, quarter),
        ("convert", tmp_path / "out", tmp_path / "gptq", 56 * MiB),
    )
