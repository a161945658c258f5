"""AutoRound: at zero steps it is rounding to nearest, or the codes that it began with; what it
keeps is never worse than that on all windows; and learning helps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, MIXTURES
from segments import assert_same, samples_of, segment

from qlab.algebra.block import Block
from qlab.algebra.learn import Version, learn
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.algebra.windows import Schedule
from qlab.methods.auto_round import auto_round, auto_round_refine
from qlab.methods.gptq import gptq
from qlab.methods.magnitude import magnitude
from qlab.methods.rtn import rtn

families = pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "opt"])
SPECS = ["int4-g16", "int3-g32-asym", "int2-channel-asym", "int5-tensor", "fp8-channel"]
FLOATS = ["nvfp4", "mxfp4", "mxfp6"]


def error(seg, graph):
    block = Block(segment=graph, samples=samples_of(seg), stats={})
    return float(block.loss(graph, range(block.count)).detach())


@families
@pytest.mark.parametrize("text", [*SPECS, *FLOATS])
def test_zero_steps_round_to_nearest(family, text):
    seg, spec = segment(family), parse_spec(text)
    learned, _ = seg.solve(auto_round(spec, steps=0))
    nearest, _ = seg.solve(rtn(spec))
    assert_same(learned, nearest)


@families
@pytest.mark.parametrize("before", [rtn, gptq])
@pytest.mark.parametrize("text", ["int3-g16", "int3-g32-asym", "nvfp4", "fp8-channel"])
def test_refining_begins_at_the_codes_that_are_there(family, before, text):
    """Also where the parameters of the first step say so, and no leaf is handed through."""
    from qlab.methods.auto_round import starts_refining

    seg = segment(family)
    first, _ = seg.solve(before(parse_spec(text)))
    none, _ = seg.solve(auto_round_refine(steps=0), first)
    assert_same(none, first)
    rounded = {site.weight: seg.graph.params[site.weight] for site in first.sites}
    block = Block(segment=replace(first, targets=rounded), samples=samples_of(seg), stats={})
    for path, start in starts_refining(block).items():
        _, leaf = start.rounded(start.parameters())
        weight = next(site.weight for site in first.sites if site.path == path)
        assert torch.equal(leaf.codes.float(), first.params[weight].codes.float())
        assert torch.equal(leaf.scales.float(), first.params[weight].scales.float())


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_what_is_kept_is_no_worse_than_nearest_and_learning_helps(family):
    seg, spec = segment(family), parse_spec("int2-g32-asym")
    nearest, _ = seg.solve(rtn(spec))
    learned, _ = seg.solve(auto_round(spec, steps=16, windows=2))
    assert error(seg, learned) < 0.97 * error(seg, nearest)
    for note in learned.notes.values():
        assert note["block_loss"] <= note["block_loss_before"]
        assert note["block_loss"] == pytest.approx(error(seg, learned), rel=1e-3)
        assert note["block_loss_before"] == pytest.approx(error(seg, nearest), rel=1e-3)


class Line:
    """A block of one number w, whose error in window i is (w - i)^2."""

    count, segment = 8, SimpleNamespace(dtype=torch.float32)

    def __init__(self):
        self.seen = []

    def generator(self, name):
        return torch.Generator().manual_seed(0)

    def put(self, leaves):
        return leaves["w"]

    def error(self, w, i):
        self.seen.append(i)
        return (w - i).square()

    def loss(self, w, windows):
        return torch.stack([(w - i).square() for i in windows]).mean()

    def each(self, work, leaves, windows):
        return work(self, leaves, windows)


def test_a_step_goes_by_the_mean_over_windows_drawn_at_random_and_gets_shorter():
    block, w, shares, slopes = Line(), torch.tensor(9.0, requires_grad=True), [], []

    def update(left):
        shares.append(left)
        slopes.append(float(w.grad))
        w.grad = None

    version = lambda: Version({"w": w * 1}, {"w": w.detach()})
    with torch.enable_grad():
        learn(block, version, update, Schedule(steps=6, windows=2))
    drawn = list(zip(block.seen[::2], block.seen[1::2]))
    assert shares == pytest.approx([1 - t / 6 for t in range(6)])
    assert slopes == pytest.approx([(9 - i) + (9 - j) for i, j in drawn])
    assert all(i != j for i, j in drawn) and len({*block.seen}) > 2


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_steps_that_lead_away_keep_what_was_best(family):
    seg, spec = segment(family), parse_spec("int4-g16")
    best, _ = seg.solve(gptq(spec))
    learned, _ = seg.solve(auto_round_refine(steps=4, windows=1, lr=1.0), best)
    assert error(seg, learned) <= error(seg, best) * (1 + 1e-6)
    for note in learned.notes.values():
        assert note["block_loss"] <= note["block_loss_before"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_refining_keeps_the_zeros_of_a_mask(family):
    seg, spec = segment(family), parse_spec("int4-g16-asym")
    masked = chain(magnitude("2:4"), gptq(spec))
    refined, _ = seg.solve(chain(masked, auto_round_refine(steps=4, windows=1, lr=0.2)))
    for site in refined.sites:
        if not site.router:
            weight = dense(refined.params[site.weight], torch.float32)
            assert not weight[~refined.supports[site.weight]].any()
