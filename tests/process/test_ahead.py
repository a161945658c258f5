"""Items are read in order by one thread, made by others, and come in order; of large ones, one is
there at a time."""

import threading

import pytest
import torch

from qlab.process import ahead
from qlab.process.ahead import Ahead
from qlab.process.surroundings import by_itself


def test_results_come_in_order_whoever_is_first():
    second_is_made = threading.Event()

    def make(item, doubled):
        if item == 0:
            second_is_made.wait()
        if item == 1:
            second_is_made.set()
        return item, doubled

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with Ahead() as threads:
            made = list(threads.in_order(range(9), lambda item: 1, lambda item: 2 * item, make))
    finally:
        torch.set_num_threads(before)
    assert made == [(i, 2 * i) for i in range(9)]


def test_of_large_items_one_is_there_at_a_time(monkeypatch):
    monkeypatch.setattr(ahead, "AT_ONCE", 10)
    there, most = set(), {}

    def read(item):
        there.add(item)
        most[item] = set(there)
        return item

    with Ahead() as threads:
        sizes = {0: 11, 1: 11, 2: 4, 3: 6, 4: 11}
        for item in threads.in_order(sizes, sizes.get, read, lambda item, same: item):
            there.remove(item)
    assert most == {0: {0}, 1: {1}, 2: {2}, 3: {2, 3}, 4: {4}}


@pytest.mark.parametrize("where", ["read", "make"])
def test_what_was_read_before_a_failure_comes_before_it(where):
    def fail_at_3(item):
        if item == 3:
            raise OSError("of 3")
        return item

    read = fail_at_3 if where == "read" else lambda item: item
    make = (lambda item, same: fail_at_3(item)) if where == "make" else (lambda item, same: item)
    came = []
    with Ahead() as threads, pytest.raises(OSError, match="of 3"):
        for item in threads.in_order(range(9), lambda item: 1, read, make):
            came.append(item)
    assert came == [0, 1, 2]


def test_a_thread_by_itself_leaves_those_of_others_as_they_were():
    counts = {}

    def count(name, first=lambda: None):
        first()
        counts[name] = torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for name, first in (("by itself", by_itself), ("later", lambda: None)):
            thread = threading.Thread(target=count, args=(name, first))
            thread.start()
            thread.join()
        count("ours")
    finally:
        torch.set_num_threads(before)
    assert counts == {"by itself": 1, "later": 3, "ours": 3}
