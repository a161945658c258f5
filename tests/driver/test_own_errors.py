"""What a function of one's own raises is one sentence, with its step and where it ran; the error
itself is behind it."""

import pytest
import torch
from model_folders import random_tokens

import qlab

PLACE = r"\(test_own_errors.py, line \d+\): ZeroDivisionError: "
SITE = r"model\.layers\.0\.self_attn\.q_proj"


def raising(*arguments):
    return 1 // 0


def meets(error):
    """A step whose function raises this."""

    def fn(weight):
        raise error

    return qlab.each_cell("own", fn)


STAT = qlab.Stat(raising, torch.maximum, name="mine")
COMBINED = qlab.Stat(lambda seen: seen.x_nk.abs().max().float(), raising, name="mine")
TURNED = qlab.gauge("own", "*.o_proj:in", raising)
FAILING = {
    "cell": (qlab.each_cell("own", raising), f"^{SITE}: own failed {PLACE}"),
    "arrays": (qlab.each_weight("own", raising, None), f"^{SITE}: own failed {PLACE}"),
    "block": (qlab.each_block("own", raising), rf"^model\.layers\.0: own failed {PLACE}"),
    "make": (
        qlab.insert("own", "*:key", raising),
        rf"^model\.layers\.0\.self_attn:key: what own makes of it failed {PLACE}",
    ),
    "operation": (
        qlab.insert("own", "*:key", lambda wire, stats: raising, needs={"absmax"}),
        rf"^model\.layers\.0\.self_attn:key: the operation raising there failed {PLACE}",
    ),
    "gauge": (TURNED, rf"^model\.layers\.0\.self_attn\.o_proj:in: what own chooses failed {PLACE}"),
    "statistic": (
        qlab.each_cell("own", lambda weight: weight.cell, needs={STAT}),
        f"{SITE}, .*: the statistic mine failed {PLACE}",
    ),
    "combined": (
        qlab.each_cell("own", lambda weight: weight.cell, needs={COMBINED}),
        f"{SITE}, .*: the statistic mine, combined, failed {PLACE}",
    ),
}


def run(path, recipe, samples=2):
    """More than 2,048 tokens are observed in more than one batch."""
    data = random_tokens(path, samples=samples, length=128)
    return qlab.logits(qlab.apply(qlab.open(path), recipe, data), data.ids[:1])


@pytest.mark.parametrize("kind", FAILING)
def test_an_error_names_its_step_and_where_it_ran(kind, saved):
    recipe, words = FAILING[kind]
    with pytest.raises(qlab.QlabError, match=words + ".*; mend that function$") as refused:
        run(saved(), recipe, samples=17 if kind == "combined" else 2)
    assert isinstance(refused.value.__cause__, ZeroDivisionError)


def test_it_names_the_expert(saved):
    def fail_behind_the_first(weight):
        return weight.cell if not weight.expert else raising()

    words = r"^model\.layers\.0\..*experts.*, expert 1: own failed " + PLACE
    with pytest.raises(qlab.QlabError, match=words):
        run(saved("mixtral"), qlab.each_cell("own", fail_behind_the_first))


def test_what_needs_no_data_is_refused_by_the_plan_too(saved):
    path = saved()
    recipe, words = FAILING["make"]
    with pytest.raises(qlab.QlabError, match=words):
        recipe = qlab.chain(recipe, qlab.rtn("int4-g32"))
        qlab.plan(qlab.open(path), recipe, random_tokens(path, samples=1, length=8))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_is_about_the_machine_passes(error, saved):
    with pytest.raises(type(error)) as passed:
        run(saved(), meets(error))
    assert passed.value is error


def test_refusals_of_its_own_keep_their_words(saved):
    with pytest.raises(qlab.QlabError, match=f"^{SITE}: choose otherwise$"):
        run(saved(), meets(qlab.QlabError("choose otherwise")))
