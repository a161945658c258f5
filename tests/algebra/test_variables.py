"""What a whole model learns: Adam in files is Adam, and stored numbers are those of their dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlab.algebra.variables import B1, B2, EPS, Stored, Variables


@given(st.integers(0, 100), st.integers(1, 6))
def test_steps_are_those_of_adam(seed, steps):
    drawn = torch.Generator().manual_seed(seed)
    targets = {"a": torch.randn(3, 4, generator=drawn), "b": torch.randn(5, generator=drawn)}
    variables = Variables({name: t.shape for name, t in targets.items()})
    expected = {name: torch.zeros_like(t).requires_grad_() for name, t in targets.items()}
    adam = torch.optim.Adam(expected.values(), lr=0.1, betas=(B1, B2), eps=EPS)
    for _ in range(steps):
        for moves in (variables.moves(list(targets)), expected):
            loss = sum((moves[name] - t).square().sum() for name, t in targets.items())
            loss.backward()
        variables.update(0.1)
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        for name, move in variables.moves(list(targets)).items():
            torch.testing.assert_close(move, expected[name].detach(), rtol=1e-4, atol=1e-5)
            assert not variables.best(name).any()
        variables.keep()
        for name in targets:
            assert torch.equal(variables.best(name), variables.moves([name])[name])


def test_what_got_no_gradient_stays():
    variables = Variables({"a": (2,), "b": (2,)})
    moves = variables.moves(["a", "b"])
    moves["a"].sum().backward()
    variables.update(0.1)
    with torch.no_grad():
        now = variables.moves(["a", "b"])
    assert now["a"].all() and not now["b"].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_stored_numbers_are_those_of_the_dtype_and_gradients_pass(dtype):
    x = torch.tensor([0.1, -3.3, 1e6, 0.0], requires_grad=True)
    stored = Stored.apply(x, dtype)
    assert torch.equal(stored, stored.to(dtype).float())
    assert torch.isfinite(stored).all()
    (stored * torch.arange(4)).sum().backward()
    assert torch.equal(x.grad, torch.arange(4.0))
