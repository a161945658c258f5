"""Workers of `python -m qlab.bench gpu`, and what they do: checks and timings through the
interpreter, rivals, configurations that can be imported."""

import subprocess
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import gpu_fakes
import pytest
import torch

from qlab.bench.__main__ import main
from qlab.bench.contenders import Case, Unavailable
from qlab.bench.gpu import crew as crews
from qlab.bench.gpu import device, jobs, rivals
from qlab.bench.gpu.outcome import breaks_device
from qlab.bench.gpu.plan import (
    ROWS,
)
from qlab.lowering.tuning.random_weight import random_weight, rounded_once
from qlab.lowering.weights.integers import is_exact


@pytest.fixture
def bench(command):
    return partial(command, main, "gpu")


# ---------------------------------------------------------------- workers
def outcomes_of(factory, *parts, environment=()):
    """What becomes of calls by one worker, for parts of them with the seconds that each may
    take."""
    crew = crews.Crew(f"gpu_fakes:{factory}", 1, dict(environment))
    outcomes = {}
    try:
        for calls, limit in parts:
            crew.run(calls, limit, lambda call, outcome: outcomes.update({call.key: outcome}), True)
    finally:
        crew.close()
    return outcomes


def test_a_worker_that_dies_is_replaced():
    outcomes = outcomes_of(
        "dying", ([gpu_fakes.call("a", "harness"), gpu_fakes.call("b", "clocks")], 300.0)
    )
    assert outcomes["a"]["error"] == "its process died with exit code 9"
    assert outcomes["b"]["result"]["name"] == "Fake H200"


def test_what_breaks_a_device_is_known_wherever_it_is_said():
    said = "CUDA error: an illegal memory access was encountered"
    assert breaks_device({"error": f"AcceleratorError: {said}"})
    assert breaks_device({"result": {"absent": f"failed: RuntimeError: {said}"}})
    assert not breaks_device({"error": "OutOfMemoryError: CUDA out of memory"})


def test_what_hangs_is_ended(tmp_path):
    begun = {"FAKE_BEGUN": str(tmp_path / "begun")}
    hanging = [gpu_fakes.call("b", "harness"), gpu_fakes.call("c", "clocks")]
    parts = ([gpu_fakes.call("a", "clocks")], 300.0), (hanging, 3.0)
    outcomes = outcomes_of("hanging", *parts, environment=begun)
    assert "result" in outcomes["a"]
    assert outcomes["b"]["error"] == "it did not end within the 3 s of its step"
    assert outcomes["c"]["error"] == "it did not begin within the 3 s of its step"


def test_kernels_run_in_workers_through_the_interpreter(tmp_path, monkeypatch):
    """A case that is right, one that is unknown, and a tuning that computes what it times."""
    from qlab_kernels.acceptance import cases

    name = next(c.name for c in cases("int4", (9, 0)) if c.name == "dequantize float16 g128")
    place = {"op": "int4_mm", "dtype": "float16", "group": 128, "zeros": False}
    size = {"n": 64, "k": 128, "m": 1}
    calls = [
        gpu_fakes.call("right", "check", family="int4", name=name),
        gpu_fakes.call("unknown", "check", family="int4", name="no case"),
        gpu_fakes.call("tuned", "tune", keep=2, **place, **size),
    ]
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # from the beginning: some library imports Triton
    environment = {"QLAB_CACHE_DIR": str(tmp_path / "configs")}
    outcomes = outcomes_of("running", (calls, 300.0), environment=environment)
    assert outcomes["right"]["result"] == {"excess": 0.0}
    assert "has no case 'no case'" in outcomes["unknown"]["error"]
    assert outcomes["tuned"]["result"]["source"] == "measured", outcomes["tuned"]
    assert not outcomes["tuned"]["result"]["failures"]


# ---------------------------------------------------------------- jobs
def test_what_was_tuned_can_be_imported(bench, tmp_path, monkeypatch, command):
    from qlab.cli import main as qlab_main
    from qlab_kernels import cache
    from qlab_kernels.config import Problem

    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "out" / "configs"))
    cache.refresh()
    place = {"op": "int4_mm", "dtype": "bfloat16", "group": 128, "zeros": False}
    size = {"n": 64, "k": 256, "m": 4}
    result = jobs.tune(gpu_fakes.bench(), keep=3, **place, **size)
    assert result["us"] == 10.0 and result["timings"] >= 3
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "other"))
    cache.refresh()
    code, printed, _ = command(qlab_main, "cache", "import", tmp_path / "out" / "configs.json")
    assert code == 0 and "1 entries taken" in printed
    found = cache.lookup(Problem(cc=(9, 0), device="Fake H200", **place, **size))
    assert (found.source, found.entry.us) == ("user", 10.0)
    cache.refresh()


def test_the_harness_times_an_empty_kernel_and_a_copy():
    result = jobs.harness(gpu_fakes.bench())
    assert result["times"]["empty kernel"] == {"events_us": 10.0, "graph_us": 8.0, "cupti_us": None}
    assert result["copy_gbps"] == pytest.approx(2e-3 * 2**20 / 10.0)


def product(bench, rival, tokens):
    size = {"n": 64, "k": 128, "dtype": "bfloat16"}
    return jobs.product(bench, rival=rival, **size, tokens=tokens, seconds=0.1, profiled=False)


@pytest.mark.parametrize("rival", ["library", rivals.INT_MM, rivals.SCALED_MM])
def test_rivals_compute_the_product(rival):
    """On a CPU, where torch has the same operators: `checked` compares with fp32."""
    if rival == rivals.INT_MM and not is_exact():
        pytest.skip("this processor's sums of int8 products are not exact")
    result = product(gpu_fakes.running(), rival, [1, 3, 20])
    assert "absent" not in result and "error" not in result, result
    assert [row["m"] for row in result["rows"]] == [1, 3, 20]


@pytest.mark.parametrize("weights, inputs", ROWS)
def test_every_row_of_the_plan_is_measured(weights, inputs):
    result = jobs.row(
        gpu_fakes.bench(), weights=weights, inputs=inputs, n=128, k=256, tokens=[2], seconds=0.01
    )
    assert {row["kernel"] for row in result["rows"]} > {"dense"}


@pytest.mark.parametrize("rival", [rivals.MARLIN, rivals.HUMMING])
def test_absent_rivals_are_said(rival):
    result = product(gpu_fakes.bench(), rival, [1])
    assert result["absent"] == "runs on GPUs" and result["rows"] == []
    on_gpu = Case(
        n=64, k=128, dtype="bfloat16", group=128, zeros=False, device=torch.device("cuda")
    )
    with pytest.raises(Unavailable, match="is not installed"):
        rivals.FOREIGN[rival][0](on_gpu)


def test_marlin_is_called_as_vllm_calls_it(monkeypatch):
    """With stand-ins of vLLM's functions under the names of their arguments: the words are GPTQ's,
    and the scales go with them."""

    def repack(b_q_weight, perm, size_k, size_n, num_bits):
        assert b_q_weight.shape == (size_k // 8, size_n) and perm.numel() == 0 and num_bits == 4
        return b_q_weight

    def apply(x, weight, weight_scale, **others):
        shifts = torch.arange(0, 32, 4)[:, None]
        u = (weight[:, None] >> shifts & 15).reshape(x.shape[1], -1)
        group = x.shape[1] // weight_scale.shape[0]
        return x @ ((u - 8) * weight_scale.repeat_interleave(group, 0)).to(x.dtype)

    utils = SimpleNamespace(
        marlin_make_empty_g_idx=lambda device: torch.empty(0, dtype=torch.int32),
        marlin_make_workspace_new=lambda device: None,
        marlin_permute_scales=lambda s, size_k, size_n, group_size: s,
        apply_gptq_marlin_linear=apply,
    )
    path = "vllm.model_executor.layers.quantization.utils"
    modules = ["vllm", *(path.rsplit(".", i)[0] for i in range(3, -1, -1)), "vllm.scalar_type"]
    for name in modules:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["vllm"]._custom_ops = SimpleNamespace(gptq_marlin_repack=repack)
    sys.modules[path].marlin_utils = utils
    sys.modules["vllm.scalar_type"].scalar_types = SimpleNamespace(uint4b8="uint4b8")
    weight = random_weight(64, 256, 128, False, torch.device("cpu"))
    case = SimpleNamespace(
        device=torch.device("cuda"),
        zeros=False,
        n=64,
        k=256,
        group=128,
        torch_dtype=torch.float32,
        int4_bytes=1,
        weights=lambda _: [weight],
    )
    [marlin] = rivals.marlin(case)
    x = torch.randn(3, 256)
    assert torch.allclose(marlin(x), x @ rounded_once(weight, torch.float32).T, atol=1e-5)


def test_words_of_gptq():
    codes = torch.arange(-8, 8, dtype=torch.int8).view(1, 16)
    words = rivals.gptq_words(codes).flatten().tolist()
    assert [word & 0xFFFFFFFF for word in words] == [0x76543210, 0xFEDCBA98]


def test_readings_are_optional(monkeypatch):
    def absent(*args, **kwargs):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(device.subprocess, "run", absent)
    assert device.readings() is None
    said = subprocess.CompletedProcess((), 0, "550.1, 1980, 2619, 1980, 75.2, 31\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *args, **kwargs: said)
    assert device.readings()["driver"] == "550.1" and device.readings()["sm_mhz"] == "1980"
