"""Values as bytes that another process makes the same values of. A tensor is laid out in memory as
it was: the order of sums in a product with it may depend on that."""

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError, first_line


@dataclass(frozen=True)
class Place:
    """A tensor as bytes in the order of its memory. sizes, axes: of what is laid out, and where its
    axes are in the tensor; expanded: the sizes of axes that repeat one row; device: where it is, in
    the process that has it."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    expanded: tuple[int, ...]
    device: torch.device
    needs_gradient: bool

    @property
    def nbytes(self) -> int:
        return prod(self.sizes) * self.dtype.itemsize

    def of(self, flat: Tensor) -> Tensor:
        """The tensor of those bytes."""
        laid = flat.view(self.dtype).reshape(self.sizes)
        inverse = sorted(range(len(self.axes)), key=self.axes.__getitem__)
        return laid.permute(inverse).expand(self.expanded).requires_grad_(self.needs_gradient)


def flat_of(t: Tensor) -> tuple[Place, Tensor]:
    """A tensor's place and bytes."""
    plain = t.detach().resolve_conj().resolve_neg()
    for axis, stride in enumerate(plain.stride()):
        if stride == 0 and plain.shape[axis] > 1:
            plain = plain.narrow(axis, 0, 1)
    axes = tuple(sorted(range(plain.ndim), key=plain.stride().__getitem__, reverse=True))
    laid = plain.permute(axes).contiguous()
    place = Place(
        dtype=t.dtype,
        sizes=tuple(laid.shape),
        axes=axes,
        expanded=tuple(t.shape),
        device=t.device,
        needs_gradient=t.requires_grad,
    )
    # an axis of size 1 may have any stride
    return place, laid.as_strided((laid.numel(),), (1,)).view(torch.uint8)


class _Packing(pickle.Pickler):
    """Pickles what is no tensor, and keeps the bytes of tensors beside it.

    No class of one call: a class is in a cycle of references, in which the tensors would outlive
    the call until Python looks for cycles.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self.known: dict[int, tuple[Tensor, tuple[int, Place]]] = {}  # each lives as long as this

    def persistent_id(self, part: Any) -> Any:
        if not isinstance(part, Tensor) or part.is_meta:
            return None
        if id(part) not in self.known:
            place, flat = flat_of(part)
            self.known[id(part)] = (part, (len(self.tensors), place))
            self.tensors.append(flat)
        return self.known[id(part)][1]


class _Unpacking(pickle.Unpickler):
    """Reads what `_Packing` wrote. receive: gives a tensor where it is first met."""

    def __init__(self, file: io.BytesIO, receive: Callable[[Place], Tensor]):
        super().__init__(file)
        self.receive = receive
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        number, place = pid
        if number == len(self.tensors):
            self.tensors.append(self.receive(place))
        return self.tensors[number]


def packed(value: Any) -> tuple[bytes, list[Tensor]]:
    """A value as bytes, and the bytes of its tensors. Refuses what no other process can hold."""
    file = io.BytesIO()
    packing = _Packing(file)
    try:
        packing.dump(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise QlabError(
            "what a step or a statistic made cannot be sent to other ranks or offloaded "
            f"({first_line(error)}); make it of functions and classes of a module, or run it in "
            "one process without offload"
        ) from error
    return file.getvalue(), packing.tensors


def unpacked(data: bytes, receive: Callable[[Place], Tensor]) -> Any:
    """The value of `packed`. Tensors come in the order in which they are first met."""
    return _Unpacking(io.BytesIO(data), receive).load()
