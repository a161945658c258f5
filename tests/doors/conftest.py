import importlib

import pytest
from formats import FOUR_BITS, NAME
from transformers import PretrainedConfig
from transformers.quantizers import auto

import qlab.codecs


@pytest.fixture
def four_bits(monkeypatch):
    """The tests' own format, known to qlab while the test lasts."""
    monkeypatch.setitem(qlab.codecs.CODECS, NAME, FOUR_BITS)
    monkeypatch.setitem(qlab.codecs.READERS, NAME, lambda config: FOUR_BITS)
    return NAME


@pytest.fixture
def door():
    """qlab.hf is imported, and transformers has its own readers back when the test ends."""
    mappings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    before, reads = [dict(mapping) for mapping in mappings], PretrainedConfig.__dict__["get_config_dict"]
    importlib.import_module("qlab.hf").register()
    yield
    PretrainedConfig.get_config_dict = reads
    for mapping, was in zip(mappings, before):
        mapping.clear()
        mapping.update(was)
