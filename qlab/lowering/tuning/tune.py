"""Tuning on this machine: which configuration of an int4 product is fastest for given shapes and
numbers of tokens.

The measuring half of `qlab_kernels.tune`: random weights of the shape, rotated so that none stays
in a cache, timed by `timing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.errors import QlabError
from qlab.lowering.model import device_named
from qlab.lowering.tuning.timing import copies, copy_rate, device_label, matmul_rate, microseconds
from qlab.lowering.weights import cuda
from qlab.lowering.weights.nibbles import Planes, planes_of, refusal, spread

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"bf16": "bfloat16", "fp16": "float16"}
Shape = tuple[int, int]  # n, k


@dataclass(frozen=True, order=True)
class Form:
    """What weights of several shapes share. group: codes per scale; experts: how many of the shape
    one grouped product multiplies by, or 0 for a linear."""

    group: int = 128
    zeros: bool = False
    experts: int = 0


@dataclass(frozen=True)
class Random:
    """A random weight [n, k]. codes: int8 -8..7; scales: fp32 [n, k / group]; zeros: fp32 of that
    shape, whole numbers, or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int

    def dense(self, dtype: torch.dtype) -> Tensor:
        """(codes - zeros) * scales [n, k]."""
        grouped = self.codes.view(*self.scales.shape, self.group).float()
        if self.zeros is not None:
            grouped = grouped - self.zeros[..., None]
        return (grouped * self.scales[..., None]).view(self.codes.shape).to(dtype)

    def planes(self, device: torch.device) -> Planes:
        """As the device's kernels hold it."""
        leaf = QTensor(
            self.codes, self.scales, self.zeros, Int(4, Tile(1, self.group), self.zeros is None)
        )
        return planes_of("the weight", leaf, whole_rows=device.type == "cuda")


def random_weight(
    n: int, k: int, group: int, zeros: bool, device: torch.device, seed: int = 0
) -> Random:
    """The weight that belongs to a seed; its entries are of the size that a trained layer's are."""
    g = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8, device=device)
    scales = (
        torch.rand(n, k // group, generator=g, dtype=torch.float32, device=device) * 0.02 / k**0.5
        + 0.01 / k**0.5
    )
    offsets = (
        torch.randint(-8, 8, scales.shape, generator=g, device=device).float() if zeros else None
    )
    return Random(codes, scales, offsets, group)


def check(shapes: Sequence[Shape], tokens: Sequence[int], dtype: str, group: int) -> None:
    """Refuse what no int4 product is defined for."""
    if dtype not in DTYPES:
        raise QlabError(f"--dtype {dtype!r} is unknown; it is {' or '.join(DTYPES)}")
    if wrong := [m for m in tokens if m < 1]:
        raise QlabError(f"--m {wrong[0]} is no number of tokens; give 1 or more")
    for n, k in shapes:
        if n < 1 or k < 1 or group < 1 or k % group:
            raise QlabError(
                f"groups of {group} do not divide a weight of {n}x{k}; choose another --group or "
                "shape"
            )
        if reason := refusal(Int(4, Tile(1, group)), torch.Size((n, k))):
            raise QlabError(f"--group {group}: {reason}")


def tune_shapes(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    form: Form = Form(),
    *,
    dtype: str = "bfloat16",
    device: torch.device | str = "cpu",
    budget: float = 10.0,
    retune: bool = False,
    said: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Time the configurations for every shape and number of tokens and keep the fastest in the
    user's config cache.

    tokens: where there are experts, the rows of all of them: a token is one for each expert that it
    is sent to.
    budget: seconds for each. What was measured before with the same kernels is not measured again
    unless `retune`. Returns one row each: op, experts, n, k, m, config, us, gbps, trials, source
    and how many timings were taken now.
    """
    from qlab_kernels.cache import require_writable
    from qlab_kernels.capability import KernelError

    check(shapes, tokens, dtype, form.group)
    where = device_named(device)
    try:
        if form.experts and one_by_one(where):
            raise QlabError(
                f"{where} multiplies experts one by one, as linears: tune their shapes without a "
                "number of experts"
            )
        require_writable()
        tuner = _tune_cuda if where.type == "cuda" else _tune_cpu
        return tuner(shapes, tokens, form, dtype, where, budget, retune, said)
    except KernelError as error:
        raise QlabError(str(error)) from error


def _tune_cuda(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    form: Form,
    dtype: str,
    device: torch.device,
    budget: float,
    retune: bool,
    said: Callable[[str], object],
) -> list[dict[str, Any]]:
    from qlab_kernels.config import Config, Problem
    from qlab_kernels.cost import floor, true_bytes

    cc = torch.cuda.get_device_capability(device)
    rates = copy_rate(device), matmul_rate(device, DTYPES[dtype])
    op = "int4_grouped_mm" if form.experts else "int4_mm"
    rows = []
    for n, k in shapes:
        packed = _packed(n, k, form, DTYPES[dtype], device)
        held = packed[0].group, form.zeros, n, k
        for problem in _once(
            Problem(op, cc, device_label(device), dtype, *held, m, form.experts or 1)
            for m in tokens
        ):
            x = torch.randn(problem.bucket, k, device=device, dtype=DTYPES[dtype])

            def measure(config: Config, reps: int, x: Tensor = x, packed: list = packed) -> float:
                return microseconds(
                    [_gpu_call(x, p, config, form.experts) for p in packed], reps, device
                )

            rows.append(
                _tune(
                    problem,
                    measure,
                    budget,
                    floor(problem, true_bytes(problem), *rates),
                    retune,
                    said,
                )
            )
    return rows


def _packed(n: int, k: int, form: Form, dtype: torch.dtype, device: torch.device) -> list[Any]:
    """As many weights as make every call read its own from memory; one of experts, all of the same
    numbers: a buffer larger than the cache is cleared before each call, and they do not fit beside
    each other."""
    from qlab_kernels.capability import admit
    from qlab_kernels.layout import pack

    layout = admit(torch.cuda.get_device_capability(device), dtype).layout
    made = []
    for seed in range(1 if form.experts else copies(n * k / 2, device)):
        planes = random_weight(n, k, form.group, form.zeros, device, seed).planes(device)
        packed = pack(planes.q, planes.scales, planes.zeros, planes.group, layout, dtype)
        if form.experts:
            words, scales = (
                torch.stack([part] * form.experts) for part in (packed.words, packed.scales)
            )
            zeros = None if packed.zeros is None else torch.stack([packed.zeros] * form.experts)
            packed = replace(packed, words=words, scales=scales, zeros=zeros)
        made.append(packed)
    return made


def _gpu_call(x: Tensor, packed: Any, config: Any, experts: int) -> Callable[[], Tensor]:
    """One product; rows are sent to experts at random, each as likely, as the cost model
    supposes."""
    from qlab_kernels.grouped import int4_grouped_mm
    from qlab_kernels.int4_mm import int4_mm

    if not experts:
        return partial(int4_mm, x, packed, config)
    sent = torch.randint(experts, (len(x),), generator=torch.Generator().manual_seed(0))
    ends = sent.bincount(minlength=experts).cumsum(0).to(x.device, torch.int32)
    return partial(int4_grouped_mm, x, packed, ends, config)


def _tune_cpu(
    shapes: Sequence[Shape],
    tokens: Sequence[int],
    form: Form,
    dtype: str,
    device: torch.device,
    budget: float,
    retune: bool,
    said: Callable[[str], object],
) -> list[dict[str, Any]]:
    """Both questions of a CPU: int4 against dequantizing for the call, and int4 beside a dense
    copy."""
    from qlab.lowering.weights import cpu
    from qlab_kernels.config import Config

    if dtype != "bfloat16":
        raise QlabError(
            f"on a CPU int4 products of {dtype} activations are always dense, so there is nothing "
            "to tune; use bfloat16"
        )
    rows = []
    for n, k in shapes:
        made = [
            random_weight(n, k, form.group, form.zeros, device, seed)
            for seed in range(copies(n * k / 2, device))
        ]
        packed, cut = (
            [cpu.pack(w.planes(device), torch.bfloat16) for w in made],
            made[0].planes(device).group,
        )
        rows_padded, bytes_k = packed[0][0].shape  # the key holds the sizes that the kernel sees
        for copy in (False, True):
            dense = (
                [w.dense(torch.bfloat16) for w in made[: copies(2 * n * k, device)]] if copy else []
            )
            for problem in _once(
                cpu.problem(m, torch.bfloat16, copy, rows_padded, 2 * bytes_k, cut, form.zeros)
                for m in tokens
            ):
                x = torch.randn(problem.bucket, k, dtype=torch.bfloat16)

                def measure(
                    config: Config,
                    reps: int,
                    x: Tensor = x,
                    packed: list = packed,
                    dense: list = dense,
                    cut: int = cut,
                ) -> float:
                    calls = _cpu_calls(config.kind, x, packed, dense, cut)
                    return microseconds(
                        calls, reps, device, budget / 4
                    )  # a long product is not repeated fifty times

                rows.append(
                    {**_tune(problem, measure, budget, 0.0, retune, said), "dense_copy": copy}
                )
    return rows


def _cpu_calls(
    kind: str, x: Tensor, packed: list, dense: list[Tensor], group: int
) -> list[Callable[[], Tensor]]:
    """One call for each copy of the weight: int4, the dense copy's product, or a dequantization and
    its product."""
    from qlab.lowering.weights import cpu

    if kind == "int4pack":
        rows = spread(x, 1)
        return [
            partial(torch.ops.aten._weight_int4pack_mm_for_cpu, rows, words, group, scales)
            for words, scales, _ in packed
        ]
    if dense:
        return [partial(cpu.dense_product, x, W) for W in dense]

    def dequantized(words: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return cpu.dense_product(
            x,
            cpu.dequantize(
                words, scales, zeros, scales.shape[1], x.shape[1], group, 1, cpu.layout()
            ),
        )

    return [partial(dequantized, *p) for p in packed]


def _once(problems: Any) -> list[Any]:
    """One problem for each bucket of tokens."""
    return list({(p.op, p.bucket): p for p in problems}.values())


def _tune(
    problem: Any,
    measure: Any,
    budget: float,
    floor_us: float,
    retune: bool,
    said: Callable[[str], object],
) -> dict[str, Any]:
    from qlab_kernels.tune import Timing, tune

    timed: list[Timing] = []
    entry = tune(problem, measure, budget, floor_us=floor_us, retune=retune, said=timed.append)
    failed = (
        f", {sum(bool(t.failure) for t in timed)} failed" if any(t.failure for t in timed) else ""
    )
    shape = f"{problem.experts}x" * (problem.op == "int4_grouped_mm") + f"{problem.n}x{problem.k}"
    said(
        f"{shape}, {problem.bucket} tokens: {entry.config.kind} in {entry.us:.1f} us "
        f"({f'{len(timed)} timings{failed}' if timed else 'measured before'})"
    )
    return {
        "op": problem.op,
        "experts": problem.experts,
        "n": problem.n,
        "k": problem.k,
        "m": problem.bucket,
        **entry.json(),
        "timings": len(timed),
    }


def weights_of(directory: str | Path, device: torch.device | str) -> dict[Form, list[Shape]]:
    """The distinct (n, k) of a directory's quantized weights, by their form, as the device's
    kernels hold them.

    A channel's scale may be cut into groups, and 5 to 8 bits are two planes beside each other: see
    qlab.lower.nibbles. Weights that no kernel takes are left out; a directory of nothing else is
    refused.
    """
    from qlab.files.record import read_report

    found: dict[Form, set[Shape]] = {}
    where = device_named(device)
    sites = read_report(Path(directory))["sites"].values()
    distinct = {(row["spec"], torch.Size(row["shape"])) for row in sites if row["spec"]}
    refused = {
        (text, shape): reason
        for text, shape in distinct
        if (reason := refusal(parse_spec(text), shape))
    }
    for text, (*experts, n, k) in distinct - refused.keys():
        spec, shape = parse_spec(text), torch.Size((n, k))
        scales = torch.zeros(spec.tile.scales_shape(shape), dtype=torch.float32)
        blank = QTensor(
            torch.zeros(shape, dtype=spec.code_dtype),
            scales,
            None if spec.symmetric else scales.to(torch.int8),
            spec,
        )
        planes = planes_of(f"{directory}, {text}", blank, whole_rows=where.type == "cuda")
        form = Form(
            planes.group,
            planes.zeros is not None,
            experts[0] if experts and not one_by_one(where) else 0,
        )
        found.setdefault(form, set()).add((planes.q.shape[0], planes.q.shape[1]))
    if not found:
        reason = next(iter(refused.values()), "nothing in it is quantized")
        raise QlabError(f"{directory} has no weight for a kernel to be tuned for: {reason}")
    return {form: sorted(shapes) for form, shapes in sorted(found.items())}


def one_by_one(device: torch.device) -> bool:
    """Whether experts are multiplied as linears, one after the other: on a CPU, and on GPUs without
    the fused kernel."""
    return device.type == "cpu" or cuda.reads_dense(device, experts=True)


def parse_shapes(text: str) -> list[Shape]:
    """'8192x8192,4096x14336' -> [(8192, 8192), (4096, 14336)]: rows n (output channels) x columns k
    (input channels), each once."""
    try:
        return list(
            dict.fromkeys(
                (int(n), int(k)) for n, k in (part.lower().split("x") for part in text.split(","))
            )
        )
    except ValueError:
        raise QlabError(
            f"--shapes {text!r} is no list of NxK, for example 8192x8192,4096x14336"
        ) from None


def parse_tokens(text: str) -> list[int]:
    """'1,2,16' -> [1, 2, 16], each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise QlabError(f"--m {text!r} is no list of token counts, for example 1,16,256") from None
