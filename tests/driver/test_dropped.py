"""What a run of quantize holds is let go of with its result."""

import gc
from collections import Counter

import pytest
import torch
from faults.dropped import refuse_growth
from model_folders import random_tokens

import qlab
from qlab.algebra.graph import ModuleGraph

KINDS = (torch.Tensor, torch.nn.Module, ModuleGraph)


def alive():
    """How many tensors, modules and blocks there are, by their class."""
    gc.collect()
    kinds = (type(each) for each in gc.get_objects())
    return Counter(kind.__name__ for kind in kinds if issubclass(kind, KINDS))


def test_runs_one_after_another_leave_nothing_behind(saved, tmp_path):
    """But for what is made once: the first run makes it."""
    source, left = saved("llama"), []
    data = random_tokens(source)
    for number in range(3):
        qlab.quantize(source, qlab.gptq("int4-g16"), data, tmp_path / str(number))
        left.append(alive())
    assert left[1] == left[2]


def test_a_process_that_grows_is_told():
    refuse_growth([100, 130, 200, 203])
    with pytest.raises(AssertionError, match="it grew"):
        refuse_growth([100, 130, 200, 205])
