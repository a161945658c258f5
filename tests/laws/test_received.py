"""How much attention tokens receive: what an error in the value of a token does to the outputs."""

import pytest
import torch
from families import FAMILIES, MIXTURES
from segments import batches_of, of, segment

from qlab.algebra.graph import by_source
from qlab.algebra.interpret import inputs_of
from qlab.algebra.received import received
from qlab.algebra.statistic import Observation
from qlab.algebra.stats import STATS
from qlab.algebra.wires import wires
from qlab.driver.observe import observe
from qlab.errors import QlabError
from qlab.methods.stages import attended, solver

# whose attention's output is the input of a linear as it is, and whose sizes of heads are one
PLAIN = (
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "opt",
    "gpt2",
    "mixtral",
    "bloom",
    "xglm",
)


def source_of(seg, *names):
    """The source of the first site whose last name is one of these."""
    for source, sites in by_source(seg.graph.code.sites).items():
        if any(site.path.rpartition(".")[2] in names for site in sites):
            return source
    raise AssertionError(names)


def feeding(seg):
    return source_of(seg, "v_proj", "qkv_proj", "c_attn", "query_key_value")


@pytest.mark.parametrize("family", PLAIN)
def test_it_is_what_an_error_in_a_value_does_to_the_outputs(family):
    seg, (args, kwargs) = segment(family), segment(family).batches[0]
    (name,) = [n for n in wires(seg.graph.code) if n.endswith(":value")]
    wire, out = wires(seg.graph.code)[name], source_of(seg, "o_proj", "c_proj", "out_proj", "dense")
    of_source = received(seg.graph, [feeding(seg)], args, kwargs)[feeding(seg)]
    before = inputs_of(seg.graph, [out], args, kwargs)[out].x.double()
    error = torch.randn(wire.channels // wire.heads).repeat(wire.heads)
    for token in (0, 3, 11):

        def off(rows, token=token):
            rows = rows.clone()
            rows[..., token, :] += error
            return rows

        moved = seg.graph.inserting(name, off)
        change = inputs_of(moved, [out], args, kwargs)[out].x.double() - before
        heads = before.shape[-1] // (wire.channels // wire.heads)
        expected = change.square().sum((-2, -1)) / (
            heads * error[: wire.channels // wire.heads].square().sum()
        )
        assert torch.allclose(of_source.view(2, 12)[:, token].double(), expected, rtol=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_only_what_makes_keys_and_values_receives(family):
    seg, (args, kwargs) = segment(family), segment(family).batches[0]
    found = received(seg.graph, by_source(seg.graph.code.sites), args, kwargs)
    shown = any(w.kind == "value" for w in wires(seg.graph.code).values())
    assert bool(found) == shown
    for a_n in found.values():
        # the rows of probabilities sum to 1, and their squares to at most that
        assert (a_n >= 0).all() and 0 < a_n.mean() <= 1 + 1e-5
    last = {site.source for site in seg.graph.sites if site.path.endswith("down_proj")}
    assert not last & found.keys()


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_the_statistic_is_the_moment_of_the_tokens_so_weighted(family):
    seg = segment(family)
    source, other = feeding(seg), source_of(seg, "o_proj", "c_proj")
    keys = {(source, "received"), (other, "received")}
    stats = observe(seg.graph, keys, batches_of(seg))
    expected = 0
    for args, kwargs in seg.batches:
        x = inputs_of(seg.graph, [source], args, kwargs)[source].x.flatten(0, -2)
        a = received(seg.graph, [source], args, kwargs)[source]
        expected = expected + (x * a[:, None]).T @ x
    assert torch.allclose(stats[source, "received"].sum_kk, expected, rtol=1e-3, atol=1e-4)
    assert stats[source, "received"].tokens == 72 and not stats[other, "received"].tokens


class TwoAttentions(torch.nn.Module):
    """Two attentions whose keys and values are made of one input."""

    def __init__(self):
        super().__init__()
        self.made = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        k, v, other_k, other_v = (linear(x)[:, None] for linear in self.made)
        attention = torch.nn.functional.scaled_dot_product_attention
        return x + (attention(k, k, v) + attention(other_k, other_k, other_v))[:, 0]


def test_what_several_attentions_give_adds_up():
    x = torch.randn(1, 5, 8)
    block = TwoAttentions()
    seg = of(block, x)
    (a_n,) = received(seg.graph, {s.source for s in seg.graph.sites}, (x,), {}).values()
    expected = 0
    for i in (0, 2):
        k = block.made[i](x)[0]
        expected = expected + (k @ k.T / 8**0.5).softmax(-1).square().sum(0)
    assert torch.allclose(a_n.flatten(), expected, atol=1e-5)


def test_an_error_costs_more_where_attention_goes():
    """A solver by that metric loses less, as the metric measures it, than one by every token."""
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    a = torch.zeros(256)
    a[0] = 200.0
    o = Observation(x, torch.arange(256), received_n=a)
    stats = {name: STATS[name].lift(o) for name in attended.needs}
    M = attended.of(stats)
    assert torch.allclose(M, (x.T @ x + 200 * torch.outer(x[0], x[0])) / 256, atol=1e-4)
    (stage,) = solver("int4-g32", metric=attended)
    assert stage.needs == attended.needs and stage.detail.endswith("metric attended")


def test_what_is_no_metric_is_refused():
    with pytest.raises(QlabError, match="metric is 'attended'; give a Metric"):
        solver("int4-g32", metric="attended")
