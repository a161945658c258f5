"""Every law runs without gradients, on one thread, and draws the same examples each time."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

calm = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
# Twice as many examples as every planted fault takes.
settings.register_profile("laws", max_examples=25, **calm)
settings.register_profile("mutants", max_examples=12, **calm)
settings.load_profile(os.environ.get("LAWS_PROFILE", "laws"))


@pytest.fixture(autouse=True)
def exact_and_gentle():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
