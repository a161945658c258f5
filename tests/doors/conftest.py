import pytest
from formats import FOUR_BITS, NAME

import qlab.codecs


@pytest.fixture
def four_bits(monkeypatch):
    """The tests' own format, known to qlab while the test lasts."""
    monkeypatch.setitem(qlab.codecs.CODECS, NAME, FOUR_BITS)
    monkeypatch.setitem(qlab.codecs.READERS, NAME, lambda config: FOUR_BITS)
    return NAME
