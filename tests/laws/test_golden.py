"""Solvers keep their codes on the pinned stack, and their loss everywhere."""

import hashlib

import pytest
import torch
from segments import correlated, normal

from qlab.graph import by_source, trace
from qlab.methods import METHODS
from qlab.spec import parse_spec
from qlab.stats import STATS, Observation
from qlab.transform import apply

PINNED = "2.13"
GOLDEN = {  # method/spec -> the start of the sha256 of codes, scales and zeros; the sum of relative losses
    "gptq/int4-g32": ("b54d1ee9431e5e8f", 0.0009168048684602636),
    "gptq/int3-g32-asym": ("0ff15a40d5db4b9f", 0.003604599161851829),
    "awq/int4-g32": ("e88ae31f5c45bbaa", 0.011263072658291438),
    "awq/int3-g32-asym": ("90e5589c26672398", 0.04025070451809418),
}


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 64)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def solved(method, text):
    """(sha256 of all codes and scales, sum of calibration losses) of a fixed block on fixed inputs."""
    block = Two()
    for i, parameter in enumerate(block.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) * 0.2 + (parameter.ndim == 1))
    x = correlated(512, 64, 0).view(4, 128, 64)
    graph, inputs = trace(block, (x,), {}), {"up": block.norm(x), "down": torch.relu(block.up(block.norm(x)))}
    stats = {}
    for source, (site, *_) in by_source(graph.sites).items():
        seen = Observation(inputs[site.path].flatten(0, 1), torch.arange(512))
        stats |= {(source, name): stat.lift(seen) for name, stat in STATS.items()}
    moments = {s.path: stats[s.source, "second_moment"].mean_kk for s in graph.sites}
    for stage in METHODS[method](parse_spec(text)):
        graph, stats = apply(stage, graph, stats)
    digest = hashlib.sha256()
    for site in graph.sites:
        q = graph.params[site.weight]
        for part in (q.codes, q.scales, q.zeros):
            digest.update(b"" if part is None else part.contiguous().numpy().tobytes())
    losses = [graph.notes[p].get("loss", 0.0) for p in moments]
    return digest.hexdigest()[:16], sum(losses)


@pytest.mark.parametrize("name", GOLDEN)
def test_solvers_keep_their_codes_and_their_loss(name):
    digest, loss = solved(*name.split("/"))
    expected_digest, expected_loss = GOLDEN[name]
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    if torch.__version__.startswith(PINNED):
        assert digest == expected_digest
