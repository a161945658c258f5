"""The modules of a lowered model that hold quantized weights: in the place of nn.Linear, and of a
fused weight of experts.

QLinear and QExperts multiply packed 4-bit codes with a kernel; `coded.py` has those for weights
that no kernel takes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlab.algebra.experts import per_row
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.errors import QlabError
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.readonly import REFUSED, ReadOnly
from qlab.lowering.weights import cpu, cuda
from qlab.lowering.weights.nibbles import planes_of
from qlab.lowering.weights.ops import dequantize, int4_grouped_mm, int4_mm


class QuantizedWeight(nn.Module):
    """W [n, k], or one for each of e experts, held as codes.

    words, scales, zeros: buffers in the order `layout`, which is part of the state: loading the
    state of another layout is refused; those of experts have a leading axis e. dense: a copy of W
    [n, k] or [e, n, k] for many tokens, never part of the state, or None. inputs: rounds x at run
    time, or None.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    dense: Tensor | None

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        layout: str,
        device: torch.device,
        inputs: QuantizeInput | None,
    ):
        nn.Module.__init__(self)  # nn.Linear's, which a subclass may be, would make a dense weight
        *self.experts, self.out_features, self.in_features = leaf.shape  # [] or [e]
        self.spec, self.layout = str(leaf.spec), layout
        self.inputs = None if inputs is None else RoundedInput(path, inputs, device)

    def dequantized(self) -> Tensor:
        """W, dequantized now."""
        raise NotImplementedError

    def columns(self) -> Tensor:
        """W with its columns in the order in which the module multiplies them."""
        return self.dequantized()

    def held(self) -> tuple[Tensor | None, ...]:
        """The tensors that W is made of."""
        return self.words, self.scales, self.zeros

    def _load_from_state_dict(self, *state: Any) -> None:
        super()._load_from_state_dict(*state)
        if self.dense is not None:  # no part of the state, and made of what is
            self.dense = self.columns().contiguous()

    def _rows(self, x: Tensor) -> Tensor:
        """x [..., k] as it is multiplied: [m, k], rounded where inputs are."""
        x = x.reshape(-1, self.in_features)
        return x if self.inputs is None else self.inputs(x)

    def get_extra_state(self) -> Tensor:
        """The layout's name as bytes: a tensor, so that every file format of states can hold it."""
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Refuse words in another order."""
        if (name := bytes(state.tolist()).decode()) != self.layout:
            raise QlabError(
                f"this state was packed as {name} and the module reads {self.layout}; lower the "
                "model directory here"
            )

    def extra_repr(self) -> str:
        copy = "" if self.dense is None else ", dense copy"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, spec={self.spec}, "
            f"layout={self.layout}{copy}"
        )


class LinearOfCodes(QuantizedWeight, nn.Linear):
    """In the place of an nn.Linear, and one to whoever asks: adapters wrap those, and models read
    the dtype of `weight`.

    weight: W, dequantized for the reader. What is written to it would be lost, so that is refused.
    """

    bias: Tensor | None  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantized().contiguous().as_subclass(ReadOnly)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise QlabError(REFUSED)
        super().__setattr__(name, value)


def refuse_lost(path: str, scales: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Refuse scales that a dtype of activations does not hold: too large, or so small that rounding
    them changes the weight.

    Groups whose scales are far below the weight's largest add nothing to it, and may be lost.
    """
    wide = torch.cat([s.float().abs().flatten() for s in scales])
    largest = wide.max()
    lost = (wide - wide.to(dtype).float()).abs().max()
    if not lost <= largest / 128:  # 16 bits round a number that they hold by 1/256 at most
        raise QlabError(
            f"{path} has scales up to {float(largest):.3g}, which {dtype} does not hold; lower to "
            "torch.bfloat16"
        )


class PackedWeight(QuantizedWeight):
    """Held as packed 4-bit codes in an order that belongs to a device.

    perm: the input channel of every column of codes (and of the dense copy), for formats with
    g_idx, or None.
    """

    perm: Tensor | None

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        dtype: torch.dtype,
        device: torch.device,
        dense_cache: bool,
        inputs: QuantizeInput | None = None,
    ):
        on_cpu = device.type == "cpu"
        super().__init__(
            path, leaf, cpu.layout() if on_cpu else cuda.layout(device, dtype), device, inputs
        )
        leaves = [expert(leaf, e) for e in range(self.experts[0])] if self.experts else [leaf]
        planes = [planes_of(path, one, whole_rows=not on_cpu) for one in leaves]
        self.group, self.count = planes[0].group, planes[0].count
        refuse_lost(path, [p.scales for p in planes], dtype)
        packed = [cpu.pack(p, dtype) if on_cpu else cuda.pack(p, dtype, device) for p in planes]
        for name, parts in zip(("words", "scales", "zeros"), zip(*packed)):
            self.register_buffer(
                name, parts[0] if parts[0] is None or not self.experts else torch.stack(parts)
            )
        self.register_buffer("perm", None if leaf.perm is None else leaf.perm.to(device))
        kept = dense_cache and (on_cpu or cuda.reads_dense(device, bool(self.experts)))
        self.register_buffer(
            "dense", self.columns().contiguous() if kept else None, persistent=False
        )

    def dequantized(self) -> Tensor:
        return self.columns() if self.perm is None else self.columns()[..., self.perm.argsort()]

    def held(self) -> tuple[Tensor | None, ...]:
        return *super().held(), self.perm

    def _rows(self, x: Tensor) -> Tensor:
        x = super()._rows(x)
        return x if self.perm is None else x[:, self.perm]

    def columns(self) -> Tensor:
        """In the order of the codes."""
        own = (self.out_features, self.in_features, self.group, self.count, self.layout)
        if not self.experts:
            return dequantize(self.words, self.scales, self.zeros, *own)
        zeros = [None] * len(self.words) if self.zeros is None else self.zeros
        return torch.stack(
            [dequantize(w, s, z, *own) for w, s, z in zip(self.words, self.scales, zeros)]
        )


class QLinear(PackedWeight, LinearOfCodes):
    """y = x @ W.T + b."""

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        dense_cache: bool,
        inputs: QuantizeInput | None = None,
    ):
        super().__init__(path, leaf, dtype, device, dense_cache, inputs)
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]"""
        y = int4_mm(
            self._rows(x),
            self.words,
            self.scales,
            self.zeros,
            self.dense,
            self.out_features,
            self.group,
            self.count,
            self.layout,
        )
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


class QExperts(PackedWeight):
    """A fused weight [e, n, k] of experts: each row of x is multiplied by the weight of its own
    one."""

    def __len__(self) -> int:
        return len(self.words)

    def forward(self, x: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
        """Rows ends[e-1]:ends[e] of x [s, k] times W_e.T, plus bias [e, n] if there is one -> [s,
        n]"""
        y = int4_grouped_mm(
            self._rows(x),
            self.words,
            self.scales,
            self.zeros,
            self.dense,
            ends,
            self.out_features,
            self.group,
            self.count,
            self.layout,
        )
        return y if bias is None else y + per_row(bias, ends, len(y))


def expert(leaf: QTensor, e: int) -> QTensor:
    """The weight [n, k] of one expert of a leaf [e, n, k]."""
    zeros, outer = (None if part is None else part[e] for part in (leaf.zeros, leaf.outer))
    return QTensor(leaf.codes[e], leaf.scales[e], zeros, leaf.spec, outer, leaf.perm)
