"""Stages of one's own, as tests of what every step has to keep to write them."""

import pytest

from qlab.algebra.transform import Stage
from qlab.errors import QlabError


def step(change, name="mine", needs=frozenset(), **fields):
    """A stage of one's own: change(graph, stats) -> graph."""
    return (Stage(name, needs, lambda graph, stats: (change(graph, stats), stats), **fields),)


def refused(seg, transform, words):
    with pytest.raises(QlabError, match=words) as error:
        seg.solve(transform)
    assert "\n" not in str(error.value)
