"""The module that stands in for nn.Linear in a lowered model."""

from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import QlabError
from qlab.lower import cpu, cuda
from qlab.lower.nibbles import planes_of
from qlab.lower.ops import dequantize, int4_mm
from qlab.qtensor import QTensor


class QLinear(nn.Module):
    """y = x @ W.T + b with W held as packed 4-bit codes.

    words, scales, zeros: buffers in the order `layout`, which belongs to a device and is part of the state: loading the state of
    another device is refused. dense: a copy of W [n, k] for many tokens, never part of the state, or None.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    dense: Tensor | None

    def __init__(self, path: str, leaf: QTensor, bias: Tensor | None, dtype: torch.dtype, device: torch.device, dense_cache: bool):
        super().__init__()
        self.out_features, self.in_features = leaf.shape
        self.spec = str(leaf.spec)
        if device.type == "cpu":
            planes, self.layout = planes_of(path, leaf), cpu.layout()
            words, scales, zeros = cpu.pack(planes, dtype)
        else:
            planes, self.layout = planes_of(path, leaf, whole_rows=True), cuda.layout(device, dtype)
            words, scales, zeros = cuda.pack(planes, dtype, device)
        self.group, self.count = planes.group, planes.count
        for name, buffer in {"words": words, "scales": scales, "zeros": zeros}.items():
            self.register_buffer(name, buffer)
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))
        self.register_buffer("dense", self.weight().contiguous() if dense_cache else None, persistent=False)

    def weight(self) -> Tensor:
        """W [n, k], dequantized now."""
        return dequantize(self.words, self.scales, self.zeros, self.out_features, self.in_features, self.group, self.count, self.layout)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]"""
        y = int4_mm(x.reshape(-1, self.in_features), self.words, self.scales, self.zeros, self.dense, self.out_features, self.group,
                    self.count, self.layout)  # fmt: skip
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def get_extra_state(self) -> Tensor:
        """The layout's name as bytes: a tensor, so that every file format of states can hold it."""
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Refuse words in another order."""
        if (name := bytes(state.tolist()).decode()) != self.layout:
            raise QlabError(f"this state was packed as {name} and the module reads {self.layout}; lower the model directory here")

    def extra_repr(self) -> str:
        copy = "" if self.dense is None else ", dense copy"
        return f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec}, layout={self.layout}{copy}"
