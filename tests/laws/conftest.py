"""Every law runs without gradients and on one thread."""

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_and_gentle():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)
