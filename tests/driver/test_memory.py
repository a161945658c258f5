"""What a job holds: one block at a time, whatever the depth, and about as much as its plan says."""

import pytest
import torch
from measured import INT4, server
from model_folders import bits_equal, tensors
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qlab.algebra.transform import rules
from qlab.data.calibration import from_ids
from qlab.driver import batches
from qlab.driver.parts import MOST
from qlab.driver.plan import plan
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

MiB = 1 << 20


@pytest.fixture(scope="module")
def job():
    """job(name, ...): a job of `measured`, in a process that allocates as those of users do."""
    with server() as run:
        yield run


@pytest.fixture(scope="module")
def exact_job():
    """A job whose freed memory goes back to the system at once, so that its peak is what is held,
    not what malloc keeps for later."""
    with server(MALLOC_MMAP_THRESHOLD_="262144") as run:
        yield run


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


def measure(
    job, path, method: str, samples: int = 4, length: int = 128, memory=None, **options
) -> dict:
    """The peak and the prediction of one job."""
    out = path.with_name("-".join(["out", str(memory), *options]))
    return job(
        "peak",
        path=path,
        out=out,
        method=method,
        samples=samples,
        length=length,
        memory=memory,
        **options,
    )


def test_memory_does_not_grow_with_depth(exact_job, tmp_path):
    models = {
        blocks: llama(tmp_path / str(blocks) / "model", 512, 1536, blocks) for blocks in (2, 6)
    }
    peaks = [measure(exact_job, path, "gptq in attention")["peak"] for path in models.values()]
    block = 4 * (4 * 512 * 512 + 3 * 512 * 1536)
    # for four blocks more, of which the codes alone would be half a block, packed
    assert peaks[1] - peaks[0] < block / 4, [peak // MiB for peak in peaks]


@pytest.mark.parametrize(
    "method, dtype, intermediate",
    [
        ("rtn", torch.bfloat16, 4096),
        ("gptq", torch.float32, 4096),
        ("awq", torch.bfloat16, 2048),
    ],
)
def test_the_plan_predicts_the_peak_of_a_wide_model(method, dtype, intermediate, job, tmp_path):
    seen = measure(job, llama(tmp_path / "model", 1024, intermediate, 1, dtype), method)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen


@pytest.mark.parametrize("windows", [1, MOST, MOST + 1])
def test_a_plan_knows_that_a_matrix_less_is_in_memory_with_offload(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", 16)
    model = open_checkpoint(llama(tmp_path / "model", 128, 4096, 1))
    data, square = from_ids(model, torch.zeros(windows, 16, dtype=torch.long)), 4 * 4096**2
    plain, away = (
        plan(model, gptq(INT4), data, offload=of).memory for of in (None, tmp_path / "off")
    )
    held = [sum(memory.values()) - memory["process"] for memory in (plain, away)]
    assert held[0] - held[1] == square and plain["statistics"] - square == away["statistics"]


def test_with_offload_a_matrix_less_is_held_and_the_plan_says_so(exact_job, job, tmp_path):
    """With it freed memory goes back to the system in every process."""
    path, square = llama(tmp_path / "model", 512, 4096, 1, torch.bfloat16), 4 * 4096**2
    plain = measure(exact_job, path, "gptq without sweeps", 17)  # two batches
    away = measure(job, path, "gptq without sweeps", 17, offload=tmp_path / "off")
    for seen in (plain, away):
        assert abs(seen["predicted"] / seen["peak"] - 1) < 0.15, seen
    assert plain["peak"] - away["peak"] > square / 2, (plain, away)
    first, second = (tensors(tmp_path / name) for name in ("out-None", "out-None-offload"))
    assert all(bits_equal(tensor, second[name]) for name, tensor in first.items())
    assert not list((tmp_path / "off").iterdir())


def test_a_plan_counts_codes_before_they_are_joined_and_while_they_are_written(saved):
    path = saved("qwen3_moe", num_experts=64, moe_intermediate_size=128)
    planned = plan(open_checkpoint(path), rtn(INT4), None)
    block = [row["shape"] for name, row in planned.sites.items() if ".layers.0." in name]
    numbers = [torch.Size(shape).numel() for shape in block]
    assert max(numbers) == 64 * 256 * 64  # of gate and up, fused
    assert planned.memory["codes"] == sum(numbers) + max(numbers) + sum(numbers)


def test_a_plan_counts_no_matrix_for_steps_that_read_none(tmp_path):
    model = open_checkpoint(llama(tmp_path / "model", 64, 4096, 1))
    data = from_ids(model, torch.zeros(2, 16, dtype=torch.long))
    one, *others = (
        plan(model, recipe, data).memory
        for recipe in (
            gptq(INT4),
            rules({"*": gptq(INT4)}),
            rules({"*gate_proj": rtn(INT4), "*up_proj": rtn(INT4), "*": gptq(INT4)}),
        )
    )
    for other in others:
        assert {**one, "process": 0} == {**other, "process": 0}


@pytest.mark.parametrize(
    "method, dtype, samples, length",
    [
        ("auto_round", torch.bfloat16, 2, 1024),
        ("qat", torch.float32, 4, 128),
    ],
)
def test_the_plan_predicts_the_peak_of_learning(method, dtype, samples, length, job, tmp_path):
    seen = measure(job, llama(tmp_path / "model", 1024, 2048, 1, dtype), method, samples, length)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.2, seen
    assert seen["held"]["learning"] > seen["peak"] / 3


@pytest.mark.parametrize(
    "method, dtype, samples",
    [
        ("kl_tune", torch.bfloat16, 4),
        ("qat_end_to_end", torch.float32, 2),
        ("allocate", torch.float32, 4),
        ("guidedquant", torch.float32, 4),
    ],
)
def test_the_plan_predicts_the_peak_of_a_bind(method, dtype, samples, job, tmp_path):
    seen = measure(job, llama(tmp_path / "model", 1024, 2048, 1, dtype), method, samples)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    # the moment in which a bind measures, or solves by what it measured
    assert sum(seen["held"].get(part, 0) for part in ("block", "statistics")) > seen["peak"] / 6


@pytest.mark.parametrize("method", ["kl_tune", "spinquant"])
def test_the_plan_predicts_what_binds_hold_of_a_large_vocabulary(method, job, tmp_path):
    path = llama(tmp_path / "model", 64, 128, 1, torch.bfloat16, 100_000)
    seen = measure(job, path, method, 2, 192)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    assert seen["held"]["logits"] == 4 * 192 * 4 * 100_000


def test_the_plan_predicts_the_peak_of_a_small_model_with_a_large_vocabulary(job, tmp_path):
    seen = measure(job, llama(tmp_path / "model", 192, 512, 2, torch.bfloat16, 49152), "gptq")
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    assert any("embeddings" in row for row in seen["held"])


def test_the_plan_counts_the_scores_of_an_attention_that_is_written_out(job, tmp_path):
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
    seen = measure(job, tmp_path / "model", "gptq", samples=1, length=2048)
    assert abs(seen["predicted"] / seen["peak"] - 1) < 0.25, seen
    # transformers 5.17 has one operation for it
    written_out = model.config._attn_implementation == "eager"
    assert (seen["held"]["activations"] > 16 * 2048**2 * (2 + 4 + 4)) == written_out


def test_experts_whose_statistics_do_not_fit_are_observed_in_parts_that_do(exact_job, tmp_path):
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
    path = tmp_path / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    # two batches, so that moments are added up
    free = measure(exact_job, path, "rtn-weighted", 17)
    # a second moment has 4 MiB, and there are 32
    budget = int(free["peak"] - 75 * MiB)
    tight = measure(exact_job, path, "rtn-weighted", 17, memory=budget)
    assert free["at_once"] is None and tight["at_once"] in (4, 8, 16)
    assert tight["peak"] <= budget and tight["predicted"] <= budget, (free, tight)
    first, second = (tensors(tmp_path / f"out-{memory}") for memory in (None, budget))
    assert first.keys() == second.keys()
    assert all(bits_equal(tensor, second[name]) for name, tensor in first.items())


def large_llama(path, size):
    """A model directory of at least this many bytes, block by block: it never is in memory. Returns
    the number of its sites."""
    hidden, intermediate = 512, 4096
    per_block = 4 * (4 * hidden * hidden + 3 * hidden * intermediate)
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
    one = AutoModelForCausalLM.from_config(config, dtype=torch.float32).state_dict()
    config.num_hidden_layers = blocks
    config.save_pretrained(path)
    for i in range(blocks):
        block = {
            name.replace("layers.0.", f"layers.{i}."): tensor
            for name, tensor in one.items()
            if "layers.0." in name
        }
        save_file(block, path / f"block-{i}.safetensors")
    outside = {name: tensor for name, tensor in one.items() if "layers.0." not in name}
    save_file(outside, path / "outside.safetensors")
    return 7 * blocks


def test_a_model_four_times_larger_than_the_memory_is_quantized(exact_job, tmp_path):
    """The memory is what the program itself leaves of that of the process."""
    one, model, memory = tmp_path / "one", tmp_path / "model", 96 * MiB
    large_llama(one, 1)  # what is left when one block is done is the program itself
    program = exact_job("within", path=one, out=tmp_path / "first", limit=None)["data"]
    sites, limit = large_llama(model, 4 * memory), program + memory
    assert sum(file.stat().st_size for file in model.glob("*.safetensors")) >= 4 * memory
    assert exact_job("within", path=model, out=tmp_path / "out", limit=limit)["sites"] == sites
