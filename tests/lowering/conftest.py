"""No gradients, and a config cache without the user's own entries."""

import pytest
import torch
from interpreted import interpreter

from qlab.process import processor
from qlab_kernels import cache


@pytest.fixture(autouse=True)
def alone(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path_factory.mktemp("configs")))
    cache.refresh()
    with torch.no_grad():
        yield
    cache._current = None


@pytest.fixture
def fresh():
    """Nothing that was compiled before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def on(monkeypatch):
    """on(isa): products from here on as they are on a processor with this instruction set."""
    return lambda isa: monkeypatch.setattr(processor, "here", lambda: processor.Processor(isa))


@pytest.fixture(scope="session")
def interpreted():
    """interpreted(script, *arguments): Triton interpreted, in a process of the script's own."""
    with interpreter() as run:
        yield run
