"""A model, and an output of qlab, whose places may be asked for again."""

import shutil

import pytest

import qlab
from qlab.files.checkpoint import open_checkpoint
from qlab.model.skeleton import Skeleton


@pytest.fixture(scope="module")
def model(saved):
    return open_checkpoint(saved("llama"))


@pytest.fixture(scope="module")
def quantized(model, tmp_path_factory):
    return qlab.quantize(
        model, qlab.rtn(qlab.parse_spec("int8-g16")), None, tmp_path_factory.mktemp("made") / "q"
    ).path


@pytest.fixture
def former(quantized, tmp_path):
    """An output of qlab of the test's own."""
    return shutil.copytree(quantized, tmp_path / "former")


@pytest.fixture
def no_work(monkeypatch):
    """Fails where a model is built."""
    monkeypatch.setattr(Skeleton, "__init__", None)
