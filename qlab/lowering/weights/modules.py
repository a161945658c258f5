"""The modules of a lowered model that hold quantized weights: `QLinear` in the place of an
nn.Linear, `QExperts` in that of a fused weight of experts.

A row of `kernels.py` says how such a module holds its weight and multiplies with it.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlab.algebra.experts import per_row
from qlab.algebra.online import QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.errors import QlabError
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.readonly import REFUSED, ReadOnly
from qlab.lowering.weights.kernels import Choice, Kernel, Passed, choose
from qlab.lowering.weights.setting import Activations, Setting


class QuantizedWeight(nn.Module):
    """W [n, k], or [e, n, k] for e experts, held as codes by a kernel.

    The tensors of the kernel's value are buffers under their own names. Its layout is part of the
    state: a state of another layout is refused.
    spec: the spec of the codes.
    passed: the kernels before its own that were meant for the weight, and why they do not take it.
    inputs: rounds x at run time in front of the kernel, or None. rounding: how x is rounded,
    whether here or by the kernel, or None.
    dense: a copy of W for products of many tokens, or None; never part of the state.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    dense: Tensor | None
    kernel: Kernel
    passed: tuple[Passed, ...]

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        dtype: torch.dtype,
        device: torch.device,
        dense_cache: bool,
        *,
        inputs: QuantizeInput | None = None,
        kernel: Kernel | None = None,
        activations: Activations | None = None,
    ):
        """path: the weight's name in messages. dtype: of the activations. dense_cache: keep a dense
        copy where products take one. inputs, activations: those of a `Setting`. kernel: default:
        the first that takes the leaf."""
        nn.Module.__init__(self)  # nn.Linear's would allocate a dense weight
        *self.experts, self.out_features, self.in_features = leaf.shape  # [] or [e]
        self.spec = leaf.spec
        setting = Setting(dtype=dtype, device=device, inputs=inputs, activations=activations)
        choice = choose(leaf, setting) if kernel is None else Choice(kernel, ())
        self.kernel, self.passed = choice
        packed = self.kernel.pack(path, leaf, setting)
        self.layout, self.form = packed.layout, packed[len(self.kernel.tensors) :]
        here = None if self.kernel.rounds else inputs
        self.inputs = None if here is None else RoundedInput(here, device)
        self.rounding = rounding_of(setting, self.kernel)
        for name in self.kernel.tensors:
            self.register_buffer(name, getattr(packed, name))
        keeps_copy = dense_cache and self.kernel.keeps_copy(device, bool(self.experts))
        copy = self.kernel.columns(packed).contiguous() if keeps_copy else None
        self.register_buffer("dense", copy, persistent=False)

    @property
    def packed(self) -> Any:
        """The value that the kernel multiplies, of the module's buffers as they are now."""
        tensors = [getattr(self, name) for name in self.kernel.tensors]
        return self.kernel.weight(*tensors, *self.form)

    def dequantized(self) -> Tensor:
        """W, dequantized now."""
        return self.kernel.dequantized(self.packed)

    def buffers_of_weight(self) -> tuple[Tensor | None, ...]:
        """The tensors that W is made of."""
        return self.packed[: len(self.kernel.tensors)]

    def _load_from_state_dict(self, *state: Any) -> None:
        super()._load_from_state_dict(*state)
        if self.dense is not None:  # a state holds no copy, so that of the new codes is made
            self.dense = self.kernel.columns(self.packed).contiguous()

    def _rows(self, x: Tensor) -> Tensor:
        """x [..., k] as it is multiplied: [m, k], rounded where inputs are."""
        x = x.reshape(-1, self.in_features)
        return x if self.inputs is None else self.inputs(x)

    def get_extra_state(self) -> Tensor:
        """The layout's name as bytes: a tensor, so that every file format of states can hold it."""
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Refuse words in another order."""
        name = bytes(state.tolist()).decode()
        if name != self.layout:
            raise QlabError(
                f"this state was packed as {name} and the module reads {self.layout}; lower the "
                "model directory here"
            )

    def extra_repr(self) -> str:
        facts = [
            f"in_features={self.in_features}",
            f"out_features={self.out_features}",
            f"spec={self.spec}",
            f"layout={self.layout}",
            *(["dense copy"] if self.dense is not None else []),
            *([f"x in {self.rounding}"] if self.kernel.rounds else []),
            *(passed.short for passed in self.passed),
        ]
        return ", ".join(facts)

    def __getstate__(self) -> dict[str, Any]:
        """The module for a pickle. torch cannot read tensors of 8-bit floats back from one, so
        their bytes stand for them, beside their dtypes."""
        narrow = {
            name: tensor
            for name, tensor in self._buffers.items()
            if tensor is not None and tensor.is_floating_point() and tensor.itemsize == 1
        }
        octets = {name: tensor.view(torch.uint8) for name, tensor in narrow.items()}
        dtypes = {name: tensor.dtype for name, tensor in narrow.items()}
        return {**self.__dict__, "_buffers": {**self._buffers, **octets}, "_narrow": dtypes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        narrow = state.pop("_narrow")
        super().__setstate__(state)
        for name, dtype in narrow.items():
            self._buffers[name] = state["_buffers"][name].view(dtype)


def rounding_of(setting: Setting, kernel: Kernel) -> str | None:
    """How the inputs of a weight are rounded, in words, or None."""
    if setting.inputs is not None:
        return str(setting.inputs.input_spec)
    return setting.activations if kernel.rounds else None


class QLinear(QuantizedWeight, nn.Linear):
    """y = x @ W.T + b, in the place of an nn.Linear, and one to code that asks: adapters wrap
    those, and models read the dtype of `weight`.

    weight: W, dequantized for the reader. Writing to it is refused, because nothing would keep what
    is written.
    """

    bias: Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        path: str,
        leaf: QTensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        device: torch.device,
        dense_cache: bool,
        *,
        inputs: QuantizeInput | None = None,
        kernel: Kernel | None = None,
        activations: Activations | None = None,
    ):
        super().__init__(
            path,
            leaf,
            dtype,
            device,
            dense_cache,
            inputs=inputs,
            kernel=kernel,
            activations=activations,
        )
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.dequantized().contiguous().as_subclass(ReadOnly)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise QlabError(REFUSED)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., k] -> [..., n]"""
        y = self.kernel.mm(self._rows(x), self.packed, self.dense, self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class QExperts(QuantizedWeight):
    """A fused weight [e, n, k] of experts: each row of x is multiplied by the weight of its own
    expert."""

    def __len__(self) -> int:
        return len(self.words)

    def forward(self, x: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
        """Rows ends[e-1]:ends[e] of x [s, k] times W_e.T, plus bias [e, n] if there is one -> [s,
        n]"""
        y = self.kernel.grouped_mm(self._rows(x), self.packed, self.dense, ends)
        return y if bias is None else y + per_row(bias, ends, len(y))
