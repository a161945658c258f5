"""A tensor of which each rank of a process group has some rows (FSDP2)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard


class Shard:
    """The rows of this rank of a tensor that never changes, as one unit of FSDP2.

    Args:
        t: all of it; nothing here holds it any longer.
        mesh: the ranks that share it.
    """

    def __init__(self, t: Tensor, mesh: DeviceMesh):
        self.sent_bytes = sent_bytes(len(t), t[:1].nbytes, mesh.size())
        unit = nn.Module()
        unit.register_parameter("whole", nn.Parameter(t.contiguous(), requires_grad=False))
        self._unit: Any = fully_shard(unit, mesh=mesh)

    @property
    def nbytes(self) -> int:
        """The bytes that this rank holds."""
        return self._unit.whole.to_local().nbytes

    def gathered(self) -> Tensor:
        """All of the tensor, a copy, as all ranks ask for it at once. Each sends `sent_bytes`: the
        rows of all ranks are as many, the last ones filled up."""
        self._unit.unshard()
        try:
            return self._unit.whole.detach().clone()
        finally:
            self._unit.reshard()


def sent_bytes(rows: int, row_bytes: int, ranks: int) -> int:
    """What each rank sends to all others of a tensor of so many rows when they gather it."""
    return -(-rows // ranks) * row_bytes * (ranks - 1)


def mesh_of(group: Any, device: torch.device) -> DeviceMesh:
    """All ranks of a group, in a line."""
    return DeviceMesh.from_group(group, device.type)
