"""Docstrings of the public names: every argument is described, every example is run."""

import doctest
import inspect
import re
from importlib import import_module

import pytest

import qlab

FUNCTIONS = sorted(
    name
    for name in qlab.__all__
    if inspect.isfunction(getattr(import_module(qlab.HOMES[name]), name))
)
CLASSES = sorted(
    name for name in qlab.__all__ if inspect.isclass(getattr(import_module(qlab.HOMES[name]), name))
)
TABLES = sorted({*qlab.__all__} - {*FUNCTIONS, *CLASSES})
SECTION = re.compile(r"^(\w+):\n((?:    .*\n|\n)*)", re.MULTILINE)


def home(name):
    """What a public name stands for, without the check of its arguments."""
    return getattr(import_module(qlab.HOMES[name]), name)


def text(name):
    """The docstring of a public name; a table's is that of the module that holds it."""
    if name in TABLES:
        return inspect.cleandoc(import_module(qlab.HOMES[name]).__doc__) + "\n"
    return inspect.getdoc(home(name)) + "\n"


def sections(name):
    """Section -> its lines, of a docstring with Google sections."""
    return dict(SECTION.findall(text(name)))


def described(section):
    """The names that a section describes: `name: meaning` or `name, other: meaning`."""
    heads = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section, re.MULTILINE)
    return [word.lstrip("*") for head in heads for word in head.split(", ")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_returns(name):
    read = sections(name)
    assert described(read.get("Args", "")) == list(inspect.signature(home(name)).parameters)
    assert read["Returns"].strip()


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "QlabError"])
def test_a_class_says_what_it_holds(name):
    read = sections(name)
    assert described(read["Args"]) == list(inspect.signature(home(name)).parameters)


@pytest.mark.parametrize("name", qlab.__all__)
def test_its_example_does_what_it_says(name, shelf, tmp_path, monkeypatch):
    monkeypatch.setenv("QLAB_DEMO", str(shelf))
    monkeypatch.setenv("QLAB_HOME", str(tmp_path / "home"))
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(text(name), {}, name, None, 0)
    assert example.examples, f"{name} has no example"
    said: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed = doctest.DocTestRunner(optionflags=options).run(example, out=said.append).failed
    assert not failed, "".join(said)
