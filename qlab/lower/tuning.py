"""Tuning on this machine: which configuration of an int4 product is fastest for given shapes and numbers of tokens.

The measuring half of `qlab_kernels.tune`: random weights of the shape, rotated so that none stays in a cache, timed by `timing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlab.errors import QlabError
from qlab.lower.model import device_named
from qlab.lower.nibbles import Planes, planes_of, refusal, spread
from qlab.lower.timing import copies, copy_rate, device_label, matmul_rate, microseconds
from qlab.qtensor import QTensor
from qlab.spec import Int, Tile, parse_spec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
Shape = tuple[int, int]  # n, k


@dataclass(frozen=True)
class Random:
    """A random weight [n, k]. codes: int8 -8..7; scales: fp32 [n, k / group]; zeros: fp32 of that shape, whole numbers, or None."""

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
        leaf = QTensor(self.codes, self.scales, self.zeros, Int(4, Tile(1, self.group), self.zeros is None))
        return planes_of("the weight", leaf, whole_rows=device.type == "cuda")


def random_weight(n: int, k: int, group: int, zeros: bool, device: torch.device, seed: int = 0) -> Random:
    """The weight that belongs to a seed; its entries are of the size that a trained layer's are."""
    g = torch.Generator(device).manual_seed(seed)
    codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8, device=device)
    scales = torch.rand(n, k // group, generator=g, device=device) * 0.02 / k**0.5 + 0.01 / k**0.5
    offsets = torch.randint(-8, 8, scales.shape, generator=g, device=device).float() if zeros else None
    return Random(codes, scales, offsets, group)


def check(shapes: Sequence[Shape], tokens: Sequence[int], dtype: str, group: int) -> None:
    """Refuse what no int4 product is defined for."""
    if dtype not in DTYPES:
        raise QlabError(f"--dtype {dtype!r} is unknown; it is {' or '.join(DTYPES)}")
    if wrong := [m for m in tokens if m < 1]:
        raise QlabError(f"--m {wrong[0]} is no number of tokens; give 1 or more")
    for n, k in shapes:
        if n < 1 or k < 1 or group < 1 or k % group:
            raise QlabError(f"groups of {group} do not divide a weight of {n}x{k}; choose another --group or shape")
        if reason := refusal(Int(4, Tile(1, group)), torch.Size((n, k))):
            raise QlabError(f"--group {group}: {reason}")


def tune_shapes(
    shapes: Sequence[Shape], tokens: Sequence[int], *, dtype: str = "bfloat16", group: int = 128, zeros: bool = False,
    device: torch.device | str = "cpu", budget: float = 10.0, retune: bool = False, said: Callable[[str], object] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time the configurations for every shape and number of tokens and keep the fastest in the user's config cache.

    budget: seconds for each. What was measured before with the same kernels is not measured again unless `retune`.
    Returns one row each: n, k, m, config, us, gbps, trials, source and how many timings were taken now.
    """
    from qlab_kernels.cache import require_writable
    from qlab_kernels.capability import KernelError

    check(shapes, tokens, dtype, group)
    where = device_named(device)
    try:
        require_writable()
        tuner = _tune_cuda if where.type == "cuda" else _tune_cpu
        return tuner(shapes, tokens, dtype, group, zeros, where, budget, retune, said)
    except KernelError as error:
        raise QlabError(str(error)) from error


def _tune_cuda(
    shapes: Sequence[Shape], tokens: Sequence[int], dtype: str, group: int, zeros: bool, device: torch.device, budget: float,
    retune: bool, said: Callable[[str], object],
) -> list[dict[str, Any]]:  # fmt: skip
    from qlab_kernels.capability import admit
    from qlab_kernels.config import Config, Problem
    from qlab_kernels.cost import floor, true_bytes
    from qlab_kernels.int4_mm import int4_mm
    from qlab_kernels.layout import pack

    cc = torch.cuda.get_device_capability(device)
    layout = admit(cc, DTYPES[dtype]).layout
    rates = copy_rate(device), matmul_rate(device, DTYPES[dtype])
    rows = []
    for n, k in shapes:
        weights = [random_weight(n, k, group, zeros, device, seed) for seed in range(copies(n * k / 2, device))]
        planes = [w.planes(device) for w in weights]
        packed = [pack(p.q, p.scales, p.zeros, p.group, layout, DTYPES[dtype]) for p in planes]
        held = planes[0].group, zeros, n, k
        del weights, planes
        for problem in _once(Problem("int4_mm", cc, device_label(device), dtype, *held, m) for m in tokens):
            x = torch.randn(problem.bucket, k, device=device, dtype=DTYPES[dtype])

            def measure(config: Config, reps: int, x: Tensor = x, packed: list = packed) -> float:
                return microseconds([partial(int4_mm, x, p, config) for p in packed], reps, device)

            rows.append(_tune(problem, measure, budget, floor(problem, true_bytes(problem), *rates), retune, said))
    return rows


def _tune_cpu(
    shapes: Sequence[Shape], tokens: Sequence[int], dtype: str, group: int, zeros: bool, device: torch.device, budget: float,
    retune: bool, said: Callable[[str], object],
) -> list[dict[str, Any]]:  # fmt: skip
    """Both questions of a CPU: int4 against dequantizing for the call, and int4 beside a dense copy."""
    from qlab.lower import cpu
    from qlab_kernels.config import Config

    if dtype != "bfloat16":
        raise QlabError(f"on a CPU int4 products of {dtype} activations are always dense, so there is nothing to tune; use bfloat16")
    rows = []
    for n, k in shapes:
        made = [random_weight(n, k, group, zeros, device, seed) for seed in range(copies(n * k / 2, device))]
        packed, cut = [cpu.pack(w.planes(device), torch.bfloat16) for w in made], made[0].planes(device).group
        rows_padded, bytes_k = packed[0][0].shape  # the key holds the sizes that the kernel sees
        for copy in (False, True):
            dense = [w.dense(torch.bfloat16) for w in made[: copies(2 * n * k, device)]] if copy else []
            for problem in _once(cpu.problem(m, torch.bfloat16, copy, rows_padded, 2 * bytes_k, cut, zeros) for m in tokens):
                x = torch.randn(problem.bucket, k, dtype=torch.bfloat16)

                def measure(config: Config, reps: int, x: Tensor = x, packed: list = packed, dense: list = dense, cut: int = cut
                            ) -> float:  # fmt: skip
                    calls = _cpu_calls(config.kind, x, packed, dense, cut)
                    return microseconds(calls, reps, device, budget / 4)  # a long product is not repeated fifty times

                rows.append({**_tune(problem, measure, budget, 0.0, retune, said), "dense_copy": copy})
    return rows


def _cpu_calls(kind: str, x: Tensor, packed: list, dense: list[Tensor], group: int) -> list[Callable[[], Tensor]]:
    """One call for each copy of the weight: int4, the dense copy's product, or a dequantization and its product."""
    from qlab.lower import cpu

    if kind == "int4pack":
        rows = spread(x, 1)
        return [partial(torch.ops.aten._weight_int4pack_mm_for_cpu, rows, words, group, scales) for words, scales, _ in packed]
    if dense:
        return [partial(torch.nn.functional.linear, x, W) for W in dense]

    def dequantized(words: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        return x @ cpu.dequantize(words, scales, zeros, scales.shape[1], x.shape[1], group, 1, cpu.layout()).mT

    return [partial(dequantized, *p) for p in packed]


def _once(problems: Any) -> list[Any]:
    """One problem for each bucket of tokens."""
    return list({(p.op, p.bucket): p for p in problems}.values())


def _tune(problem: Any, measure: Any, budget: float, floor_us: float, retune: bool, said: Callable[[str], object]) -> dict[str, Any]:
    from qlab_kernels.tune import Timing, tune

    timed: list[Timing] = []
    entry = tune(problem, measure, budget, floor_us=floor_us, retune=retune, said=timed.append)
    failed = f", {sum(bool(t.failure) for t in timed)} failed" if any(t.failure for t in timed) else ""
    said(f"{problem.n}x{problem.k}, {problem.bucket} tokens: {entry.config.kind} in {entry.us:.1f} us "
         f"({f'{len(timed)} timings{failed}' if timed else 'measured before'})")  # fmt: skip
    return {"n": problem.n, "k": problem.k, "m": problem.bucket, "op": problem.op, **entry.json(), "timings": len(timed)}


def weights_of(directory: str | Path, device: torch.device | str) -> dict[tuple[int, bool], list[Shape]]:
    """(group, has zeros) -> the distinct (n, k) of a directory's quantized linears, as the device's kernels hold them.

    A channel's scale may be cut into groups, and 5 to 8 bits are two planes beside each other: see qlab.lower.nibbles. On a CPU every
    expert is such a weight; a GPU multiplies them in one grouped product, whose configuration is not tuned. Weights that no kernel
    takes are left out; a directory of nothing else is refused.
    """
    from qlab.report import read_report

    found: dict[tuple[int, bool], set[Shape]] = {}
    each = torch.device(device).type == "cpu"
    rows = [row for row in read_report(Path(directory))["sites"].values() if row["spec"] and (each or len(row["shape"]) == 2)]
    distinct = {(row["spec"], torch.Size(row["shape"][-2:])) for row in rows}
    refused = {(text, shape): reason for text, shape in distinct if (reason := refusal(parse_spec(text), shape))}
    for text, shape in distinct - refused.keys():
        spec = parse_spec(text)
        scales = torch.zeros(spec.tile.scales_shape(shape))
        blank = QTensor(torch.zeros(shape, dtype=spec.code_dtype), scales, None if spec.symmetric else scales.to(torch.int8), spec)
        planes = planes_of(f"{directory}, {text}", blank, whole_rows=not each)
        found.setdefault((planes.group, planes.zeros is not None), set()).add((planes.q.shape[0], planes.q.shape[1]))
    if not found:
        reason = next(iter(refused.values()), "the grouped product of experts is not tuned")
        raise QlabError(f"{directory} has no weight for a kernel to be tuned for: {reason}")
    return {form: sorted(shapes) for form, shapes in sorted(found.items())}


def parse_shapes(text: str) -> list[Shape]:
    """'8192x8192,4096x14336' -> [(8192, 8192), (4096, 14336)]: rows n (output channels) x columns k (input channels), each once."""
    try:
        return list(dict.fromkeys((int(n), int(k)) for n, k in (part.lower().split("x") for part in text.split(","))))
    except ValueError:
        raise QlabError(f"--shapes {text!r} is no list of NxK, for example 8192x8192,4096x14336") from None


def parse_tokens(text: str) -> list[int]:
    """'1,2,16' -> [1, 2, 16], each once."""
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise QlabError(f"--m {text!r} is no list of token counts, for example 1,16,256") from None
