"""What a model calls its blocks with, read off its own forward while stand-ins take the blocks'
places.

A block is called with hidden states that the block before returned, and may be called with more
that earlier blocks made: keys and values of another layer, a second stream. Which tensor is whose
is known by identity: every stand-in returns tensors of its own.
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

Maker = tuple[
    int, int
]  # (block, which of its program's outputs); what enters the first block is nobody's
ENTRY: Maker = (-1, 0)


def shapes_of(code: Code, tensors: Sequence[Tensor]) -> list[tuple[int, ...] | None]:
    """The shapes of a program's outputs on inputs of these shapes; None for what is no tensor."""
    entering = [
        n.meta["val"]
        for n in code.graph.nodes
        if n.op == "placeholder" and n.name not in {**code.params, **code.constants}
    ]
    sizes = {
        d.node.expr: n
        for val, t in zip(entering, tensors)
        for d, n in zip(val.shape, t.shape)
        if open_symbols(d)
    }

    def size(d: Any) -> int:
        return int(d.node.expr.subs(sizes)) if open_symbols(d) else int(d)

    return [
        tuple(size(d) for d in out.shape) if isinstance(out, Tensor) else None
        for out in code.outputs
    ]


class Recorded(Exception):
    """The last block was reached while recording: the rest of the forward is not needed."""


class Makers(TorchDispatchMode):
    """Who made which tensor while a model runs with stand-ins, and what the model itself computed
    of such tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[int, Maker] = {}
        self.derived: set[int] = set()
        self.held: list[Tensor] = []  # so that the id of a tensor stays its own

    def made(self, tensor: Tensor, maker: Maker) -> Tensor:
        """The tensor, known as its maker's."""
        self.held.append(tensor)
        self.makers[id(tensor)] = maker
        return tensor

    def maker(self, leaf: Any) -> Maker | None:
        """Whose output this is."""
        return self.makers.get(id(leaf))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        of_blocks = [
            t
            for t in pytree.tree_leaves((args, kwargs))
            if self.maker(t) not in (None, ENTRY) or id(t) in self.derived
        ]
        for tensor in pytree.tree_leaves(out) if of_blocks else ():
            if isinstance(tensor, Tensor):
                self.makers.pop(id(tensor), None)  # changed in place
                self.derived.add(id(tensor))
                self.held.append(tensor)
        return out

    def apart(self, run: Callable[[], Any]) -> Any:
        """What run() gives, without looking at its operations."""
        self.__exit__(None, None, None)
        try:
            return run()
        finally:
            self.__enter__()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One call of a block: the leaves and their form, whose some of them are, which one is the
    hidden states, and which of the program's outputs are those that leave."""

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
    """Stands in for a block: remembers what it was called with and hands the hidden states on, or
    others instead."""

    def __init__(
        self, path: str, index: int, block: nn.Module, makers: Makers, program: Callable[..., Code]
    ):
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: it stays where it is
        self.path, self.index, self.makers, self.program, self.last = (
            path,
            index,
            makers,
            program,
            False,
        )
        self.before: Recorder | None = None
        self.replay: Tensor | None = None
        self.seen: Seen | None = None

    def __getattr__(
        self, name: str
    ) -> Any:  # models read attributes of their blocks, such as attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.makers.apart(lambda: self._forward(args, kwargs))

    def _forward(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        inputs = args, dict(sorted(kwargs.items()))
        leaves, form = take_apart(inputs)
        at = self._hidden(leaves)
        hidden = self.makers.made(leaves[at], ENTRY) if self.before is None else leaves[at]
        holes = {at: 0}
        state = [hidden]
        for i, leaf in enumerate(leaves):
            if i == at or not isinstance(leaf, Tensor):
                continue
            if id(leaf) in self.makers.derived:
                raise QlabError(
                    f"{self.path} is called with a tensor {tuple(leaf.shape)} that its model "
                    "computes of what earlier blocks return; qlab streams models that hand on "
                    "what blocks return as it is"
                )
            if self.makers.maker(leaf) not in (None, ENTRY):
                holes[i] = len(state)
                state.append(leaf)
        call = Call(
            leaves=tuple(None if i in holes else leaf for i, leaf in enumerate(leaves)),
            form=form,
            holes=holes,
            entering=_on_paper(state),
        )
        code = self.program(call)
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = shapes_of(code, given)
        if tuple(hidden.shape) not in shapes:
            raise QlabError(
                f"{self.path} returns no tensor {tuple(hidden.shape)}, as are the hidden states "
                "that it is called with; qlab streams models whose blocks keep their shape"
            )
        leaving = shapes.index(tuple(hidden.shape))
        makers = {
            i: maker
            for i, leaf in enumerate(leaves)
            if (maker := self.makers.maker(leaf)) is not None
        }
        self.seen = Seen(leaves=tuple(leaves), form=form, makers=makers, at=at, leaving=leaving)
        if self.last:
            raise Recorded
        outputs = self._stand_ins(code, shapes, hidden, leaving)
        if code.left is not None:
            self._leave(inputs, code, given, outputs[code.out_spec.num_leaves :])
        return pytree.tree_unflatten(outputs[: code.out_spec.num_leaves], code.out_spec)

    def _hidden(self, leaves: Sequence[Any]) -> int:
        """Which leaf is the hidden states: what the block before returned as such, else the first
        that may be."""
        floats = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if self.before is not None and self.before.seen is not None:
            returned = (self.before.index, self.before.seen.leaving)
            return next((i for i in floats if self.makers.maker(leaves[i]) == returned), floats[0])
        return floats[0]

    def _stand_ins(
        self, code: Code, shapes: Sequence[Any], hidden: Tensor, leaving: int
    ) -> list[Any]:
        """What the program gives: hidden states as they came, or others; of other tensors their
        shapes alone."""
        handed_on = hidden if self.replay is None else self.replay
        handed_on = handed_on.view_as(handed_on)  # a tensor of its own, which is known by its maker
        outputs = []
        for k, (out, shape) in enumerate(zip(code.outputs, shapes)):
            stand_in = (
                handed_on
                if k == leaving
                else out
                if shape is None
                else torch.empty(shape, dtype=out.dtype, device="meta")
            )
            outputs.append(
                self.makers.made(stand_in, (self.index, k))
                if isinstance(stand_in, Tensor)
                else stand_in
            )
        return outputs

    def _leave(
        self, inputs: Any, code: Code, given: Sequence[Tensor], made: Sequence[Tensor]
    ) -> None:
        """Put what the block leaves in its inputs there, for later blocks to find."""
        assert code.left is not None
        places = [
            given[x.index] if isinstance(x, Given) else made[x.index] if isinstance(x, Made) else x
            for x in code.left.leaves
        ]
        take_over(inputs, put_together(places, code.left.form))


def _on_paper(state: Sequence[Tensor]) -> State:
    return tuple(t.to("meta") for t in state)


def calls_of(seen: Sequence[Seen]) -> list[Call]:
    """What every block is called with, once all have been seen: what one leaves and a later one
    takes is handed on in between."""
    hidden = [ENTRY] + [(i, s.leaving) for i, s in enumerate(seen)]
    taken = [{m: s.leaves[i] for i, m in s.makers.items() if m != ENTRY} for s in seen]
    like = {m: tensor for found in taken for m, tensor in found.items()}
    states = []
    for j in range(len(seen)):
        later = {m for found in taken[j:] for m in found if m[0] < j and m != hidden[j]}
        states.append([hidden[j], *sorted(later)])
    states.append([hidden[-1]])
    calls = []
    for j, s in enumerate(seen):
        holes = {i: states[j].index(m) for i, m in s.makers.items() if m in states[j]} | {s.at: 0}
        calls.append(
            Call(
                leaves=tuple(None if i in holes else leaf for i, leaf in enumerate(s.leaves)),
                form=s.form,
                holes=holes,
                entering=_on_paper([s.hidden, *(like[m] for m in states[j][1:])]),
                passes=tuple(
                    len(states[j]) + m[1] if m[0] == j else states[j].index(m)
                    for m in states[j + 1]
                ),
            )
        )
    return calls


class Replaced:
    """The model with other modules in the place of its blocks, while the context lasts."""

    def __init__(self, model: nn.Module, prefix: str, blocks: Sequence[nn.Module]):
        owner, _, self.name = prefix.rpartition(".")
        self.owner = model.get_submodule(owner)
        self.inside, self.outside = nn.ModuleList(blocks), getattr(self.owner, self.name)

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.inside)

    def __exit__(self, *error: object) -> None:
        setattr(self.owner, self.name, self.outside)
