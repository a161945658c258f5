"""What a model calls its blocks with, read off its own forward while stand-ins take the blocks' places."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Call:
    """What a block is called with beside its hidden states, as a flat list with a hole at `hidden`."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    hidden: int

    def inputs(self, hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
        """The block's arguments around these hidden states."""
        leaves = [hidden if i == self.hidden else to_like(leaf, hidden) for i, leaf in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.spec)


def to_like(leaf: Any, like: Tensor) -> Any:
    """A tensor on the device of another and, if it is floating point, in its dtype; anything else as it is."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(like.device, like.dtype) if leaf.is_floating_point() else leaf.to(like.device)


@dataclass(frozen=True)
class Output:
    """What a block returns, read off a run on meta tensors: hidden states alone, or a tuple that holds them."""

    parts: tuple[Any, ...]
    spec: pytree.TreeSpec
    hidden: int

    def around(self, hidden: Tensor) -> Any:
        """The block's return value with these hidden states in it."""
        parts = [hidden if i == self.hidden else part for i, part in enumerate(self.parts)]
        return pytree.tree_unflatten(parts, self.spec)


class Recorded(Exception):
    """The last block was reached while recording: the rest of the forward is not needed."""


class Recorder(nn.Module):
    """Stands in for a block: remembers what it was called with and hands the hidden states on, or others instead."""

    def __init__(self, block: nn.Module, output: Callable[[Call, Tensor], Output]):
        super().__init__()
        object.__setattr__(self, "block", block)  # not a submodule: it stays where it is
        self.output, self.last = output, False
        self.replay: Tensor | None = None
        self.seen: tuple[Call, Tensor] | None = None

    def __getattr__(self, name: str) -> Any:  # models read attributes of their blocks, such as attention_type
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        at = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        hidden = leaves[at]
        leaves[at] = None
        call = Call(tuple(leaves), spec, at)
        self.seen = call, hidden
        if self.last:
            raise Recorded
        return self.output(call, hidden).around(hidden if self.replay is None else self.replay)


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
