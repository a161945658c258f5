"""With --offload the sums that a rank owns lie in files until a step asks for them."""

from model_folders import contents, random_tokens
from ranks import LENGTH, run_ranks

from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Elsewhere, PerExpert
from qlab.driver import batches
from qlab.driver.divided import At, Divided
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq

RECIPE = gptq(parse_spec("int4-g16"))
CASES = [("llama", "quantized"), ("qwen3_moe", "reference")]


def quantized(source, inputs, out, offload):
    batches.BATCH_TOKENS = LENGTH
    data, model = random_tokens(source, samples=5, length=LENGTH), open_checkpoint(source)
    quantize(model, RECIPE, data, out, inputs=inputs, offload=offload)


def lying(rank, cases, folder, offload):
    """Of the statistics that this rank has when a step begins, whether they lie in files."""
    apply, found = Divided.apply, set()

    def applied(self, stage, graph, stats):
        for statistic in stats.values():
            if isinstance(statistic, At) and statistic.state is not None:
                states = statistic.state
                in_files = isinstance(states, Elsewhere)
                if isinstance(states, PerExpert):
                    in_files = not isinstance(states.states, tuple)
                found.add(in_files)
        return apply(self, stage, graph, stats)

    Divided.apply = applied
    try:
        for source, inputs in cases:
            quantized(source, inputs, folder / source.name, offload)
    finally:
        Divided.apply = apply
    return found


def test_sums_lie_in_files_and_the_bytes_are_the_same(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)
    cases = [(saved(family, num_hidden_layers=1), inputs) for family, inputs in CASES]
    for source, inputs in cases:
        quantized(source, inputs, tmp_path / "alone" / source.name, None)
    folder = tmp_path / "ranks"
    assert run_ranks(tmp_path, 2, lying, cases, folder, tmp_path / "off") == [{True}] * 2
    for source, _ in cases:
        whole = contents(tmp_path / "alone" / source.name)
        assert contents(folder / source.name) == whole, source.name


def test_the_plan_of_ranks_holds_one_sum_at_a_time(saved, tmp_path):
    model, data = open_checkpoint(saved("qwen3_moe")), random_tokens(saved("qwen3_moe"))
    plain, away = (
        plan(model, RECIPE, data, ranks=2, inputs="reference", offload=of).memory
        for of in (None, tmp_path)
    )
    assert away["owned statistics"] == 4 * 64**2 < plain["owned statistics"]
