"""Tuning of products of 8-bit codes with 8-bit codes on a GPU: random codes of a shape, whose
products the tuner times in every configuration, the library's among them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from qlab.errors import QlabError
from qlab.lowering.tuning.shapes import DTYPES, Form, Shape
from qlab.lowering.tuning.timing import Call, copies, copy_rate, microseconds
from qlab.lowering.weights import octets_cuda
from qlab.lowering.weights.floats import BLOCK, E4M3, MULTIPLE
from qlab.lowering.weights.integers import Codes

KERNELS = ("int8_int8", "fp8_fp8")
WHOLE_ROWS = 2**31  # as a group: one scale for a row of any length


def check(kernel: str, shapes: Sequence[Shape], form: Form, device: torch.device) -> None:
    """Refuse what has no such product."""
    first = octets_cuda.FP8 if kernel == "fp8_fp8" else (8, 0)
    if not octets_cuda.fused(device, first):
        raise QlabError(
            f"{kernel} has configurations on GPUs from capability {first[0]}.{first[1]} on, with "
            f"Triton, not on {device}"
        )
    if kernel == "fp8_fp8" and form.zeros:
        raise QlabError("8-bit floats have no zero points; leave --asymmetric out")
    for n, k in shapes:
        group = min(form.group, k)
        if k % group or (kernel == "fp8_fp8" and group not in (BLOCK, k)):
            raise QlabError(
                f"{kernel} has no product of a weight {n}x{k} with scales of {group} channels: "
                + (
                    "give --group 128 for blocks, or none for rows"
                    if kernel == "fp8_fp8"
                    else "give a --group that divides its rows, or none for whole rows"
                )
            )


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
    from qlab_kernels.config import moved

    rate = copy_rate(device)
    op = f"{kernel}_{'grouped_' if form.experts else ''}mm"
    for n, k in shapes:
        count = 1 if form.experts else copies(n * k, device)
        weights = [WEIGHTS[kernel](n, k, form, device, seed) for seed in range(count)]
        keyed: dict[int, Any] = {}
        for m in tokens:
            codes = rows_of(kernel, m, k, form, device)
            key = KEYS[kernel](op, codes, weights[0], DTYPES[dtype])
            keyed[key.bucket] = key
        for problem in keyed.values():
            codes = rows_of(kernel, problem.bucket, k, form, device)
            measure = partial(_microseconds, kernel, codes, weights, form.experts, DTYPES[dtype])
            yield problem, measure, moved(problem) / rate * 1e-3


def integers_of(n: int, k: int, form: Form, device: torch.device, seed: int) -> octets_cuda.Int8:
    """Random int8 words, scales, zeros and sums."""
    rng = torch.Generator(device).manual_seed(seed)
    lead, group = (form.experts,) if form.experts else (), min(form.group, k)
    shape = (*lead, k // group, n)
    words = torch.randint(
        -128, 128, (*shape, group), generator=rng, dtype=torch.int8, device=device
    )
    scales = torch.rand(shape, generator=rng, dtype=torch.float32, device=device) / k
    zeros = None
    if form.zeros:
        zeros = torch.randint(-8, 8, shape, generator=rng, dtype=torch.int32, device=device)
    return words, scales, zeros, None


def floats_of(n: int, k: int, form: Form, device: torch.device, seed: int) -> octets_cuda.Fp8:
    """Random e4m3 words, padded as the library wants them, and scales of rows or of blocks."""
    rng = torch.Generator(device).manual_seed(seed)
    lead = (form.experts,) if form.experts else ()
    padded = (*lead, n + -n % MULTIPLE, k + -k % MULTIPLE)
    words = torch.randn(padded, generator=rng, dtype=torch.float32, device=device).to(E4M3)
    of_rows = padded[:-1]
    of_blocks = (*lead, -(-n // BLOCK), -(-k // BLOCK))
    shape = of_blocks if form.group < k else of_rows
    return words, torch.rand(shape, generator=rng, dtype=torch.float32, device=device) / k, n


def rows_of(kernel: str, m: int, k: int, form: Form, device: torch.device) -> Codes:
    """Random activations in codes, each token with its scale, or each of its groups of 128."""
    rng = torch.Generator(device).manual_seed(m)
    blocks = -(-k // BLOCK) if kernel == "fp8_fp8" and form.group < k else 1
    scales = torch.rand(m, blocks, generator=rng, dtype=torch.float32, device=device) + 0.5
    if kernel == "fp8_fp8":
        x = torch.randn(m, k, generator=rng, dtype=torch.float32, device=device)
        return Codes(x.to(E4M3), scales, None)
    p = torch.randint(-128, 128, (m, k), generator=rng, dtype=torch.int8, device=device)
    return Codes(p, scales, None)


def _microseconds(
    kernel: str,
    codes: Codes,
    weights: Sequence[Any],
    experts: int,
    dtype: torch.dtype,
    config: Any,
    reps: int,
) -> float:
    """Median microseconds of a product in one configuration."""
    calls = [_call(kernel, codes, weight, experts, dtype, config) for weight in weights]
    return microseconds(calls, reps, codes.p.device)


def _call(
    kernel: str, codes: Codes, weight: Any, experts: int, dtype: torch.dtype, config: Any
) -> Call:
    """One product; rows are sent to experts at random, each as likely."""
    if not experts:
        return partial(PRODUCTS[kernel], config, codes, weight, None, dtype)
    sent = torch.randint(experts, (len(codes.p),), generator=torch.Generator().manual_seed(0))
    ends = sent.bincount(minlength=experts).cumsum(0).to(codes.p.device, torch.int32)
    return partial(GROUPED[kernel], config, codes, weight, ends, dtype)


Function = Callable[..., Any]
WEIGHTS: dict[str, Function] = {"int8_int8": integers_of, "fp8_fp8": floats_of}
KEYS: dict[str, Function] = {
    "int8_int8": octets_cuda.int8_problem,
    "fp8_fp8": octets_cuda.fp8_problem,
}
PRODUCTS: dict[str, Function] = {"int8_int8": octets_cuda.int8_by, "fp8_fp8": octets_cuda.fp8_by}
GROUPED: dict[str, Function] = {
    "int8_int8": octets_cuda.int8_grouped_by,
    "fp8_fp8": octets_cuda.fp8_grouped_by,
}
