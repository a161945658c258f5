"""The time in a plan: work counted from shapes, over rates that probes measure. No test asserts
seconds of this machine."""

import math

import pytest
import torch

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, each_weight
from qlab.data.calibration import from_ids
from qlab.driver import duration
from qlab.driver.duration import WORK, said
from qlab.driver.plan import plan
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.methods.gptq import gptq
from qlab.methods.kl_tune import kl_tune
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g32")
H, I, LAYERS = 64, 128, 2  # of the tiny models
WEIGHTS = LAYERS * (2 * H * H + 2 * H * H // 2 + 3 * H * I)  # two key-value heads of four


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """One unit of every kind of work takes a second."""
    for name in ("product_rate", "element_rate", "call_seconds", "byte_rate"):
        monkeypatch.setattr(duration, name, lambda *_: 1.0)


@pytest.fixture(scope="module")
def model(saved):
    return open_checkpoint(saved())


def windows(model, samples, length):
    return from_ids(model, torch.zeros(samples, length, dtype=torch.long))


def test_work_is_counted_from_shapes(model):
    work = plan(model, gptq(INT4), windows(model, 4, 16)).work
    assert work.products == 64 * WEIGHTS + LAYERS * 64 * 16 * H and work.programs == 1
    statistics = LAYERS * 64 * (3 * H**2 + I**2)
    products = LAYERS * (H * (2 * H * H + H * H + 2 * H * I) + I * H * I)
    assert work.float32 == pytest.approx(statistics + WORK["gptq", True].rows * products)
    assert work.bytes == 3 * sum(stored.nbytes for stored in model.stored.values())


def test_a_method_without_data_runs_no_model_and_touches_what_it_is_for(model):
    everything, some = (
        plan(model, recipe).work for recipe in (rtn(INT4), at("*.down_proj", rtn(INT4)))
    )
    assert everything.products == 0 and everything.elements == WORK["rtn", False].elements * WEIGHTS
    assert some.elements == WORK["rtn", False].elements * LAYERS * H * I


def test_more_tokens_take_longer_and_the_range_holds_the_estimate(model):
    short, long = (plan(model, gptq(INT4), windows(model, samples, 16)) for samples in (4, 8))
    assert (
        short.work.seconds() < long.work.seconds()
        and short.seconds[0] < short.work.seconds() < short.seconds[1]
    )
    assert short.json()["seconds"] == list(short.seconds)
    assert (
        "estimated time" in short.summary()
        and "of this processor" in short.summary()["estimated time"]
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_command_line_has_been_measured(name):
    assert all(
        (stage.name, bool(stage.needs)) in WORK for stage in METHODS[name](INT4) if stage.spec
    )


def test_a_stage_of_ones_own_counts_as_unknown(model):
    stage = each_weight("own", lambda W, stats, spec: None, INT4)
    assert plan(model, stage).work.elements == duration.UNKNOWN.elements * WEIGHTS


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_multiply_what_is_routed_to_them(family, saved):
    mixture = open_checkpoint(saved(family))
    routed, everywhere = (
        plan(mixture, gptq(INT4), windows(mixture, 4, 16), calibrate_all_experts=all_)
        for all_ in (False, True)
    )
    assert (
        routed.work.products < everywhere.work.products
        and routed.work.float32 < everywhere.work.float32
    )


@pytest.mark.parametrize(
    "seconds, words",
    [(0.123, "0.12 s"), (119, "120 s"), (150, "2.5 min"), (7300, "2 h"), (200_000, "2.3 days")],
)
def test_in_words(seconds, words):
    assert said(seconds) == words


def test_rates_are_measured():
    assert duration._fastest(lambda: torch.ones(8).add(1)) > 0


def test_what_a_bind_runs_is_counted(model):
    data = windows(model, 8, 16)
    tuned = chain(gptq(INT4), kl_tune(steps=4, windows=2))
    plain, tuned = (plan(model, recipe, data) for recipe in (gptq(INT4), tuned))
    # of 8 windows one is held out and looked at 5 times; the reference runs on all; every step
    # takes two windows through each block forward, forward again and backward
    passes = math.ceil((8 + 5 + 4 * 2 * (2 + 2)) / 8)
    of_pass = 128 * WEIGHTS + LAYERS * 128 * 16 * H
    assert tuned.work.products - plain.work.products == passes * of_pass
    assert [row.windows for row in tuned.schedule] == [0, 8]
