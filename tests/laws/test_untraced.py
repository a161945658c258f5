"""Modules inside a block that torch.export cannot follow run as they are; everything around them is
traced."""

from dataclasses import replace

import pytest
import torch
from segments import of
from torch import nn

from qlab.algebra.groups import Nothing
from qlab.algebra.interpret import inputs_of, interpret
from qlab.algebra.residual import residual
from qlab.algebra.tracing.as_it_is import untraced_modules
from qlab.algebra.tracing.trace import trace
from qlab.model.recording import shapes_of


@torch.library.custom_op("qlab_tests::shifted", mutates_args=())
def shifted(x: torch.Tensor) -> torch.Tensor:  # no kernel says of which shape its result is
    return x + 1


class Gate(nn.Module):
    """Which branch runs depends on numbers; it gives a list and a size."""

    def __init__(self, k):
        super().__init__()
        self.score = nn.Linear(k, 4)

    def forward(self, x, rows):
        scores = self.score(x.reshape(rows, -1))
        weights = scores.softmax(-1) if scores.sum() > 0 else scores.sigmoid()
        return [weights, weights.argmax(-1)], 4


class Experts(nn.Module):
    """A loop over the experts that some token chose."""

    def __init__(self, k):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(k, k) for _ in range(4))

    def forward(self, x, chosen):
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero()[:, 0]
            out[rows] = self.experts[expert](x[rows])
        return out


class Mixture(nn.Module):
    """A gate and experts, nested, beside a shared expert."""

    def __init__(self, k):
        super().__init__()
        self.gate, self.routed, self.shared = Gate(k), Experts(k), nn.Linear(k, k)

    def forward(self, x):
        (weights, chosen), count = self.gate(x, x.shape[0] * x.shape[1])
        assert weights.shape[-1] == count
        rows = x.flatten(0, 1)
        y = self.routed(rows, chosen=chosen) * weights.amax(-1, keepdim=True)
        return y.view_as(x) + self.shared(x)


class WithoutMetaKernel(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.inner = nn.Linear(k, k)

    def forward(self, x):
        return shifted(self.inner(x))


class InNumpy(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(k, k))

    def forward(self, x):
        return torch.from_numpy(x.numpy().round(1)) @ self.scale


class Chooses(nn.Module):
    """Its caller is what fails: it gives tensors of sizes that numbers decide."""

    def forward(self, x):
        return (x.sum(-1) > 0).nonzero()[:, 0]


class Rows(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.choose, self.deep = Chooses(), nn.Linear(k, k)

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = self.choose(rows)
        if len(chosen) > 2:
            rows = rows.index_add(0, chosen, self.deep(rows[chosen]))
        return rows.view_as(x)


class Block(nn.Module):
    """A linear, something that cannot be traced, called as often as `calls` says, and a linear."""

    def __init__(self, inner, k=6, calls=1):
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(k, k), inner(k), nn.Linear(k, k)
        self.calls = calls

    def forward(self, x):
        y = self.into(x)
        for _ in range(self.calls):
            y = self.inner(y)
        return x + self.out(y)


@pytest.mark.parametrize(
    "inner, calls, parts, sites",
    [
        (Mixture, 1, {"inner.gate", "inner.routed"}, {"inner.shared"}),
        (WithoutMetaKernel, 1, {"inner"}, set()),
        (WithoutMetaKernel, 3, {"inner"}, set()),
        (InNumpy, 2, {"inner"}, set()),
        (Rows, 1, {"inner"}, set()),
    ],
)
@torch.no_grad()
def test_the_smallest_module_that_cannot_be_traced_runs_as_it_is(inner, calls, parts, sites):
    torch.manual_seed(0)
    block, x = Block(inner, calls=calls).eval(), torch.randn(2, 5, 6)
    graph = of(block, x).graph
    assert untraced_modules(graph.code).keys() == parts
    assert {site.path for site in graph.sites} == {"into", "out"} | sites
    inside = {n for n, p in block.named_parameters() if p.ndim > 1 and n.startswith(tuple(parts))}
    assert graph.code.unread.keys() == inside
    for name, words in graph.code.unread.items():
        assert words.startswith(str(tuple(block.get_parameter(name).shape)))
        assert "is used in" in words and "which torch.export cannot trace" in words
    for more in (x, -x, torch.randn(3, 9, 6)):
        assert torch.equal(interpret(graph, (more,), {}), block(more))
        assert shapes_of(graph.code, [more]) == [tuple(more.shape)]
    last = graph.sites[-1].source  # behind the part that is not traced
    y = block.into(x)
    for _ in range(calls):
        y = block.inner(y)
    assert torch.equal(inputs_of(graph, [last], (x,), {})[last].x, y)


@torch.no_grad()
def test_a_module_as_it_is_runs_with_the_weights_of_the_graph():
    block, other = Block(WithoutMetaKernel), Block(WithoutMetaKernel)
    x = torch.randn(2, 5, 6)
    graph = replace(of(block, x).graph, params=dict(other.named_parameters()))
    assert torch.equal(interpret(graph, (x,), {}), other(x))


class Keeps(nn.Module):
    """Leaves a tensor in what it is called with, and cannot be traced."""

    def __init__(self, k):
        super().__init__()
        self.lin = nn.Linear(k, k)

    def forward(self, x, store):
        store["kept"] = self.lin(x) if x.sum() > 0 else -x
        return x * 2


@torch.no_grad()
def test_what_a_module_as_it_is_leaves_in_its_arguments_is_left():
    class Stores(nn.Module):
        def __init__(self, k=6):
            super().__init__()
            self.into, self.inner, self.out = nn.Linear(k, k), Keeps(k), nn.Linear(k, k)

        def forward(self, x, store):
            return self.out(self.inner(self.into(x), store) + store["kept"])

    block, x = Stores().eval(), torch.randn(2, 5, 6)
    graph = trace(block, (x, {}), {})
    assert untraced_modules(graph.code).keys() == {"inner"}
    for more in (x, -x, torch.randn(3, 4, 6)):
        assert torch.equal(interpret(graph, (more, {}), {}), block(more, {}))
    assert graph.code.left is not None


class WritesToItsInput(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.lin = nn.Linear(k, k)

    def forward(self, x):
        if x.sum() > 0:
            x.mul_(2)
        return self.lin(x)


@torch.no_grad()
def test_a_module_that_writes_to_its_arguments_is_no_operation_by_itself():
    block, x = Block(WritesToItsInput).eval(), torch.randn(2, 5, 6)
    graph = of(block, x).graph
    assert untraced_modules(graph.code).keys() == {""} and not graph.sites
    assert torch.equal(interpret(graph, (x,), {}), block(x))


def test_where_such_a_module_stands_in_the_way_it_is_named():
    graph = of(Mixture(12), torch.randn(2, 5, 12)).graph
    group = residual(graph.code)
    assert isinstance(group, Nothing) and "the operation Gate is not the same" in group.reason
