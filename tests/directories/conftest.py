import shutil

import pytest
import torch
from formats import FOUR_BITS, NAME
from model_folders import random_tokens

import qlab.codecs
from qlab.algebra.spec import parse_spec
from qlab.driver.quantize import quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS


@pytest.fixture
def four_bits(monkeypatch):
    """The tests' own format, known to qlab while the test lasts."""
    monkeypatch.setitem(qlab.codecs.CODECS, NAME, FOUR_BITS)
    monkeypatch.setitem(qlab.codecs.READERS, NAME, lambda config: FOUR_BITS)
    return NAME


@pytest.fixture(scope="module")
def original(saved):
    return saved("llama", torch.float16)


@pytest.fixture(scope="module")
def quantized_by(original, tmp_path_factory):
    """made(method) -> a directory that the method wrote of the model."""
    written = {}

    def make(method: str):
        if method not in written:
            out = tmp_path_factory.mktemp("made") / method
            data = None if method == "rtn" else random_tokens(original)
            written[method] = quantize(
                open_checkpoint(original), METHODS[method](parse_spec("int4-g32")), data, out
            ).path
        return written[method]

    return make


@pytest.fixture
def copy(quantized_by, tmp_path):
    """A copy of RTN's directory to break."""
    return shutil.copytree(quantized_by("rtn"), tmp_path / "copy")
