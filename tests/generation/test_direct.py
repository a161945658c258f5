"""Graphs are called directly where that is what torch would do, and through torch elsewhere."""

import pytest
import torch
from engines import asked, reference, small
from torch import nn

from qlab.generation import compiled, direct
from qlab.generation.cache import Rows
from qlab.generation.direct import Direct


class Compiled:
    """A program as torch would compile it, which counts how often it is asked: its graph multiplies
    and adds. adds: what the graph gets beside x and the weight, of the arguments."""

    def __init__(self, adds, gives=lambda y: y):
        self.asked, self.adds, self.gives = 0, adds, gives
        self.run = Direct(self)
        self.graph = self.run.watched(lambda x, weight, added: (x * weight + added,))

    def __call__(self, module, *args):
        self.asked += 1
        (y,) = self.graph(args[0], module.weight, self.adds(module, *args))
        return self.gives(y)


@pytest.fixture
def module():
    module = nn.Linear(3, 3, dtype=torch.float32)
    return module.requires_grad_(False)


def x_of(*sizes):
    return torch.rand(*sizes, dtype=torch.float32)


def test_a_form_is_called_directly_once_nothing_else_of_it_changes(module):
    program = Compiled(lambda module, x, number: number)
    for size, number, asked_before in ((3, 5, 2), (3, 6, 3), (1, 6, 4), (3, 5, 4), (1, 6, 4)):
        for _ in range(3):
            x = x_of(size, 3)
            assert torch.equal(program.run(module, x, number), x * module.weight + number)
        assert program.asked == asked_before
    other = nn.Linear(3, 3, dtype=torch.float32)
    x = x_of(3, 3)
    assert torch.equal(program.run(other, x, 5), x * other.weight + 5) and program.asked == 5


@pytest.mark.parametrize(
    "adds",
    [lambda module, x: x + 1, lambda module, x: module.weight + 1, lambda module, x: x[0]],
)
def test_what_is_made_for_every_call_is_not_taken_for_something_that_stays(module, adds):
    program = Compiled(adds)
    for _ in range(4):
        x = x_of(3, 3)
        assert torch.equal(program.run(module, x), x * module.weight + adds(module, x))
    assert program.asked == 4


def test_a_program_that_gives_something_else_than_its_graph_is_always_asked(module):
    program = Compiled(lambda module, x: 0, gives=lambda y: y + 1)
    for _ in range(4):
        x = x_of(3, 3)
        assert torch.equal(program.run(module, x), x * module.weight + 1)
    assert program.asked == 4


def test_one_tensor_in_two_places_is_another_form_than_two(module):
    program = Compiled(lambda module, x, y: y)
    for same, asked_before in ((False, 2), (True, 4), (False, 4)):
        for _ in range(3):
            x = x_of(3, 3)
            y = x if same else x_of(3, 3)
            assert torch.equal(program.run(module, x, y), x * module.weight + y)
        assert program.asked == asked_before


def test_a_cache_with_states_is_never_handed_directly(module):
    model, _ = reference("llama")
    pool = small(model).pool
    one = torch.ones(1, 1, dtype=torch.int64)
    for states, asked_in_all in (([], 2), ([nn.Identity()], 4)):
        program = Compiled(lambda module, x, rows: 0)
        for _ in range(4):
            program.run(module, x_of(3, 3), Rows(pool, one, one[0], 1, states))
        assert program.asked == asked_in_all


def test_no_more_forms_are_known_than_there_is_room_for(module, monkeypatch):
    monkeypatch.setattr(direct, "MOST", 2)
    program = Compiled(lambda module, x, number: number)
    for number in [0, 0, 1, 2, 2, 2]:
        x = x_of(3, 3)
        assert torch.equal(program.run(module, x, number), x * module.weight + number)
    assert program.asked == 6


@pytest.mark.parametrize("mode", ["block", "model"])
def test_a_request_of_a_known_form_asks_torch_for_nothing(mode, monkeypatch):
    monkeypatch.setattr(compiled, "inductor", lambda graph, inputs, options: graph.forward)
    model, expected = reference("llama")
    engine = small(model, compile=mode, rows=2)
    engine.compiled.wait()
    for _ in range(2):
        assert [r.new for r in asked(engine)] == expected

    def refused(*_, **__):
        raise AssertionError("torch is asked")

    monkeypatch.setattr(Direct, "_program", property(refused, lambda *_: None), raising=False)
    assert [r.new for r in asked(engine)] == expected
    assert engine.compiled.stats()["ready"] == (1, 2)
