"""Mutants find their place by function and syntax."""

from pathlib import Path

import pytest
from mutants import MUTANTS
from mutants.planting import Mutant, plant

ROOT = Path(__file__).parents[1]
TWICE = "def f(x):\n    return g(x) + g(x)\n"
TIGHT = (
    "class A:\n    def f(self, x):\n        return self.g(x, 1) if x else 0  # why\n\ndef f(x): "
    "return self.g(x, 1)\n"
)
WIDE = """
def f(x):
    return self.g(x, 1)
class A:
    def f(self, x):
        # another reason
        return (
            self.g(
                x,
                1,
            )
            if x
            else 0
        )
"""


def mutant(function, old, new):
    return Mutant("a fault", "a.py", function, old, new, "")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_mutant_has_one_place(mutant):
    source = mutant.path(ROOT).read_text(encoding="utf-8")
    assert plant(source, mutant) != source


@pytest.mark.parametrize("source", [TIGHT, WIDE])
def test_layout_and_comments_play_no_part(source):
    planted = plant(source, mutant("A.f", "self.g(x, 1)", "self.g(x)"))
    assert "return self.g(x) if x else 0" in planted
    assert "return self.g(x, 1)\n" in planted + "\n"  # that of the function outside the class


def test_bodies_written_as_dots_stay():
    source = "def f(x):\n    if x:\n        a()\n    else:\n        b()\n"
    planted = plant(source, mutant("f", "if x: ...", "if False: ..."))
    assert planted == "def f(x):\n    if False:\n        a()\n    else:\n        b()"


@pytest.mark.parametrize("old, count", [("g(x)", 2), ("h(x)", 0), ("return 1", 0)])
def test_a_place_that_is_not_one_is_refused(old, count):
    with pytest.raises(ValueError, match=rf"a fault: .* occurs {count} times in f of a.py"):
        plant(TWICE, mutant("f", old, "0" if count else old.replace("1", "2").replace("h", "k")))


def test_a_function_that_is_gone_is_named():
    with pytest.raises(ValueError, match=r"a.py has no A.h"):
        plant(TIGHT, mutant("A.h", "x", "y"))
