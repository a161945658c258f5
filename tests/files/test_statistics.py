"""Statistics in a folder: what is read is what was written, for what was asked, or nothing."""

import json
import os

import pytest
import torch
from model_folders import bits_equal
from torch.utils import _pytree as pytree

import qlab.files.statistics
from qlab.algebra.statistic import Observation, PerExpert
from qlab.algebra.stats import STATS, stat_of
from qlab.files.statistics import Shelf

OF = {"model": "m", "wire": "a", "statistic": "second_moment"}
ABOUT = {"model": "/models/m"}


def observed(name, experts):
    x_nk = torch.randn(600, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    ends = torch.tensor([0, 200, 600], dtype=torch.long) if experts else None
    observation = Observation(x_nk, torch.arange(600, dtype=torch.long), ends)
    return stat_of(name, experts).lift(observation)


def same(a, b):
    (one, form), (other, form_of_other) = (pytree.tree_flatten(state) for state in (a, b))
    return form == form_of_other and all(
        bits_equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(one, other)
    )


@pytest.fixture
def shelf(tmp_path):
    shelf = Shelf(tmp_path / "kept")
    shelf.put(OF, observed("second_moment", False), ABOUT)
    return shelf


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", sorted(STATS))
def test_every_statistic_is_read_as_it_was_written(name, experts, tmp_path):
    state, shelf = observed(name, experts), Shelf(tmp_path)
    shelf.put({**OF, "statistic": name}, state, ABOUT)
    read = shelf.get({**OF, "statistic": name})
    assert type(read) is type(state) and same(read, state)
    assert isinstance(read, PerExpert) == experts


@pytest.mark.parametrize("key", sorted(OF))
def test_what_is_asked_for_decides_what_is_found(key, shelf):
    other = {**OF, key: "another"}
    assert shelf.get(OF) is not None and shelf.get(other) is None
    shelf.put(other, observed("second_moment", True), ABOUT)
    assert same(shelf.get(OF), observed("second_moment", False))
    assert same(shelf.get(other), observed("second_moment", True))


def test_the_states_of_other_experts_are_checked_and_let_go_of(shelf):
    state = observed("second_moment", True)
    shelf.put(OF, state, ABOUT)
    own = shelf.get(OF, lambda expert: expert == 1)
    assert own.states[0] is own.states[2] is None and same(own.states[1], state.states[1])


def test_a_file_that_others_use_meanwhile_is_read(shelf, monkeypatch):
    header = qlab.files.statistics.read_header

    def used_meanwhile(path):
        found = header(path)
        os.utime(path, (1, 1))
        return found

    monkeypatch.setattr(qlab.files.statistics, "read_header", used_meanwhile)
    assert same(shelf.get(OF), observed("second_moment", False))


def test_any_byte_that_is_changed_or_missing_is_found_and_named(shelf, capsys):
    (path,) = shelf.folder.iterdir()
    whole = path.read_bytes()
    no_number = whole.index(b'"format":"pt"')  # what nobody reads
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        if not no_number <= at < no_number + 13:
            assert shelf.get(OF) is None, at
            assert str(path) in capsys.readouterr().err
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert shelf.get(OF) is None and str(path) in capsys.readouterr().err
    path.write_bytes(whole)
    assert same(shelf.get(OF), observed("second_moment", False))


def test_a_file_under_another_name_is_not_used(shelf, capsys):
    (path,) = shelf.folder.iterdir()
    shelf.put({**OF, "model": "other"}, observed("second_moment", False), ABOUT)
    (other,) = set(shelf.folder.iterdir()) - {path}
    other.replace(path)
    assert shelf.get(OF) is None
    assert "of something else" in capsys.readouterr().err


def test_reading_is_a_use(shelf):
    (path,) = shelf.folder.iterdir()
    os.utime(path, (0, 0))
    assert shelf.listed()[0][0].used == 0
    shelf.get(OF)
    assert shelf.listed()[0][0].used > 0


def test_the_list_says_of_what_and_names_the_damaged(shelf):
    (path,) = shelf.folder.iterdir()
    (kept,), damaged = shelf.listed()
    assert kept.of == OF and kept.about == ABOUT and kept.bytes == path.stat().st_size
    assert damaged == [] and json.dumps(kept.of)
    path.write_bytes(path.read_bytes()[:-1])
    assert shelf.listed() == ([], [path])
