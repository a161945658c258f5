"""Compiled kernels of codes are loaded where they are worth it, and missed with one warning."""

import pytest
import torch

from qlab.algebra import compiled, nearest
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab_kernels import nearest as kernel

SPEC = with_scale_dtype(parse_spec("int4-g8"), torch.bfloat16)
W_OK = torch.ones(4, 8, dtype=torch.bfloat16)


@pytest.fixture
def missing(monkeypatch):
    """A process that has rounded nothing, on a machine without a compiler; gives the questions for
    the kernels."""
    asked = []

    def why_not():
        asked.append(None)
        return "torch.compile finds no C++ compiler here; install g++"

    monkeypatch.setattr(compiled, "_demand", compiled._Demand())
    monkeypatch.setattr(compiled, "MANY", 100)
    monkeypatch.setattr(kernel, "why_not", why_not)
    return asked


def test_few_weights_load_nothing(missing):
    for _ in range(4):
        assert not missing and nearest.round_weight(W_OK, SPEC) is None
    with pytest.warns(UserWarning, match=r"weights are rounded by torch.*install g"):
        nearest.round_weight(W_OK, SPEC)  # 128 were rounded by now
    assert len(missing) == 1


def test_many_that_are_announced_warn_once_where_there_is_no_compiler(missing):
    compiled.expect(100)
    with pytest.warns(UserWarning, match="ten times as long") as warned:
        for _ in range(3):
            assert nearest.round_weight(W_OK, SPEC) is None
    assert len(warned) == 1
