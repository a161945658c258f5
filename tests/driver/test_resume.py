"""A killed run, resumed, leaves the bytes of one that was never killed, wherever the kill came."""

import os
import random
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from killing import KILLED, dying, finish, start
from model_folders import change, contents, random_tokens

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, rules
from qlab.driver.quantize import compare, quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.awq import awq_scale
from qlab.methods.gptaq import aim_at_reference
from qlab.methods.gptq import act_order, gptq
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")


@pytest.fixture(scope="module")
def source(saved):
    return saved("llama", num_hidden_layers=3)


def recipe(spec=SPEC, **options):
    """GPTQ where it is short, so that a run is; with a reference beside it, whose hidden states are
    carried too."""
    return rules(
        {
            "*.v_proj": chain(aim_at_reference(), gptq(spec, **options)),
            "*.down_proj": gptq(spec, **options),
            "*": rtn(SPEC),
        }
    )


@pytest.fixture(scope="module")
def job(source):
    """job(out, **options): three blocks, each calibrated on what the rounded ones before it
    produce."""
    model, data = open_checkpoint(source), random_tokens(source)
    return lambda out, **options: quantize(model, recipe(), data, out, **options)


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """What an uninterrupted run writes."""
    return contents(job(tmp_path_factory.mktemp("whole") / "out").path)


@pytest.fixture(scope="module")
def former(source, tmp_path_factory):
    """former(out) makes `out` an earlier output of qlab, which --overwrite may replace -> its
    contents."""
    quantized = quantize(
        open_checkpoint(source), rtn(SPEC), None, tmp_path_factory.mktemp("former") / "out"
    ).path
    return lambda out: contents(shutil.copytree(quantized, out, dirs_exist_ok=True))


def assert_whole(out, whole) -> None:
    assert contents(out) == whole
    assert [p.name for p in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_any_rename_and_resumed(overwrite, job, whole, former, tmp_path):
    """What is there right after a rename is there before the next one too."""
    points = first = 12 if overwrite else 0  # an existing output matters at the end only
    while True:
        out = tmp_path / f"{points + 1}" / "out"
        out.parent.mkdir()
        seen = former(out) if overwrite else None
        run = partial(job, out, overwrite=overwrite)
        status = finish(start(dying(run, points + 1, "before")))
        if status == 0:
            break  # every rename of the run has had its turn
        assert status == KILLED
        points += 1
        # Never something between the former output and the whole new one.
        assert not out.exists() or contents(out) == seen or whole.items() <= contents(out).items()
        assert finish(start(lambda out=out: job(out, resume=True))) == 0
        assert_whole(out, whole)
    assert points >= 18 and points - first >= 6 and contents(out) == whole
    out = tmp_path / "last" / "out"
    out.parent.mkdir()
    if overwrite:
        former(out)
    run = partial(job, out, overwrite=overwrite)
    assert finish(start(dying(run, points, "after"))) == KILLED
    job(out, resume=True)
    assert_whole(out, whole)


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_before_anything_was_written_and_resumed(when, job, whole, tmp_path):
    (tmp_path / "out").mkdir()
    assert finish(start(dying(lambda: job(tmp_path / "out", overwrite=True), 1, when))) == KILLED
    job(tmp_path / "out", overwrite=True, resume=True)
    assert_whole(tmp_path / "out", whole)


def test_killed_at_random_moments_and_resumed(job, whole, tmp_path):
    """The moments are of the processor's time, which other processes change little. A run that was
    not killed shows that the first one was slow."""
    _, status, used = os.wait4(start(lambda: job(tmp_path / "timed")), 0)
    assert status == 0
    duration, draw, killed = used.ru_utime + used.ru_stime, random.Random(0), 0
    for i in range(8):
        out = tmp_path / str(i) / "out"
        for resume in (False, True)[: 1 + i % 2]:  # every other one twice in a row
            moment = draw.uniform(0.1, 0.8) * duration

            def run(out=out, resume=resume, moment=moment):
                signal.setitimer(signal.ITIMER_PROF, moment)  # the signal ends the process
                job(out, resume=resume)

            died = finish(start(run)) == -signal.SIGPROF
            killed += died
            duration *= 1 if died or resume else 0.6
        job(out, resume=True)
        assert_whole(out, whole)
    assert killed >= 4  # the runs that start again after half of their work may be done


def test_a_killed_comparison_is_resumed(source, tmp_path):
    model = open_checkpoint(source)
    data = random_tokens(source)
    recipes = {"rtn": rtn(SPEC), "mixed": recipe()}
    compare(model, recipes, data, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for n in range(3, 33, 6):
        out = tmp_path / str(n)
        status = finish(
            start(dying(lambda out=out: compare(model, recipes, data, out), n, "after"))
        )
        assert status == KILLED
        compare(model, recipes, data, out, resume=True)
        assert contents(out) == expected


@pytest.fixture
def killed(job, tmp_path):
    """The output path of a run killed in its second block."""
    assert finish(start(dying(lambda: job(tmp_path / "out"), 8, "after"))) == KILLED
    return tmp_path / "out"


def test_only_the_same_job_may_resume(killed, source, saved):
    before = contents(killed.parent)
    model, data = open_checkpoint(source), random_tokens(source)
    others = [
        (model, rtn(SPEC), None, {}),
        (model, recipe(parse_spec("int4-g32")), data, {}),
        (model, recipe(damp=0.02), data, {}),
        (model, recipe(), random_tokens(source, seed=1), {}),
        (model, recipe(), random_tokens(source, samples=3), {}),
        (model, recipe(), data, {"dtype": torch.bfloat16}),
        (open_checkpoint(saved("llama", num_hidden_layers=3, seed=1)), recipe(), data, {}),
    ]
    for other, transform, tokens, options in others:
        with pytest.raises(QlabError, match="belongs to another job"):
            quantize(other, transform, tokens, killed, resume=True, **options)
    assert contents(killed.parent) == before


def test_what_a_stage_searched_for_and_how_scales_are_stored_belong_to_the_job(source, tmp_path):
    model, data, int4 = open_checkpoint(source), random_tokens(source), parse_spec("int4-g32")
    for name, first, second in (
        (
            "search",
            chain(awq_scale(parse_spec("int3-g32")), rtn(int4)),
            chain(awq_scale(parse_spec("int8-g32")), rtn(int4)),
        ),
        ("scales", rtn(int4), rtn(replace(int4, scale_dtype=torch.float16))),
        ("order", gptq(int4), gptq(int4, order=partial(act_order))),
    ):
        quantize(model, first, data, tmp_path / name)
        quantize(model, first, data, tmp_path / name, resume=True)
        with pytest.raises(QlabError, match="exists and holds something else"):
            quantize(model, second, data, tmp_path / name, resume=True)
    with pytest.raises(QlabError, match="exists and holds something else"):
        quantize(model, gptq(int4), data, tmp_path / "order", inputs="reference", resume=True)


def test_another_number_in_the_middle_of_a_file_is_another_job(source, tmp_path):
    model, out = shutil.copytree(source, tmp_path / "model"), tmp_path / "out"
    job = lambda **options: quantize(open_checkpoint(model), rtn(SPEC), None, out, **options)
    assert finish(start(dying(job, 8, "after"))) == KILLED
    change(model, model__layers__0__mlp__up_proj__weight=lambda t: t + 0.01)
    with pytest.raises(QlabError, match="belongs to another job"):
        job(resume=True)
    job()
    change(model, model__layers__0__mlp__up_proj__weight=lambda t: t + 0.01)
    with pytest.raises(QlabError, match="exists and holds something else"):
        job(resume=True)


def test_a_run_without_resume_starts_again(killed, job, whole):
    job(killed)
    assert_whole(killed, whole)


def test_templates_in_a_folder_of_their_own_are_copied_and_cleared_away(source, tmp_path):
    model = shutil.copytree(source, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    job = lambda: quantize(open_checkpoint(model), rtn(SPEC), None, tmp_path / "out")
    assert finish(start(dying(job, 18, "after"))) == KILLED
    assert (tmp_path / "out.partial" / "additional_chat_templates").is_dir()
    job()
    assert (
        tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    ).read_text() == "{{ tools }}"


def test_resuming_a_finished_job_changes_nothing(job, whole, tmp_path):
    out = job(tmp_path / "out").path
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    again = job(out, resume=True)
    assert {p: p.stat().st_mtime_ns for p in out.iterdir()} == before
    assert len(again.sites) == 21 and again.path == out
    assert_whole(out, whole)


def test_resuming_what_was_never_started_starts_it(job, whole, tmp_path):
    job(tmp_path / "out", resume=True)
    assert_whole(tmp_path / "out", whole)


@pytest.mark.parametrize("resume", [False, True])
def test_an_existing_output_is_refused_and_untouched(resume, job, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    with pytest.raises(QlabError, match=r"exists .* choose another, or --overwrite"):
        job(out, resume=resume)
    assert contents(tmp_path) == {"out/thesis.txt": b"all of it"}


def test_overwrite_replaces_the_whole_output(job, whole, former, tmp_path):
    out = tmp_path / "out"
    former(out)
    job(out, overwrite=True)
    assert_whole(out, whole)


def test_an_output_that_was_being_replaced_is_put_back_by_the_next_run(job, former, tmp_path):
    out = tmp_path / "out"
    before = former(out)
    n = 18
    while out.exists():  # until the kill falls between the two renames of the swap
        assert finish(start(dying(lambda n=n: job(out, overwrite=True), n, "after"))) == KILLED
        n += 1
    with pytest.raises(QlabError, match="exists"):
        job(out)
    assert contents(out) == before


def test_a_folder_in_the_way_that_is_not_ours_is_left_alone(job, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("all of it")
    with pytest.raises(QlabError, match="was not made by qlab"):
        job(tmp_path / "out")
    assert contents(tmp_path) == {"out.partial/thesis.txt": b"all of it"}


def test_an_output_that_appears_during_the_run_is_kept(killed, job):
    killed.mkdir()
    (killed / "thesis.txt").write_text("all of it")
    with pytest.raises(QlabError, match="exists"):
        job(killed, resume=True)
    assert contents(killed) == {"thesis.txt": b"all of it"}
