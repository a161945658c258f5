"""Tuning of int4 products with activations of 8 bits on a GPU: random weights of a shape, on
activations that are rounded before they are timed."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.online import QuantizeInput
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.lowering.devices import device_label
from qlab.lowering.tuning.random_weight import random_weight
from qlab.lowering.tuning.shapes import DTYPES, Form, Shape
from qlab.lowering.tuning.shapes import check as check_int4
from qlab.lowering.tuning.timing import Call, copies, copy_rate, microseconds
from qlab.lowering.weights import int4_a8
from qlab.lowering.weights.setting import Setting

KERNELS = ("int4_int8", "int4_fp8")


def check(kernel: str, shapes: Sequence[Shape], form: Form, device: torch.device) -> None:
    """Refuse what has no such product."""
    if device.type != "cuda":
        raise QlabError(f"{kernel} has configurations on a GPU alone, not on {device}")
    check_int4(shapes, [1], "bfloat16", form.group)


def products(
    kernel: str,
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    form: Form,
    dtype: str,
    device: torch.device,
) -> Iterator[tuple[Any, Any, float]]:
    """(problem, measure, floor in microseconds) of every shape and number of tokens. Nothing is
    faster than a copy of what a product must move."""
    from qlab_kernels.config import Problem, moved

    rate = copy_rate(device)
    for n, k in shapes:
        count = 1 if form.experts else copies(n * k / 2, device)
        weights = [weight(kernel, n, k, form, DTYPES[dtype], device, s) for s in range(count)]
        launched = [int4_a8.launched(one) for one in weights]
        problems = [
            Problem(
                op=f"{kernel}_{'grouped_' if form.experts else ''}mm",
                cc=torch.cuda.get_device_capability(device),
                device=device_label(device),
                dtype=dtype,
                group=launched[0].group,
                zeros=form.zeros,
                n=n,
                k=k,
                m=m,
                experts=form.experts or 1,
            )
            for m in tokens
        ]
        for problem in {problem.bucket: problem for problem in problems}.values():
            x = torch.randn(problem.bucket, k, device=device, dtype=DTYPES[dtype])
            codes = int4_a8.codes(x, None, None, weights[0].spec, launched[0])
            ends = _sent(len(x), form.experts, device) if form.experts else None
            measure = partial(_microseconds, codes, launched, ends, x.dtype)
            yield problem, measure, moved(problem) / rate * 1e-3


def weight(
    kernel: str,
    n: int,
    k: int,
    form: Form,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
) -> int4_a8.Nibbles:
    """The packed weight that belongs to a seed; of experts all have the same numbers."""
    numbers = kernel.removeprefix("int4_")
    leaf = random_weight(n, k, min(form.group, k), form.zeros, device, seed)
    inputs = QuantizeInput(parse_spec(f"{numbers}-channel"))
    packed = int4_a8.pack(leaf, inputs, Setting(dtype=dtype, device=device), numbers)
    if not form.experts:
        return packed

    def repeated(part: Any) -> Any:
        return torch.stack([part] * form.experts) if isinstance(part, Tensor) else part

    return pytree.tree_map(repeated, packed)


def _sent(rows: int, experts: int, device: torch.device) -> Tensor:
    """The ends of the experts' rows, which are sent at random, each as likely."""
    sent = torch.randint(experts, (rows,), generator=torch.Generator().manual_seed(0))
    return sent.bincount(minlength=experts).cumsum(0).to(device, torch.int32)


def _microseconds(
    codes: Any,
    weights: Sequence[Any],
    ends: Tensor | None,
    dtype: torch.dtype,
    config: Any,
    reps: int,
) -> float:
    """Median microseconds of a product in one configuration."""
    calls = [_call(codes, one, ends, dtype, config) for one in weights]
    return microseconds(calls, reps, codes.p.device)


def _call(codes: Any, weight: Any, ends: Tensor | None, dtype: torch.dtype, config: Any) -> Call:
    """One product; ends: of the rows of experts, or None of a linear."""
    from qlab_kernels.int4_a8 import int4_a8_mm
    from qlab_kernels.int4_a8_grouped import int4_a8_grouped_mm

    if ends is None:
        return partial(int4_a8_mm, codes, weight, None, dtype, config)
    return partial(int4_a8_grouped_mm, codes, weight, ends, dtype, config)
