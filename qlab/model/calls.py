"""What a block is called with, and what passes from one block to the next."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlab.algebra.tracing.taken_apart import Form, put_together
from qlab.errors import QlabError

# what enters a block and other blocks made: its hidden states [..., b, l, d] first
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """What a block is called with, and what the next block gets.

    leaves: the arguments as a flat list, with holes for what other blocks made. form: how the list
    becomes arguments again. entering: the state that enters, on the meta device. holes: leaf -> its
    place in the state. passes: the state that leaves, as places in the state that enters followed
    by the program's outputs.
    """

    leaves: tuple[Any, ...]
    form: Form
    holes: Mapping[int, int]
    entering: State
    passes: tuple[int, ...] = (1,)

    def inputs(self, state: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """The block's arguments around this state."""
        hidden = state[0]
        leaves = [
            state[self.holes[i]] if i in self.holes else to_like(leaf, hidden)
            for i, leaf in enumerate(self.leaves)
        ]
        return put_together(leaves, self.form)

    def leaving(self, state: Sequence[Tensor], outputs: Sequence[Any]) -> State:
        """The state that enters the next block."""
        known = (*state, *outputs)
        return tuple(known[i] for i in self.passes)


def to_like(leaf: Any, like: Tensor) -> Any:
    """A tensor on the device of another and, if it is floating point, in its dtype; anything else
    as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(like.device, like.dtype) if leaf.is_floating_point() else leaf.to(like.device)


def windows_axis(hidden: Tensor, tokens: Sequence[int]) -> int:
    """The axis of windows in hidden states [..., d], behind which that of their tokens lies.

    Models of several streams of hidden states have an axis for them before or behind these two.
    tokens: (windows, tokens in each), of those that the states were made of.
    """
    between = tuple(hidden.shape[:-1])
    axes = [i for i in range(len(between) - 1) if between[i : i + 2] == tuple(tokens)]
    if len(axes) == 1:
        return axes[0]
    raise QlabError(
        f"hidden states {tuple(hidden.shape)} of {tokens[0]} windows of {tokens[1]} tokens have "
        f"{'several places' if axes else 'no place'} where these can be; "
        f"{'give windows of another length' if axes else 'qlab streams models that have one'}"
    )
