"""What a model calls its blocks with, read off its own forward while stand-ins take the blocks'
places.

A block is called with the hidden states that the block before it returned. It may be called with
more that earlier blocks made: keys and values of another layer, a second stream. Which block made a
tensor is known by the tensor's identity: every stand-in returns tensors of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.algebra.graph import Code, Given, Made, open_symbols
from qlab.algebra.tracing.taken_apart import Form, put_together, take_apart, take_over
from qlab.errors import QlabError
from qlab.model.calls import Call, State

# (block, the number of one of its program's outputs)
Maker = tuple[int, int]
ENTRY: Maker = (-1, 0)  # of the hidden states that enter the first block, which no block made


def shapes_of(code: Code, tensors: Sequence[Tensor]) -> list[tuple[int, ...] | None]:
    """The shapes of a program's outputs on inputs of these shapes; None for what is no tensor."""
    bound = {**code.params, **code.constants}
    entering = [
        node.meta["val"]
        for node in code.graph.nodes
        if node.op == "placeholder" and node.name not in bound
    ]
    sizes: dict[Any, int] = {}
    for traced, tensor in zip(entering, tensors):
        for size, length in zip(traced.shape, tensor.shape):
            if open_symbols(size):
                sizes[size.node.expr] = length

    def length_of(size: Any) -> int:
        return int(size.node.expr.subs(sizes)) if open_symbols(size) else int(size)

    return [
        tuple(length_of(size) for size in out.shape) if isinstance(out, Tensor) else None
        for out in code.outputs
    ]


class Recorded(Exception):
    """The last block was reached while recording: the rest of the forward is not needed."""


class Makers(TorchDispatchMode):
    """Which block made which tensor while a model runs with stand-ins, and which tensors the model
    itself computed from them."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[int, Maker] = {}  # id of a tensor -> its maker
        self.derived: set[int] = set()
        self._alive: list[Tensor] = []  # no other tensor gets the id of one that is alive

    def known(self, tensor: Tensor, maker: Maker) -> Tensor:
        """The tensor, after its maker was noted."""
        self._alive.append(tensor)
        self.makers[id(tensor)] = maker
        return tensor

    def maker(self, leaf: Any) -> Maker | None:
        """The block that returned this, if one did."""
        return self.makers.get(id(leaf))

    def of_blocks(self, leaf: Any) -> bool:
        """Whether this was made by a block, and not by the model before its first block."""
        return self.maker(leaf) not in (None, ENTRY)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        arguments = pytree.tree_leaves((args, kwargs))
        if any(self.of_blocks(leaf) or id(leaf) in self.derived for leaf in arguments):
            for tensor in pytree.tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.makers.pop(id(tensor), None)  # changed in place
                    self.derived.add(id(tensor))
                    self._alive.append(tensor)
        return out

    def unseen(self, run: Callable[[], Any]) -> Any:
        """What run() returns; its operations are not followed."""
        self.__exit__(None, None, None)
        try:
            return run()
        finally:
            self.__enter__()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One call of a block.

    leaves, form: its arguments. makers: leaf -> the block that made it. at: the leaf that is the
    hidden states. leaving: the output of the block's program that is the hidden states.
    """

    leaves: tuple[Any, ...]
    form: Form
    makers: Mapping[int, Maker]
    at: int
    leaving: int

    @property
    def hidden(self) -> Tensor:
        """The hidden states."""
        return self.leaves[self.at]


class Recorder(nn.Module):
    """Stands in for a block: remembers what it was called with, and hands the hidden states on.

    path, index, block: the block and its place. makers: where tensors are known by their makers.
    program: the block's program for a call. before: the stand-in of the block before. last: whether
    the forward ends here. replay: hidden states to return in place of those that came.
    """

    def __init__(
        self, path: str, index: int, block: nn.Module, makers: Makers, program: Callable[..., Code]
    ):
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: it stays where it is
        self.path, self.index = path, index
        self.makers, self.program = makers, program
        self.last = False
        self.before: Recorder | None = None
        self.replay: Tensor | None = None
        self.seen: Seen | None = None

    def __getattr__(self, name: str) -> Any:
        """An attribute of the block: models read some, such as attention_type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.makers.unseen(lambda: self._forward(args, kwargs))

    def _forward(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        arguments = args, dict(sorted(kwargs.items()))
        leaves, form = take_apart(arguments)
        at = self._hidden(leaves)
        hidden = self.makers.known(leaves[at], ENTRY) if self.before is None else leaves[at]
        code = self.program(self._call(leaves, form, at))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = shapes_of(code, tensors)
        if tuple(hidden.shape) not in shapes:
            raise QlabError(
                f"{self.path} returns no tensor {tuple(hidden.shape)}, as are the hidden states "
                "that it is called with; qlab streams models whose blocks keep their shape"
            )
        leaving = shapes.index(tuple(hidden.shape))
        makers = {i: self.makers.maker(leaf) for i, leaf in enumerate(leaves)}
        self.seen = Seen(
            leaves=tuple(leaves),
            form=form,
            makers={i: maker for i, maker in makers.items() if maker is not None},
            at=at,
            leaving=leaving,
        )
        if self.last:
            raise Recorded
        outputs = self._stand_ins(code, shapes, hidden, leaving)
        returned, left = outputs[: code.out_spec.num_leaves], outputs[code.out_spec.num_leaves :]
        if code.left is not None:
            self._leave(arguments, code, tensors, left)
        return pytree.tree_unflatten(returned, code.out_spec)

    def _hidden(self, leaves: Sequence[Any]) -> int:
        """The leaf that is the hidden states: what the block before returned as such, else the
        first that may be."""
        floats = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if self.before is not None and self.before.seen is not None:
            returned = (self.before.index, self.before.seen.leaving)
            return next((i for i in floats if self.makers.maker(leaves[i]) == returned), floats[0])
        return floats[0]

    def _call(self, leaves: Sequence[Any], form: Form, at: int) -> Call:
        """The call, with holes for the hidden states and for what other blocks made."""
        holes = {at: 0}
        state = [leaves[at]]
        for i, leaf in enumerate(leaves):
            if i == at or not isinstance(leaf, Tensor):
                continue
            if id(leaf) in self.makers.derived:
                raise QlabError(
                    f"{self.path} is called with a tensor {tuple(leaf.shape)} that its model "
                    "computes of what earlier blocks return; qlab streams models that hand on "
                    "what blocks return as it is"
                )
            if self.makers.of_blocks(leaf):
                holes[i] = len(state)
                state.append(leaf)
        return Call(
            leaves=tuple(None if i in holes else leaf for i, leaf in enumerate(leaves)),
            form=form,
            holes=holes,
            entering=_on_meta(state),
        )

    def _stand_ins(
        self, code: Code, shapes: Sequence[Any], hidden: Tensor, leaving: int
    ) -> list[Any]:
        """What the program returns: hidden states as they came, or `replay`; in the place of other
        tensors their shapes alone."""
        handed_on = hidden if self.replay is None else self.replay
        handed_on = handed_on.view_as(handed_on)  # a tensor of its own, which is known by its maker
        outputs: list[Any] = []
        for k, (out, shape) in enumerate(zip(code.outputs, shapes)):
            if k == leaving:
                outputs.append(self.makers.known(handed_on, (self.index, k)))
            elif shape is None:
                outputs.append(out)
            else:
                empty = torch.empty(shape, dtype=out.dtype, device="meta")
                outputs.append(self.makers.known(empty, (self.index, k)))
        return outputs

    def _leave(
        self, arguments: Any, code: Code, given: Sequence[Tensor], results: Sequence[Tensor]
    ) -> None:
        """Put what the block leaves in its arguments there, for later blocks to find.

        given: the tensors of the arguments. results: the outputs of the program that are left."""
        assert code.left is not None
        leaves: list[Any] = []
        for leaf in code.left.leaves:
            if isinstance(leaf, Given):
                leaves.append(given[leaf.index])
            elif isinstance(leaf, Made):
                leaves.append(results[leaf.index])
            else:
                leaves.append(leaf)
        take_over(arguments, put_together(leaves, code.left.form))


def _on_meta(state: Sequence[Tensor]) -> State:
    return tuple(t.to("meta") for t in state)


def calls_of(seen: Sequence[Seen]) -> list[Call]:
    """What every block is called with, once all have been seen.

    What one block returns and a later one takes is handed on by the blocks in between.
    """
    tensors: dict[Maker, Tensor] = {}
    for call in seen:
        tensors |= {m: call.leaves[i] for i, m in call.makers.items() if m != ENTRY}
    states = _states(seen)
    calls = []
    for block, call in enumerate(seen):
        state, following = states[block], states[block + 1]
        holes = {i: state.index(maker) for i, maker in call.makers.items() if maker in state}
        holes[call.at] = 0
        calls.append(
            Call(
                leaves=tuple(None if i in holes else leaf for i, leaf in enumerate(call.leaves)),
                form=call.form,
                holes=holes,
                entering=_on_meta([call.hidden, *(tensors[maker] for maker in state[1:])]),
                passes=tuple(
                    len(state) + output if source == block else state.index((source, output))
                    for source, output in following
                ),
            )
        )
    return calls


def _states(seen: Sequence[Seen]) -> list[list[Maker]]:
    """What enters each block and what leaves the last, each tensor by its maker: the hidden states,
    then what an earlier block returned and this one or a later one takes."""
    hidden = [ENTRY, *((block, call.leaving) for block, call in enumerate(seen))]
    states = []
    for block in range(len(seen)):
        taken = {maker for call in seen[block:] for maker in call.makers.values()}
        taken -= {ENTRY, hidden[block]}
        states.append([hidden[block], *sorted(maker for maker in taken if maker[0] < block)])
    return [*states, [hidden[-1]]]


class Replaced:
    """A context in which a model has other modules in the place of its blocks."""

    def __init__(self, model: nn.Module, prefix: str, blocks: Sequence[nn.Module]):
        owner, _, self.name = prefix.rpartition(".")
        self.owner = model.get_submodule(owner)
        self.inside, self.outside = nn.ModuleList(blocks), getattr(self.owner, self.name)

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.inside)

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.outside)
