"""What a lowered model holds in memory."""

import torch
from torch import nn

from qlab.lowering.weights.modules import QuantizedWeight


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's tensors by their kind: quantized weights, dense copies, embeddings (with a
    tied head), and the rest."""
    seen: set[int] = set()
    total = {"packed": 0, "dense copies": 0, "embeddings": 0, "other": 0}

    def add(kind: str, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.untyped_storage().data_ptr() not in seen:
                seen.add(tensor.untyped_storage().data_ptr())
                total[kind] += tensor.untyped_storage().nbytes()

    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            add("packed", *module.buffers_of_weight())
            add("dense copies", module.dense)
        elif isinstance(module, nn.Embedding):
            add("embeddings", module.weight)
    add("other", *model.parameters(), *model.buffers())
    return total
