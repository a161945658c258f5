"""A few trials of every case, and what the campaign makes of trials that find something."""

import os
import signal

import pytest

from faults import Case
from faults.campaign import Tally, attempt, campaign, turn
from faults.cases import CASES
from qlab.files.directory import read_json


def test_a_few_trials_of_every_case(tmp_path):
    for case in CASES.values():
        if case.bounded:
            tally = Tally()
            turn(case, case.make(tmp_path), tally, 0.0, case.bounded)
            assert not tally.findings and tally.number == case.bounded, case.name


def test_trials_that_fail_or_die_are_noted_by_number(tmp_path):
    def trial(draw, folder):
        kind = draw.choice(("well", "found", "died"))
        if kind == "found":
            raise AssertionError("something")
        if kind == "died":
            os.kill(os.getpid(), signal.SIGKILL)
        return kind

    case, tally = Case(name="any", make=lambda folder: trial), Tally()
    for _ in range(20):
        turn(case, trial, tally, 0.0)  # one trial
    assert tally.ended.keys() == {"well"} and tally.number == tally.json()["trials"] == 20
    dead = "the process of the trial ended with -9"
    assert set(tally.findings.values()) == {"AssertionError: something", dead}
    found = next(n for n, says in tally.findings.items() if says != dead)
    with pytest.raises(AssertionError, match="something"):
        attempt(case, trial, found)


def test_a_campaign_goes_on_from_what_is_stored(tmp_path):
    case = Case(name="any", make=lambda folder: lambda draw, folder: str(draw.randrange(10**9)))
    for count in (1, 2):
        assert campaign([case], 0.0, tmp_path / "faults.json")
        row = read_json(tmp_path / "faults.json")["cases"]["any"]
        assert row["trials"] == len(row["ended"]) == count
