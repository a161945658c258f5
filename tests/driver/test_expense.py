"""What a plan says that a run costs, beside the operations of a run that are counted."""

from collections import Counter
from dataclasses import replace
from math import prod

import pytest
import torch
from model_folders import random_tokens
from quick import QUICK
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import qlab
from qlab.algebra.spec import parse_spec
from qlab.driver.expense import Devices, share_of
from qlab.driver.job import Job
from qlab.driver.plan import plan, plan_of
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

aten = torch.ops.aten
INT4 = parse_spec("int4-g32")
FACTOR = 2.0  # between what a step declares and what is counted
SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256}


def of_square(share):
    """Operations of a factor of matrices [..., n, n]: a share of n^3 each."""
    return lambda a, *_, out_shape=None, **__: int(share * prod(a[:-2]) * a[-1] ** 3)


def of_scores(q, k, v, *_, out_shape=None, **__):
    return 2 * prod(q[:2]) * q[2] * k[2] * (q[3] + v[3])


# what torch's counter has no formula for
COUNTED = {
    aten.linalg_cholesky_ex: of_square(1 / 3),
    aten.cholesky_inverse: of_square(2 / 3),
    aten._linalg_solve_ex: of_square(2 / 3),
    aten._linalg_svd: of_square(20),
    aten._linalg_eigh: of_square(9),
    aten.linalg_solve_triangular: lambda a, b, *_, out_shape=None, **__: prod(b) * a[-1],
    aten._scaled_dot_product_flash_attention_for_cpu: of_scores,
}
DECLARED = [
    name
    for name, method in QUICK.items()
    if any(s.operations is not None and s.operations.of(64, 64) for s in method(INT4))
]


@pytest.fixture(scope="module")
def source(saved):
    return saved("llama", **SIZES)


def counting(recipe, counts):
    """The recipe whose steps count their operations."""

    def of(stage):
        def run(graph, stats):
            with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
                result = stage.apply(graph, stats)
            counts[stage.name] += counter.get_total_flops()
            return result

        return replace(stage, apply=run)

    return tuple(map(of, recipe))


def run(model, recipe, data):
    for _ in qlab.apply(model, recipe, data).segments():
        pass


@pytest.mark.parametrize("name", DECLARED)
def test_steps_take_the_operations_that_they_declare(source, name):
    model, data = open_checkpoint(source), random_tokens(source, samples=16, length=64)
    recipe = QUICK[name](INT4)
    counts = Counter()
    run(model, counting(recipe, counts), data)
    planned = plan_of(Job(model=model, recipe=recipe, data=data, codec=None))
    of_plan = {e.stage: e.operations for e in planned.expenses}
    for stage in recipe:
        if stage.operations is not None and stage.operations.of(64, 64):
            assert 1 / FACTOR < of_plan[stage.name] / counts[stage.name] < FACTOR, stage.name


@pytest.mark.parametrize("method", QUICK)
def test_every_method_that_rounds_weights_by_itself_declares_operations(method):
    undeclared = {s.name for s in QUICK[method](INT4) if s.spec is not None and not s.operations}
    assert undeclared <= {"guidedquant", "kv_cache"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek_v3"])
def test_a_pass_takes_two_operations_for_each_weight_that_a_token_meets(saved, family):
    dense = {"first_k_dense_replace": 3} if family == "deepseek_v3" else {}
    folder = saved(family, **dense)
    model, data = open_checkpoint(folder), random_tokens(folder)
    planned = plan(model, gptq(INT4), data)
    (forward,) = [e for e in planned.expenses if e.stage == "forward"]
    decoder = AutoModel.from_pretrained(folder).eval()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        decoder(data.ids)
    assert forward.operations / planned.passes == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_second_moment_takes_two_k_squared_for_each_row_of_an_input(saved):
    folder = saved("qwen3_moe")
    model, data = open_checkpoint(folder), random_tokens(folder)
    for everything in (False, True):
        planned = plan(model, gptq(INT4), data, calibrate_all_experts=everything)
        (statistics,) = [e for e in planned.expenses if e.stage == "statistics"]
        visits = 4 if everything else 2
        one = 64**2 + 64**2 + 64**2 + visits * (64**2 + 32**2)  # qkv, o, router, experts
        assert statistics.operations == 2 * 2.0 * data.count * one


def test_ranks_share_the_work_and_send_sums_codes_and_states(source):
    model, data = open_checkpoint(source), random_tokens(source)
    costs = {
        ranks: {e.stage: e for e in plan(model, gptq(INT4), data, ranks=ranks).expenses}
        for ranks in (1, 2, 64)
    }
    assert all(not e.sent and e.slowest == e.operations for e in costs[1].values())
    for ranks in (2, 64):
        for stage, whole in costs[1].items():
            each = costs[ranks][stage]
            assert each.operations == whole.operations
            assert whole.operations / ranks <= each.slowest <= whole.operations
    h, m = 128, 256
    # one batch is one part, and rank 0 has it, with q, gate, o and down: others' are k, v and up
    assert costs[2]["statistics"].sent == costs[2]["statistics"].received == 4 * 2 * h**2
    weights = 2 * h * h + 2 * h * h // 2 + 3 * h * m
    assert costs[2]["codes"].sent == weights * (1 + 4 / 32)  # and a scale for 32 of them
    assert costs[2]["forward"].sent == 0 and costs[2]["forward"].slowest > 0  # rank 0 has them all
    # q, k and v: q on one rank, k and v on the other; gate and up, one each
    assert costs[2]["gptq"].slowest < 0.8 * costs[1]["gptq"].operations


def test_parts_of_the_batches_do_not_depend_on_ranks():
    assert [share_of(40, ranks) for ranks in (1, 2, 14)] == [1.0, 21 / 40, 3 / 40]
    assert share_of(40, 16) == share_of(40, 1000) == 3 / 40 and share_of(1, 8) == 1.0


def test_ranks_hold_less_and_a_plan_that_does_not_fit_is_refused(source):
    model, data = open_checkpoint(source), random_tokens(source, samples=64)
    one, two = (plan(model, gptq(INT4), data, ranks=ranks) for ranks in (1, 2))
    own = [each.peak_bytes - each.memory["process"] for each in (one, two)]
    assert 0 < own[1] <= own[0] + two.memory.get("owned statistics", 0)
    two.check(two.peak_bytes)
    with pytest.raises(QlabError, match="on each of 2 ranks and the budget"):
        two.check(two.peak_bytes - 1)


def test_seconds_are_the_sum_of_what_the_slowest_rank_does_at_its_rates(source):
    model, data = open_checkpoint(source), random_tokens(source)
    planned = plan(model, gptq(INT4), data, ranks=2)
    slow = planned.at(Devices(flops=1.0, float32=1.0, read=1.0, link=1.0, call=1.0))
    of_all = [e.slowest + e.calls + e.read + e.received for e in planned.expenses]
    assert slow["hours"] * 3600 == pytest.approx(sum(of_all))
    fast = planned.at(Devices(flops=2.0, float32=2.0, read=2.0, link=2.0, call=0.5))
    assert fast["hours"] == pytest.approx(slow["hours"] / 2)


def test_a_method_without_data_reads_writes_and_tells_codes(source):
    planned = plan(open_checkpoint(source), rtn(INT4), ranks=3)
    read, codes, *others = [e for e in planned.expenses if e.stage != "rtn"]
    assert (read.stage, codes.stage, others) == ("read", "codes", [])
    assert planned.traffic.keys() == {"codes"}


def test_a_step_of_ones_own_is_said_to_be_uncounted(source):
    own = qlab.each_weight("own", lambda W, stats, spec: None, INT4)
    assert plan(open_checkpoint(source), own).undeclared == ["own"]
