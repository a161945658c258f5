"""A segment as a function of tensors alone, with values or without."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from qlab.algebra.graph import Given, Left, Made
from qlab.algebra.tracing.taken_apart import put_together, take_apart


class OnTensors(nn.Module):
    """The segment as a function of the tensors among its inputs; everything else is part of its
    structure.

    It gives what the segment returns, and the tensors that the segment leaves in what it is called
    with; `after.left` says where.
    """

    def __init__(self, segment: nn.Module, args: tuple, kwargs: dict[str, Any]):
        super().__init__()
        self.segment = segment
        self.leaves, self.form = take_apart((args, kwargs))
        # A namespace, since export takes back what is assigned to a module itself.
        self.after = SimpleNamespace(left=None)

    def forward(self, *tensors: Tensor) -> Any:
        feed = iter(tensors)
        inputs = put_together(
            [next(feed) if isinstance(x, Tensor) else x for x in self.leaves], self.form
        )
        with as_it_runs(), named():
            out = self.segment(*inputs[0], **inputs[1])
        leaves, form = take_apart(inputs)
        given = {id(t): Given(i) for i, t in reversed(list(enumerate(tensors)))}
        new_tensors = [x for x in leaves if isinstance(x, Tensor) and id(x) not in given]
        places = {id(t): Made(i) for i, t in enumerate(new_tensors)} | given
        if not new_tensors:
            return out, {}
        self.after.left = Left(
            form, tuple(places[id(x)] if isinstance(x, Tensor) else x for x in leaves)
        )
        return out, {repr(self.after.left): new_tensors}


class Undecided(Exception):
    """Numbers that are not known while a segment is traced decide what it runs."""


@contextmanager
def named() -> Iterator[None]:
    """An error of torch's over numbers that are not known, as qlab's own: of the former torch
    prints all operations that were traced before it, which nobody can act on."""
    try:
        yield
    except RuntimeError as error:
        if "data-dependent" in str(error):
            raise Undecided(str(error)) from error
        raise


@contextmanager
def as_it_runs() -> Iterator[None]:
    """Code that asks whether it is compiled or exported hears that it is not: models have other
    ways for that, with other numbers."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag, compiler._is_exporting_flag
    compiler._is_compiling_flag = compiler._is_exporting_flag = False
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before


def without_values(
    module: nn.Module, tensors: tuple[Tensor, ...]
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the module and its inputs as tensors that have a place on the CPU and no memory:
    what a segment makes of plain numbers beside them (an index, a factor) keeps its values, which
    are lost where it is traced on the meta device."""
    with FakeTensorMode(allow_non_fake_inputs=True):

        def fake(t: Tensor) -> Tensor:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cpu")

        memo: dict[int, Any] = {
            id(p): nn.Parameter(fake(p), requires_grad=False) for p in module.parameters()
        }
        memo |= {id(b): fake(b) for b in module.buffers()}
        return copy.deepcopy(module, memo), tuple(fake(t) for t in tensors)
