"""Weights made dense once: what a segment computes, and its gradients, stay; experts stay apart."""

from dataclasses import replace

import pytest
import torch
from segments import segment

from qlab.algebra.interpret import outputs_of
from qlab.algebra.leaf import Sum
from qlab.algebra.once import dense_once


class Counted(Sum):
    """A leaf that counts how often it is made dense."""

    times = 0

    def dense(self, dtype=None):
        Counted.times += 1
        return super().dense(dtype)


@torch.enable_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_runs_make_a_weight_dense_once_and_compute_the_same(family):
    graph = segment(family).graph
    site = graph.sites[0]
    W_ok = graph.weight_ok(site).clone().requires_grad_()
    before = replace(graph, params={**graph.params, site.weight: Counted((W_ok,))})
    args, kwargs = segment(family).batches[0]
    Counted.times, found = 0, []
    for made in (before, dense_once(before)):
        outputs = [outputs_of(made, args, kwargs)[0] for _ in range(3)]
        found.append((outputs, torch.autograd.grad(sum(x.sum() for x in outputs), W_ok)[0]))
    assert Counted.times == 4
    (plain, gradient), (shared, same) = found
    assert all(map(torch.equal, plain, shared))
    torch.testing.assert_close(gradient, same)


def test_experts_stay_as_they_are():
    graph = segment("qwen3_moe").graph
    stacked = {site.weight for site in graph.sites if site.route}
    codes = {name: Sum((graph.params[name],)) for name in stacked}
    made = dense_once(replace(graph, params={**graph.params, **codes}))
    assert stacked and all(made.params[name] is codes[name] for name in stacked)
