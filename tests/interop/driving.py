"""What the tests with other libraries share: a script run by the Python of another environment, and
weights compared."""

import os
import subprocess
import tempfile
from pathlib import Path

import torch

SHAPES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
)


def drive(venv, script, *arguments):
    """Run a script of this folder there; what it printed is in the error if it fails."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "GPTQMODEL_CPU_WORKERS": "2"
    }
    command = [
        Path(venv, "bin", "python").absolute(),
        Path(__file__).resolve().with_name(script),
        *arguments,
    ]
    with tempfile.TemporaryDirectory() as folder:  # GPTQModel writes its logs where it runs
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def assert_equal(weights, expected):
    """The same names, each with the same weight bit for bit."""
    assert weights.keys() == expected.keys()
    for path, W in expected.items():
        assert torch.equal(weights[path], W), path
