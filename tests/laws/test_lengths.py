"""Sizes that decide what a block runs are part of its program; a long loop is one operation between
sites."""

import pytest
import torch
from segments import (
    FromTheLeft,
    of,
)
from torch import nn

from qlab.algebra.interpret import inputs_of, interpret
from qlab.algebra.tracing.stretches import Stretch
from qlab.algebra.tracing.unrolled import deciding_sizes
from qlab.errors import QlabError


class InChunks(nn.Module):
    """Sums within chunks of four tokens, in a loop."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        y = self.lin(x)
        return torch.cat(
            [y[:, 4 * i : 4 * i + 4].cumsum(1) for i in range(-(-y.shape[1] // 4))], dim=1
        )


@pytest.mark.parametrize("length", [3, 9])
def test_a_length_that_decides_what_runs_is_part_of_the_program(length):
    block, x = InChunks(), torch.randn(2, length, 6)
    graph = of(block, x).graph
    assert graph.code.inputs == ((None, length, 6),)  # while any number of samples will do
    more = torch.randn(5, length, 6)
    assert torch.allclose(interpret(graph, (more,), {}), block(more), atol=1e-6)
    with pytest.raises(QlabError, match="windows of one length"):
        interpret(graph, (torch.randn(2, 2 * length, 6),), {})


def test_a_length_that_is_filled_up_to_chunks_is_part_of_the_program():
    class Filled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            y = nn.functional.pad(self.lin(x), (0, 0, 0, -x.shape[1] % 4))
            return y.unflatten(1, (-1, 4)).cumsum(2).flatten(1, 2)[:, : x.shape[1]]

    block, x = Filled(), torch.randn(2, 9, 6)
    assert deciding_sizes(block, (x,), {}) == deciding_sizes(block, (x,), {}, meta=False) == {9}
    assert torch.equal(
        interpret(of(block, x).graph, (torch.cat([x, x]),), {}), block(torch.cat([x, x]))
    )


def test_sizes_that_decide_are_found_in_the_first_steps_of_a_loop():
    assert deciding_sizes(InChunks(), (torch.randn(2, 9, 6),), {}) == {9}
    assert deciding_sizes(FromTheLeft(), (torch.randn(2, 9, 4),), {}) == set()
    steps = []

    class ByToken(nn.Module):
        def forward(self, x):
            state = x[:, 0]
            for i in range(x.shape[1]):
                steps.append(i)
                state = torch.tanh(state) + x[:, i]
            return state

    assert deciding_sizes(ByToken(), (torch.randn(2, 512, 6),), {}) == {512} and len(steps) < 100


@pytest.mark.parametrize("samples", [1, 2])
def test_as_many_tokens_as_channels_still_decide_what_runs(samples):
    assert deciding_sizes(InChunks(), (torch.randn(samples, 6, 6),), {}) == {6}
    torch.manual_seed(0)
    block, x = Scan(40).eval(), torch.randn(samples, 40, 40)
    graph = of(block, x).graph
    assert graph.code.inputs == ((None if samples > 1 else 1, 40, 40),) and not graph.code.unread
    assert torch.allclose(interpret(graph, (x,), {}), block(x), atol=1e-6)


def test_a_mask_of_as_many_tokens_as_channels_grows_with_them():
    class Masked(InChunks):
        def forward(self, x, mask):
            return super().forward(mask[0].softmax(-1) @ x)

    x, mask = torch.randn(2, 6, 6), torch.randn(2, 1, 6, 6)
    assert deciding_sizes(Masked(), (x, mask), {}) == {6}


class Scan(nn.Module):
    """A state-space model in small: between two linears a loop over tokens, which writes to what it
    made and reads a matrix."""

    def __init__(self, k):
        super().__init__()
        self.into, self.gate, self.out = (nn.Linear(k, k) for _ in range(3))
        self.filter = nn.Conv1d(k, k, 3, padding=2, groups=k)
        self.decay = nn.Parameter(torch.rand(k, 4))

    def forward(self, x):
        y, gate = self.filter(self.into(x).mT)[..., : x.shape[1]].mT, torch.sigmoid(self.gate(x))
        state = torch.zeros(*y[:, 0].shape, 4, device=y.device)
        states = torch.zeros_like(y)
        for i in range(y.shape[1]):
            state = torch.exp(-self.decay) * state + y[:, i, :, None]
            states[:, i] = state.sum(-1)
        return x + self.out(states * gate)


@pytest.mark.parametrize("length", [5, 40, 160])
def test_a_long_loop_is_one_operation_between_sites(length):
    torch.manual_seed(length)
    block, x = Scan(6).eval(), torch.randn(3, length, 6)
    code = of(block, x).graph.code
    loops = [node for node in code.graph.nodes if isinstance(node.target, Stretch)]
    assert len(loops) == (length > 5) and len(code.graph.nodes) < 300
    assert [site.path for site in code.sites] == ["into", "gate", "out"] and code.unread == {}
    assert code.inputs == ((None, length, 6),)


@pytest.mark.parametrize("samples", [3, 2])
def test_a_loop_computes_what_its_block_does_of_the_leaves_at_hand(samples):
    torch.manual_seed(samples)
    block, x = Scan(6).eval(), torch.randn(samples, 60, 6)
    graph = of(block, torch.randn(3, 60, 6)).graph
    other = Scan(6).eval()
    moved = graph.update({name: p.detach() for name, p in other.named_parameters()})
    with torch.no_grad():
        assert torch.allclose(interpret(graph, (x,), {}), block(x), rtol=1e-5, atol=1e-6)
        assert torch.allclose(interpret(moved, (x,), {}), other(x), rtol=1e-5, atol=1e-6)
        source = graph.sites[2].source
        assert torch.allclose(
            inputs_of(graph, [source], (x,), {})[source].x,
            _entering(block, block.out, x),
            atol=1e-6,
        )
    with torch.enable_grad():
        x, same = x.clone().requires_grad_(), x.clone().requires_grad_()
        interpret(graph, (x,), {}).square().sum().backward()
        block(same).square().sum().backward()
    assert torch.allclose(x.grad, same.grad, rtol=1e-5, atol=1e-5)


def _entering(block, module, x):
    seen = []
    hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block(x)
    hook.remove()
    return seen[0]


def test_a_matrix_that_a_loop_multiplies_by_is_refused_by_name():
    class Mixed(Scan):
        def forward(self, x):
            y = self.into(x)
            state = torch.zeros_like(y[:, 0, :4])
            for i in range(y.shape[1]):
                state = torch.tanh(
                    torch.bmm(y[:, None, i], self.decay[None].repeat(len(y), 1, 1))[:, 0] + state
                )
            return self.out(y * state.sum(-1)[:, None, None])

    code = of(Mixed(6).eval(), torch.randn(2, 60, 6)).graph.code
    assert "decay" in code.unread and "is used by aten." in code.unread["decay"]


def test_a_program_for_one_length_is_not_run_on_another():
    class Chunks(nn.Module):
        def forward(self, x):
            return sum(x[:, i : i + 4].sum(1) for i in range(0, x.shape[1], 4))

    seg = of(Chunks(), torch.randn(2, 8, 12))
    assert interpret(seg.graph, (torch.randn(3, 8, 12),), {}).shape == (3, 12)
    with pytest.raises(
        QlabError,
        match=r"block was traced with an input of \(any, 8, any\) and is called with \(2, 12, 12\)",
    ):
        interpret(seg.graph, (torch.randn(2, 12, 12),), {})
