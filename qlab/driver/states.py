"""The states between blocks as a file of one dtype holds them: one tensor after the other, what is
of another dtype by its bits."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.model.calls import Call, State


def stored_shapes(
    calls: Sequence[Mapping[str, Call]], path: str, dtype: torch.dtype
) -> list[tuple[int, ...]]:
    """The shapes of what enters a block, batch by batch, as `flat` makes them; refuses what has
    fewer bits than `dtype`."""
    shapes = []
    for call in calls:
        for t in call[path].entering:
            octets = t.shape[-1] * t.itemsize if t.ndim else 0
            if octets == 0 or octets % dtype.itemsize:
                raise QlabError(
                    f"{path} is called with a tensor {tuple(t.shape)} of {t.dtype} that another "
                    f"block made, which is not kept among hidden states of {dtype} while "
                    "calibrating; use a method without data (rtn)"
                )
            shapes.append((*t.shape[:-1], octets // dtype.itemsize))
    return shapes


def flat(states: Iterable[State], dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensors of all states, one by one."""
    for state in states:
        yield from (t if t.dtype == dtype else t.contiguous().view(dtype) for t in state)


def states_of(
    tensors: Iterator[Tensor], calls: Sequence[Mapping[str, Call]], path: str, device: torch.device
) -> Iterator[State]:
    """The states that enter a block, put together again: the inverse of `flat`."""
    for call in calls:
        yield tuple(next(tensors).view(like.dtype).to(device) for like in call[path].entering)
