"""`python -m qlab.bench gpu` up to the measurement: plans, minutes, resumed and failing runs, the
table of goals. No test needs a GPU."""

import json
import math
import os
import signal
import time
from functools import partial
from pathlib import Path

import gpu_fakes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killing import KILLED, finish, start

from qlab.bench.__main__ import main
from qlab.bench.gpu import crew as crews
from qlab.bench.gpu import device, jobs
from qlab.bench.gpu.plan import (
    COMPILE,
    KEEP,
    READ,
    START,
    Call,
    Facts,
    Step,
    fitting,
    seconds,
    steps,
)
from qlab.bench.gpu.record import RUNNING, file_of
from qlab.bench.gpu.run import accept
from qlab.bench.gpu.verdict import MET, MISSED, UNMEASURED, goals
from qlab.errors import QlabError
from qlab.files.ownership import is_sealed

FACTS = Facts(name="Fake H200", capability=(9, 0), workers=4)


@pytest.fixture
def bench(command):
    return partial(command, main, "gpu")


def step(name, *keys, expected=10.0, ahead=0):
    compiled = tuple(
        Call(key=f"kernel {i}", job="warm", arguments={}, seconds=COMPILE) for i in range(ahead)
    )
    calls = tuple(Call(key=key, job="harness", arguments={}, seconds=expected) for key in keys)
    return Step(name=name, calls=calls, ahead=compiled)


def free(work=lambda call: call.key):
    """A crew whose work takes no time."""
    return gpu_fakes.Crew(work, [0.0], {"start": 0.0, "run": lambda calls, spread: 0.0})


def run(out, planned, crew, minutes=12.0, **more):
    return accept(out, minutes, FACTS, planned, crew, clock=lambda: crew.now[0], **more)


# ---------------------------------------------------------------- plans
def test_a_plan_goes_from_the_most_valuable_to_the_least():
    planned = [one.name for one in steps(FACTS)]
    assert planned[0] == "harness" and planned[1].startswith("bits int4 assembly")
    products = [i for i, name in enumerate(planned) if name.startswith(("products", "row"))]
    others = [i for i, name in enumerate(planned) if "other configurations" in name]
    assert (
        max(products) < planned.index("generate") < min(others)
        and planned[max(others)] == planned[-1]
    )
    goal = planned.index("products 8192x8192 1 to 64, goals")
    assert planned[goal - 1] == "tune int4_mm bfloat16 g128 8192x8192 1 to 64"
    proven = [i for i, name in enumerate(planned) if name.startswith("bits int4 kernels")]
    assert proven and max(proven) < goal < planned.index("products 4096x14336 1 to 4096, all")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_names_of_steps_keys_and_files_are_unique(capability):
    planned = steps(Facts(name="any", capability=capability, workers=2))
    assert len({file_of(one) for one in planned}) == len(planned)
    for one in planned:
        assert len({call.key for call in one.calls}) == len(one.calls) > 0
        json.dumps([dict(call.arguments) for call in (*one.calls, *one.ahead)])
        assert all(call.job in jobs.JOBS for call in (*one.calls, *one.ahead))


@settings(max_examples=50)
@given(
    expected=st.lists(st.floats(1, 300), min_size=1, max_size=8),
    budget=st.floats(0, 1500),
)
def test_what_fits_is_as_much_as_fits(expected, budget):
    planned = [step(f"s{i}", "a", expected=needed) for i, needed in enumerate(expected)]
    fit, skipped = fitting(planned, 4, budget, lambda _: ())
    assert sorted([*fit, *skipped], key=planned.index) == planned
    used = START
    for (
        one
    ) in planned:  # a step is left out exactly where the valuable ones before leave too little
        needed = seconds(one, 4)
        assert (one in fit) == (used + needed <= budget + 1e-6)
        used += needed if one in fit else 0.0


def test_compilations_stand_in_the_plan():
    """Every kernel that a tuning step times is compiled ahead, by it or a step before, on all
    workers; their seconds are the step's."""
    from qlab_kernels.config import Config, Problem
    from qlab_kernels.cost import prune

    compiled = set()

    def tile(arguments, c):
        form = tuple(arguments[name] for name in ("op", "dtype", "group", "zeros"))
        return (*form, c.bm, c.bn, c.bk, c.warps, c.stages, c.scale_on)

    tuning = [one for one in steps(FACTS) if one.name.startswith("tune")]
    for one in tuning:
        compiled |= {tile(call.arguments, Config(**call.arguments["config"])) for call in one.ahead}
        for call in one.calls:
            place = {name: value for name, value in call.arguments.items() if name != "keep"}
            p = Problem(cc=FACTS.capability, device=FACTS.name, **place)
            for c in prune(p, KEEP):
                assert c.kind in ("dequant", "library") or tile(call.arguments, c) in compiled
        alone = sum(call.seconds for call in one.calls)
        batches = math.ceil(len(one.ahead) / FACTS.workers)
        assert seconds(one, FACTS.workers) == pytest.approx(READ + alone + batches * COMPILE)
    assert tuning and tuning[0].ahead


def test_a_run_takes_what_its_plan_says(tmp_path):
    """With a crew that takes the time that starts, compilations and calls take: nothing that takes
    time is missing in the plan, and the run ends within its minutes."""
    now = [100.0]

    def cost(calls, spread):
        if calls and calls[0].job == "warm":
            return COMPILE * math.ceil(len(calls) / FACTS.workers)
        each = [call.seconds for call in calls]
        return READ + (max(sum(each) / FACTS.workers, max(each)) if spread else sum(each))

    crew = gpu_fakes.Crew(lambda call: {}, now, {"start": START, "run": cost})
    result = run(tmp_path / "out", steps(FACTS), crew, minutes=6)
    fit, skipped = fitting(steps(FACTS), FACTS.workers, 360, lambda _: ())
    planned = START + sum(seconds(one, FACTS.workers) for one in fit)
    assert now[0] - 100 == pytest.approx(planned)
    assert now[0] - 100 <= 360 and skipped
    assert result.skipped == [one.name for one in skipped]
    assert result.record["skipped"] == result.skipped


def test_the_plan_is_printed_without_a_gpu(bench, tmp_path):
    code, printed, _ = bench("--plan", "--minutes", 3, "--json", tmp_path / "plan.json")
    assert code == 0 and "does not fit" in printed and "start of the processes" in printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["steps"][0]["step"] == "harness" and plan["steps"][0]["fits"]
    assert sum(row["seconds"] for row in plan["steps"] if row["fits"]) + plan["start"] <= 180


# ---------------------------------------------------------------- runs
PLAN = [step("one", "a", "b", ahead=2), step("two", "c"), step("three", "d", "e")]
KEYS = ["a", "b", "c", "d", "e"]


def test_a_second_start_finds_everything_done(tmp_path):
    first = run(tmp_path, PLAN, free())
    assert not first.failed and not first.skipped
    written = json.loads((tmp_path / "acceptance.json").read_text())
    assert is_sealed(written) and list(written["steps"]) == ["one", "three", "two"]
    assert written["steps"]["one"]["a"]["result"] == "a"
    again = free()
    assert run(tmp_path, PLAN, again).record["steps"] == first.record["steps"]
    assert again.calls == [] and again.closed


@pytest.mark.parametrize("killed_at", range(len(KEYS)))
def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path, killed_at):
    class Killed(BaseException):
        pass

    def until(call):
        if call.key == KEYS[killed_at]:
            raise Killed
        return call.key

    with pytest.raises(Killed):
        run(tmp_path, PLAN, free(until))
    second = free()
    result = run(tmp_path, PLAN, second)
    assert [key for key in second.calls if key in KEYS] == KEYS[killed_at:]
    outcomes = {key for calls in result.record["steps"].values() for key in calls}
    assert outcomes == set(KEYS) and not result.failed


def test_a_failing_call_is_written_and_the_run_goes_on(tmp_path):
    def work(call):
        if call.key == "b":
            raise ArithmeticError("the kernel is wrong")
        return {"rows": [], "error": "at 64 tokens: too large"} if call.key == "d" else call.key

    crew = free(work)
    result = run(tmp_path, PLAN, crew)
    assert result.failed == [
        ("one", "b", "the kernel is wrong"),
        ("three", "d", "at 64 tokens: too large"),
    ]
    assert [key for key in crew.calls if key in KEYS] == KEYS
    again = free()
    assert not run(tmp_path, PLAN, again).failed
    assert [key for key in again.calls if key in KEYS] == ["b", "d"]


def lives(process):
    """Whether a process runs; of one that has ended and was not waited for, nothing is left."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def test_a_run_that_is_killed_with_no_warning_goes_on(tmp_path):
    """kill -9 while a worker is in its call: a second start finishes."""
    out, begun = tmp_path / "out", tmp_path / "begun"
    facts = Facts(name="Fake H200", capability=(9, 0), workers=1)
    calls = {"a": "clocks", "b": "harness"}
    plan = [
        Step(name=key, calls=(Call(key=key, job=job, arguments={}, seconds=300.0),))
        for key, job in calls.items()
    ]

    def run():
        crew = crews.Crew("gpu_fakes:hanging", 1, {"FAKE_BEGUN": str(begun)})
        return accept(out, 60, facts, plan, crew)

    first, until = start(run), time.monotonic() + 240
    while not (begun.exists() and begun.read_text()) and lives(first) and time.monotonic() < until:
        time.sleep(0.1)
    os.kill(first, signal.SIGKILL)
    assert finish(first) == KILLED
    while lives(begun.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not lives(begun.read_text())  # it ends with the run, and leaves the device to the next
    written = json.loads((out / "steps" / "a.json").read_text())
    assert "copy_gbps" in str(run().record["steps"]["b"])
    assert json.loads((out / "steps" / "a.json").read_text()) == written


# ---------------------------------------------------------------- the table against the goals
def verdicts(ours, library, cases=()):
    """{goal: (verdict, figure)} for {m: (events, graph)} of both at 8192x8192."""
    rows = {
        name: [{"m": m, "events_us": e, "graph_us": g} for m, (e, g) in times.items()]
        for name, times in (("qlab", ours), ("library", library))
    }
    outcomes = {
        "p": {
            name: {"result": {"rival": name, "n": 8192, "k": 8192, "rows": r}}
            for name, r in rows.items()
        },
        "b": {key: outcome for key, outcome in cases},
    }
    planned = [
        Step(
            name="p",
            calls=tuple(
                gpu_fakes.call(
                    name, "product", rival=name, n=8192, k=8192, tokens=[1, 2, 4, 8, 16, 64]
                )
                for name in rows
            ),
        ),
        Step(name="b", calls=(gpu_fakes.call("x", "check"), gpu_fakes.call("y", "check"))),
    ]
    return [(row["verdict"], row["figure"]) for row in goals(planned, outcomes)]


FAST = {m: (18.0, 13.0) for m in (1, 2, 4, 8, 16)}
DENSE = {m: (50.0, 45.0) for m in (1, 2, 4, 8, 16, 64)}
RIGHT, WRONG = {"result": {"excess": 0.0}}, {"error": "Wrong: 3 times what rounding explains"}


def test_goals_are_met_missed_or_not_measured():
    bits, graph, events, at_64, ratio = verdicts(
        {**FAST, 64: (27.0, 22.0)}, DENSE, [("x", RIGHT), ("y", RIGHT)]
    )
    assert bits == (MET, "2 right and 0 wrong of 2 cases")
    assert graph == (MET, "13.0 us at M = 1") and events == (MET, "18.0 us at M = 1")
    assert at_64 == (MET, "27.0 us at M = 64")
    assert ratio == (MET, "1.85 of it for 8192x8192 at M = 64, the least of 6 products")
    bits, graph, events, at_64, ratio = verdicts(
        {**FAST, 16: (19.1, 14.1), 64: (60.0, 22.0)}, DENSE, [("x", RIGHT), ("y", WRONG)]
    )
    assert bits == (MISSED, "1 right and 1 wrong of 2 cases")
    assert graph == (MISSED, "14.1 us at M = 16") and events == (MISSED, "19.1 us at M = 16")
    assert at_64[0] == ratio[0] == MISSED
    assert all(verdict == UNMEASURED for verdict, _ in verdicts({}, {}))
    part = {1: (18.0, None), 2: (18.0, 13.0)}
    bits, graph, events, at_64, ratio = verdicts(part, DENSE, [("x", RIGHT)])
    assert bits == (UNMEASURED, "1 right and 0 wrong of 2 cases")
    assert graph == (UNMEASURED, "13.0 us at M = 2; not measured at 1, 4, 8, 16")
    assert events[0] == at_64[0] == UNMEASURED
    assert ratio[0] == UNMEASURED and ratio[1].endswith("; 4 more are not measured")


# ---------------------------------------------------------------- the command
@pytest.fixture
def faked(monkeypatch):
    """The command on a fake device; returns the function that says what its crew does."""

    def with_work(work):
        crew = free(work)
        monkeypatch.setattr(device, "cuda", gpu_fakes.bench)
        monkeypatch.setattr(crews, "Crew", lambda *_: crew)
        return crew

    return with_work


def test_the_exit_status_says_whether_a_step_failed(bench, faked, tmp_path):
    faked(lambda call: {"excess": 0.0})
    code, printed, said = bench("--minutes", 60, "--out", tmp_path / "good")
    assert code == 0 and "not measured" in printed and "generate" in said
    assert json.loads((tmp_path / "good" / "acceptance.json").read_text())["failed"] == []

    def failing(call):
        if call.key == "assembly sub bfloat16 wgmma":
            raise ArithmeticError("inf times what rounding explains")
        return {"excess": 0.0}

    faked(failing)
    code, printed, _ = bench("--minutes", 60, "--out", tmp_path / "bad")
    assert code == 1 and "assembly sub bfloat16 wgmma: inf times what rounding" in printed
    assert "missed" in printed


def test_bad_input_is_refused_in_a_sentence(bench, tmp_path, monkeypatch):
    out = tmp_path / "out"
    code, _, said = bench("--minutes", 0, "--out", out)
    assert code == 2 and "--minutes 0 leaves no time to measure; give more than 0" in said
    code, _, said = bench("--minutes", 12)
    assert code == 2 and "give --out DIR" in said
    if not torch.cuda.is_available():
        code, _, said = bench("--minutes", 12, "--out", out)
        assert code == 2 and "torch finds no CUDA device here" in said and "--plan" in said
    assert not out.exists()
    (tmp_path / "file").touch()
    code, _, said = bench("--out", tmp_path / "file")
    assert code == 2 and "is a file; choose another --out" in said
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").touch()
    code, _, said = bench("--out", tmp_path / "theirs")
    assert code == 2 and "holds notes.txt and no acceptance of a GPU" in said


def test_a_folder_of_another_job_or_a_changed_one_is_refused(tmp_path):
    run(tmp_path, PLAN, free())
    other = Facts(name="Another GPU", capability=(9, 0), workers=4)
    with pytest.raises(QlabError, match=r"another job \(device: Fake H200, not Another GPU\)"):
        accept(tmp_path, 12, other, PLAN, free())
    (tmp_path / "steps" / "two.json").write_text("{}")
    with pytest.raises(QlabError, match=r"two\.json was changed since it was written"):
        run(tmp_path, PLAN, free())


def test_minutes_in_which_nothing_fits_are_refused(tmp_path):
    with pytest.raises(QlabError, match=r"no step fits into 0\.1 minutes: the smallest needs 36 s"):
        run(tmp_path / "out", PLAN, free(), minutes=0.1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_a_run_that_was_killed_at_once_is_taken(tmp_path):
    (tmp_path / RUNNING).mkdir()
    (tmp_path / RUNNING / "lock").touch()
    assert not run(tmp_path, PLAN, free()).failed
