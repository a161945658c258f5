"""What a module gives, read off runs of its own code on small arguments: the form and dtypes of its
results, and how their sizes follow from those of the arguments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from qlab.algebra.graph import Left, open_symbols
from qlab.algebra.tracing.on_tensors import OnTensors
from qlab.algebra.tracing.taken_apart import Form, put_together

# What symbols stand for in the two runs: primes, so that products of few of them are told apart.
NUMBERS = (5, 7, 11, 13, 17, 19, 23, 29), (11, 13, 17, 19, 23, 29, 31, 37)
Sizes = Sequence[tuple[int, ...]]  # those of every leaf in one run
Axis = tuple[int, int]  # (leaf, axis)
Outcome = tuple[list[Any], pytree.TreeSpec, Left | None]


@dataclass(frozen=True)
class Size:
    """The product of a factor and of sizes that the arguments show."""

    factor: int
    axes: tuple[Axis, ...] = ()

    def among(self, leaves: Sequence[Any]) -> Any:
        """This size where the arguments have these leaves."""
        return self.factor * prod(sizes_of(leaves[leaf])[axis] for leaf, axis in self.axes)


@dataclass(frozen=True)
class Shaped:
    """A tensor whose shape follows from the sizes of the arguments."""

    dtype: torch.dtype
    sizes: tuple[Size, ...]

    def shape(self, leaves: Sequence[Any]) -> list[Any]:
        """Its shape where the arguments have these leaves."""
        return [size.among(leaves) for size in self.sizes]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a module gives when it is called with arguments of one form.

    form, constants: of the arguments; a constant is None where a leaf is a tensor or a number.
    tensors: leaf -> dtype and number of axes. numbers: the leaves that are sizes of tensors.
    gives: first the leaves of what the module returns, then the tensors that it leaves in its
    arguments; a `Shaped` stands for a tensor. out_spec: the form of what it returns. left: what its
    arguments become, where it leaves tensors in them.
    """

    form: Form
    constants: tuple[Any, ...]
    tensors: Mapping[int, tuple[torch.dtype, int]]
    numbers: tuple[int, ...]
    gives: tuple[Any, ...]
    out_spec: pytree.TreeSpec
    left: Left | None

    def are_for(self, leaves: Sequence[Any], form: Form) -> bool:
        """Whether arguments are of the form."""
        if form != self.form or _tensors(leaves) != self.tensors:
            return False
        constants = [
            i for i in range(len(leaves)) if i not in self.tensors and i not in self.numbers
        ]
        return all(
            leaves[i] is self.constants[i] or leaves[i] == self.constants[i] for i in constants
        )


def sizes_of(leaf: Any) -> tuple[Any, ...]:
    """The sizes that a leaf shows: those of a tensor's axes, or a number itself."""
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else (leaf,)


def read_results(
    module: nn.Module, leaves: Sequence[Any], form: Form, anyhow: bool = False
) -> Results:
    """What a module on the meta device gives on arguments with these leaves, whose open sizes are
    symbols.

    The module runs twice, on other numbers and sizes. Raises where it does not run, writes to its
    arguments, or gives what does not follow from their sizes. anyhow: such a module runs once on
    the traced sizes instead, and a size that equals one of an argument is taken for that.
    """
    if not _tensors(leaves):
        raise ValueError("a module that is called without tensors")
    if any(isinstance(leaf, nn.Module) for leaf in leaves):
        raise ValueError("a module that is called with another one")
    sizes = [size for leaf in leaves for size in sizes_of(leaf)]
    if any(open_symbols(size) and not size.node.has_hint() for size in sizes):
        raise ValueError("a module that is called with sizes that numbers decide")
    try:
        return _read(module, leaves, form, [_small(leaves, numbers) for numbers in NUMBERS])
    except Exception:  # whatever the module's own forward raises
        if not anyhow:
            raise
    return _read(module, leaves, form, [[_traced(leaf) for leaf in leaves]])


def _read(module: nn.Module, leaves: Sequence[Any], form: Form, runs: Sequence[Sizes]) -> Results:
    outcomes = [_run(module, leaves, form, sizes, number) for number, sizes in enumerate(runs)]
    first, out_spec, left = outcomes[0]
    if any(outcome[1:] != (out_spec, left) for outcome in outcomes):
        raise ValueError("a module whose results have another form on other arguments")
    known = (Tensor, torch.SymInt)
    return Results(
        form=form,
        constants=tuple(None if isinstance(leaf, known) else leaf for leaf in leaves),
        tensors=_tensors(leaves),
        numbers=tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.SymInt)),
        gives=tuple(
            _result([flat[i] for flat, *_ in outcomes], leaves, runs) for i in range(len(first))
        ),
        out_spec=out_spec,
        left=left,
    )


def _tensors(leaves: Sequence[Any]) -> dict[int, tuple[torch.dtype, int]]:
    return {i: (t.dtype, t.ndim) for i, t in enumerate(leaves) if isinstance(t, Tensor)}


# ---------------------------------------------------------------- sizes of a run
def _small(leaves: Sequence[Any], numbers: Sequence[int]) -> Sizes:
    """Sizes with these numbers for symbols; channels keep what they have."""
    channels = _channels(leaves)
    sizes = [size for leaf in leaves for size in sizes_of(leaf)]
    symbols = sorted({s for size in sizes for s in open_symbols(size)} - set(channels), key=str)
    if len(symbols) > len(numbers):
        raise ValueError("a module that is called with many sizes")
    instead = {**channels, **dict(zip(symbols, numbers, strict=False))}

    def number(size: Any) -> Any:
        return int(size.node.expr.subs(instead)) if open_symbols(size) else size

    return [tuple(number(size) for size in sizes_of(leaf)) for leaf in leaves]


def _channels(leaves: Sequence[Any]) -> dict[Any, int]:
    """Symbols that are the last axis of floating-point tensors and nothing else, with their traced
    numbers."""
    last, others = {}, set()
    for leaf in leaves:
        *before, end = sizes_of(leaf) or (None,)
        floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
        if floats and open_symbols(end) and end.node.expr.is_Symbol:
            last[end.node.expr] = int(end.node.hint)
        else:
            others |= open_symbols(end)
        others |= {symbol for size in before for symbol in open_symbols(size)}
    return {symbol: number for symbol, number in last.items() if symbol not in others}


def _traced(leaf: Any) -> tuple[Any, ...]:
    return tuple(int(size.node.hint) if open_symbols(size) else size for size in sizes_of(leaf))


# ---------------------------------------------------------------- a run
def _run(
    module: nn.Module, leaves: Sequence[Any], form: Form, sizes: Sizes, number: int
) -> Outcome:
    """What a module gives on arguments of these sizes. The first run has zeros everywhere."""
    generator = torch.Generator().manual_seed(number) if number else None
    filled = [_filled(leaf, at, generator) for leaf, at in zip(leaves, sizes)]
    args, kwargs = put_together(filled, form)
    on_tensors = OnTensors(module, args, kwargs)
    weights = {
        f"segment.{name}": _row(t.shape, t.dtype, generator).expand(t.shape)
        for name, t in named_leaves(module).items()
    }  # which take no memory
    tensors = [t for t in filled if isinstance(t, Tensor)]
    with torch.no_grad():
        returned = functional_call(on_tensors, weights, tuple(tensors))
    if generator is not None and any(t._version for t in tensors):
        raise ValueError("a module that writes to its arguments")
    flat, spec = pytree.tree_flatten(returned)
    return flat, spec.child(0), on_tensors.after.left


def named_leaves(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module, under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return parameters | dict(module.named_buffers(remove_duplicate=False))


def _filled(leaf: Any, sizes: tuple[int, ...], generator: torch.Generator | None) -> Any:
    if isinstance(leaf, torch.SymInt):
        return sizes[0]
    if not isinstance(leaf, Tensor):
        return leaf
    return _values(sizes, leaf.dtype, generator)


def _row(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Values along the last axis of a weight."""
    if generator is None or not dtype.is_floating_point:
        return torch.zeros((), dtype=dtype)
    return _values(shape[-1:], dtype, generator)


def _values(
    sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    if generator is None or not dtype.is_floating_point:
        return torch.zeros(sizes, dtype=dtype)
    return torch.randn(sizes, generator=generator, dtype=torch.float32).to(dtype)


# ---------------------------------------------------------------- what comes of it
def _result(of_runs: Sequence[Any], leaves: Sequence[Any], runs: Sequence[Sizes]) -> Any:
    """One result, as it follows from the sizes of the arguments."""
    first = of_runs[0]
    if not isinstance(first, Tensor):
        if any(value != first for value in of_runs):
            raise ValueError("a module that gives numbers which its arguments decide")
        return first
    if any((t.dtype, t.ndim) != (first.dtype, first.ndim) for t in of_runs):
        raise ValueError("a module that gives tensors of another form on other arguments")
    channels = _channels(leaves)
    axes = {
        size.node.expr: (i, axis)
        for i, leaf in reversed(list(enumerate(leaves)))
        for axis, size in enumerate(sizes_of(leaf))
        if open_symbols(size) - set(channels)
    }
    sizes = []
    for axis in range(first.ndim):
        # one run alone does not tell channels from sizes of arguments
        told = len(runs) > 1 or axis < first.ndim - 1
        numbers = [t.shape[axis] for t in of_runs]
        sizes.append(_size(numbers, list(axes.values()) if told else [], runs))
    return Shaped(first.dtype, tuple(sizes))


def _size(numbers: Sequence[int], axes: Sequence[Axis], runs: Sequence[Sizes]) -> Size:
    """The size that has these numbers in the runs: an argument's, the same in all, or a multiple of
    a product of arguments' sizes."""
    for leaf, axis in axes:
        if all(number == sizes[leaf][axis] for number, sizes in zip(numbers, runs)):
            return Size(1, ((leaf, axis),))
    if len(set(numbers)) == 1:
        return Size(numbers[0])
    for count in (1, 2, 3):
        for chosen in combinations(axes, count):
            products = [prod(sizes[leaf][axis] for leaf, axis in chosen) for sizes in runs]
            factors = {divmod(number, product) for number, product in zip(numbers, products)}
            factor, rest = factors.pop()
            if not factors and not rest and factor:
                return Size(factor, chosen)
    raise ValueError("a module whose results have sizes that its arguments' do not decide")
