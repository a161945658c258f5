"""Tuning on this machine: which configuration of a product is fastest for given shapes and
numbers of tokens.

The measuring half of `qlab_kernels.tune`: random weights of the shape, rotated so that none stays
in a cache, timed by `timing`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.lowering.devices import device_label, device_named
from qlab.lowering.tuning import int4_a8, octet_pairs
from qlab.lowering.tuning.random_weight import random_weight, rounded_once
from qlab.lowering.tuning.shapes import DTYPES, LINEAR, Form, Shape, check, check_tokens, one_by_one
from qlab.lowering.tuning.timing import copies, copy_rate, matmul_rate, microseconds
from qlab.lowering.weights import cpu, cuda, int4
from qlab.lowering.weights.nibbles import spread
from qlab.lowering.weights.packed import Packed, stacked
from qlab.lowering.weights.setting import Setting

Call = Callable[[], Tensor]


# Kernels that multiply activations of 8 bits, by the module that times them.
OF_OCTETS: dict[str, Any] = {
    name: module for module in (octet_pairs, int4_a8) for name in module.KERNELS
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product whose configuration is chosen.

    problem: its key in the config cache.
    measure: (configuration, repetitions) -> median microseconds.
    floor_us: microseconds that no configuration can be below.
    more: what its row says beside the chosen configuration.
    """

    problem: Any
    measure: Callable[[Any, int], float]
    floor_us: float
    more: dict[str, Any] = field(default_factory=dict)


def tune_shapes(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    form: Form = LINEAR,
    *,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
    kernel: str = "int4",
    budget: float = 10.0,
    retune: bool = False,
    said: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time the configurations for every shape and number of tokens and keep the fastest in the
    user's config cache.

    tokens: where there are experts, the rows of all of them: a token is one for each expert that it
    is sent to.
    kernel: "int4", or on a GPU "int8_int8", "fp8_fp8", "int4_int8" or "int4_fp8"; of fp8_fp8 a
    group of 128 stands for blocks of 128 x 128.
    budget: seconds for each. What was measured before with the same kernels is not measured again
    unless `retune`. Returns one row each: op, experts, n, k, m, config, us, gbps, trials, source
    and how many timings were taken now.
    """
    from qlab_kernels.cache import require_writable
    from qlab_kernels.capability import KernelError

    if kernel not in ("int4", *OF_OCTETS):
        raise QlabError(f"no kernel {kernel!r} is tuned; there are int4, {', '.join(OF_OCTETS)}")
    if kernel == "int4":
        check(shapes, tokens, dtype, form.group)
    check_tokens(tokens, dtype)
    where = device_named(device)
    if kernel != "int4":
        OF_OCTETS[kernel].check(kernel, shapes, form, where)
    try:
        if kernel == "int4" and form.experts and one_by_one(where):
            raise QlabError(
                f"{where} multiplies experts one by one, as linears: tune their shapes without a "
                "number of experts"
            )
        require_writable()
        if kernel != "int4":
            timed = OF_OCTETS[kernel].products(kernel, shapes, tokens, form, dtype, where)
            products: Iterator[Product] = (
                Product(problem=problem, measure=measure, floor_us=floor_us)
                for problem, measure, floor_us in timed
            )
        elif where.type == "cuda":
            products = _products_on_gpu(shapes, tokens, form, dtype, where)
        else:
            products = _products_on_cpu(shapes, tokens, form, dtype, budget)
        return [_tune(product, budget, retune, said) for product in products]
    except KernelError as error:
        raise QlabError(str(error)) from error


def _tune(
    product: Product, budget: float, retune: bool, said: Callable[[str], object]
) -> dict[str, Any]:
    """Choose the configuration of one product, say which, and return its row."""
    from qlab_kernels.tune import Timing, tune

    problem = product.problem
    timed: list[Timing] = []
    entry = tune(
        problem,
        product.measure,
        budget,
        floor_us=product.floor_us,
        retune=retune,
        said=timed.append,
    )
    failures = sum(bool(timing.failure) for timing in timed)
    failed = f", {failures} failed" if failures else ""
    timings = f"{len(timed)} timings{failed}" if timed else "measured before"
    experts = f"{problem.experts}x" if problem.grouped else ""
    said(
        f"{experts}{problem.n}x{problem.k}, {problem.bucket} tokens: {entry.config.kind} in "
        f"{entry.us:.1f} us ({timings})"
    )
    return {
        "op": problem.op,
        "experts": problem.experts,
        "n": problem.n,
        "k": problem.k,
        "m": problem.bucket,
        **entry.json(),
        "timings": len(timed),
        **product.more,
    }


def _once(problems: Iterable[Any]) -> list[Any]:
    """One problem for each bucket of tokens."""
    return list({(problem.op, problem.bucket): problem for problem in problems}.values())


# ---------------------------------------------------------------- on a GPU
def _products_on_gpu(
    shapes: Sequence[Shape], tokens: Sequence[int], form: Form, dtype: str, device: torch.device
) -> Iterator[Product]:
    from qlab_kernels.config import Problem
    from qlab_kernels.cost import floor, true_bytes

    rates = copy_rate(device), matmul_rate(device, DTYPES[dtype])
    for n, k in shapes:
        weights = _gpu_weights(n, k, form, DTYPES[dtype], device)
        problems = [
            Problem(
                op="int4_grouped_mm" if form.experts else "int4_mm",
                cc=torch.cuda.get_device_capability(device),
                device=device_label(device),
                dtype=dtype,
                group=weights[0].group,
                zeros=form.zeros,
                n=n,
                k=k,
                m=m,
                experts=form.experts or 1,
            )
            for m in tokens
        ]
        for problem in _once(problems):
            x = torch.randn(problem.bucket, k, device=device, dtype=DTYPES[dtype])
            yield Product(
                problem=problem,
                measure=partial(_time_on_gpu, x, weights, form.experts),
                floor_us=floor(problem, true_bytes(problem), *rates),
            )


def _gpu_weights(n: int, k: int, form: Form, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """As many weights as make every call read its own from memory, as they are launched.

    Of experts there is one weight, in which all have the same numbers, because several would not
    fit beside the buffer that is larger than the cache and cleared before each call.
    """
    weights = []
    for seed in range(1 if form.experts else copies(n * k / 2, device)):
        leaf = random_weight(n, k, form.group, form.zeros, device, seed)
        packed = int4.pack("the weight", leaf, Setting(dtype=dtype, device=device))
        whole = stacked([packed] * form.experts) if form.experts else packed
        weights.append(cuda.launched(whole))
    return weights


def _time_on_gpu(x: Tensor, weights: Sequence[Any], experts: int, config: Any, reps: int) -> float:
    """Median microseconds of a product in one configuration."""
    calls = [_gpu_call(x, weight, config, experts) for weight in weights]
    return microseconds(calls, reps, x.device)


def _gpu_call(x: Tensor, weight: Any, config: Any, experts: int) -> Call:
    """One product; rows are sent to experts at random, each as likely, as the cost model
    supposes."""
    from qlab_kernels.grouped import int4_grouped_mm
    from qlab_kernels.int4_mm import int4_mm

    if not experts:
        return partial(int4_mm, x, weight, config)
    sent = torch.randint(experts, (len(x),), generator=torch.Generator().manual_seed(0))
    ends = sent.bincount(minlength=experts).cumsum(0).to(x.device, torch.int32)
    return partial(int4_grouped_mm, x, weight, ends, config)


# ---------------------------------------------------------------- on a CPU
def _products_on_cpu(
    shapes: Sequence[Shape], tokens: Sequence[int], form: Form, dtype: str, budget: float
) -> Iterator[Product]:
    """Both questions of a CPU: int4 against dequantizing for the call, and int4 beside a dense
    copy."""
    if dtype != "bfloat16":
        raise QlabError(
            f"on a CPU int4 products of {dtype} activations are always dense, so there is nothing "
            "to tune; use bfloat16"
        )
    device = torch.device("cpu")
    for n, k in shapes:
        leaves = [
            random_weight(n, k, form.group, form.zeros, device, seed)
            for seed in range(copies(n * k / 2, device))
        ]
        setting = Setting(dtype=torch.bfloat16, device=device)
        weights = [int4.pack("the weight", leaf, setting) for leaf in leaves]
        rows, half = weights[0].words.shape  # the key holds the sizes that the kernel sees
        group = weights[0].group
        for beside_copy in (False, True):
            copied = leaves[: copies(2 * n * k, device)] if beside_copy else []
            dense = [rounded_once(leaf, torch.bfloat16) for leaf in copied]
            problems = [
                cpu.problem(m, torch.bfloat16, beside_copy, rows, 2 * half, group, form.zeros)
                for m in tokens
            ]
            for problem in _once(problems):
                x = torch.randn(problem.bucket, k, dtype=torch.bfloat16)
                yield Product(
                    problem=problem,
                    measure=partial(_time_on_cpu, x, weights, dense, budget),
                    floor_us=0.0,
                    more={"dense_copy": beside_copy},
                )


def _time_on_cpu(
    x: Tensor,
    weights: Sequence[Packed],
    dense: Sequence[Tensor],
    budget: float,
    config: Any,
    reps: int,
) -> float:
    """Median microseconds of a product in one configuration. A long product is not repeated as
    often: the time limit is a quarter of the budget."""
    return microseconds(_cpu_calls(config.kind, x, weights, dense), reps, x.device, budget / 4)


def _cpu_calls(
    kind: str, x: Tensor, weights: Sequence[Packed], dense: Sequence[Tensor]
) -> list[Call]:
    """One call for each copy of the weight: int4, the dense copy's product, or a dequantization and
    its product."""
    if kind == "int4pack":
        rows, int4pack = spread(x, 1), torch.ops.aten._weight_int4pack_mm_for_cpu
        return [partial(int4pack, rows, w.words, w.group, w.scales) for w in weights]
    if dense:
        return [partial(cpu.dense_product, x, W) for W in dense]

    def dequantized(packed: Packed) -> Tensor:
        return cpu.dense_product(x, cpu.dequantize(packed))

    return [partial(dequantized, packed) for packed in weights]
