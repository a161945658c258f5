"""Codes to int32 words and back, on one core: qlab beside the packers of compressed-tensors and
GPTQModel.

    MB/s     bytes of the dense bfloat16 weight (two a code) over the time of a call
    ratio    a contender's time over qlab's: above 1, qlab is faster

Every packer starts from the int8 codes of one weight [o, k] in memory and ends in the words of its
own format; then the way back is timed. GPTQModel packs while it rounds: `gptqmodel` is what it
calls to save a weight, `gptqmodel codes` its packing of codes alone.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from qlab.algebra.bits import pack_signed, unpack_signed
from qlab.errors import QlabError
from qlab.files.record import versions
from qlab.lowering.devices import device_label
from qlab.lowering.tuning.timing import COPIES, microseconds

BITS = (2, 3, 4, 8)
GROUP = 128
OURS, TRANSPOSED = "qlab", "qlab gptq"
# what is packed, made of the codes; to words; and the way back
Calls = tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], Callable[[Tensor], Any]]


def qlab_rows(bits: int, shape: torch.Size) -> Calls:
    """The dense stream of every row: compressed-tensors' layout."""
    return (
        (lambda codes: codes),
        lambda codes: pack_signed(codes, bits),
        lambda words: unpack_signed(words, bits, shape[1]),
    )


def qlab_columns(bits: int, shape: torch.Size) -> Calls:
    """The same words transposed: GPTQ's layout."""
    to_words = lambda codes: pack_signed(codes, bits).mT.contiguous()
    return (lambda codes: codes), to_words, lambda words: unpack_signed(words.mT, bits, shape[1])


def compressed_tensors(bits: int, shape: torch.Size) -> Calls:
    """The library's own two functions."""
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    return (
        (lambda codes: codes),
        lambda codes: pack_to_int32(codes, bits),
        lambda words: unpack_from_int32(words, bits, shape),
    )


def gptqmodel(bits: int, shape: torch.Size) -> Calls:
    """`pack_block` of its linear, from a dense weight with its scales and zero points, and
    `unpack_rows`."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model_dequant import unpack_rows

    o, k = shape
    middle = 2 ** (bits - 1)
    linear = TorchLinear(
        bits=bits, group_size=GROUP, sym=True, desc_act=False, in_features=k, out_features=o
    )
    scales = torch.ones(o, k // GROUP, dtype=torch.float32)
    zeros = torch.full((o, k // GROUP), middle, dtype=torch.long)
    g_idx = torch.arange(k, dtype=torch.int32) // GROUP

    def prepare(codes: Tensor) -> torch.nn.Linear:
        dense = torch.nn.Linear(k, o, bias=False, dtype=torch.float32, device="meta")
        dense.weight = torch.nn.Parameter(codes.float(), requires_grad=False)
        return dense

    def to_words(dense: Any) -> Tensor:
        linear.pack_block(dense, scales, zeros, g_idx)
        return linear.qweight

    return prepare, to_words, lambda words: unpack_rows(words, bits)


def gptqmodel_codes(bits: int, shape: torch.Size) -> Calls:
    """`pack_cols` and `unpack_cols`: codes along rows, without rounding."""
    from gptqmodel.utils.model_dequant import pack_cols, unpack_cols

    prepare = lambda codes: codes.to(torch.int32) + 2 ** (bits - 1)
    return (
        prepare,
        lambda codes: pack_cols(codes, bits, pack_dtype=torch.int32),
        lambda words: unpack_cols(words, bits),
    )


CONTENDERS: Mapping[str, Callable[[int, torch.Size], Calls]] = {
    OURS: qlab_rows,
    TRANSPOSED: qlab_columns,
    "compressed-tensors": compressed_tensors,
    "gptqmodel": gptqmodel,
    "gptqmodel codes": gptqmodel_codes,
}
PACKAGES = {
    "compressed-tensors": "compressed_tensors",
    "gptqmodel": "gptqmodel",
    "gptqmodel codes": "gptqmodel",
}


def compare_packers(
    n: int,
    k: int,
    bits: Sequence[int] = BITS,
    reps: int = 10,
    seconds: float = 5.0,
    said: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Time every contender that is installed on weights of n rows and k columns; the record says
    who is absent.

    n is a multiple of 32 and k of 128, as every contender needs. Uses one thread and puts the
    number of threads back.
    """
    if n % 32 or k % GROUP:
        raise QlabError(
            f"a weight of {n} x {k} is none that every packer takes; give multiples of 32 and "
            f"{GROUP}"
        )
    absent = [
        name for name, package in PACKAGES.items() if importlib.util.find_spec(package) is None
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows: list[dict[str, Any]] = []
        for width in bits:
            for name in [name for name in CONTENDERS if name not in absent]:
                rows += _measure(name, width, n, k, reps, seconds, said)
        label = device_label(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    return {
        "n": n,
        "k": k,
        "device": label,
        "rows": rows,
        "absent": absent,
        "versions": versions()
        | {
            name: version(name)
            for name in ("compressed-tensors", "gptqmodel")
            if name not in absent
        },
        "measured": {"statistic": "median", "repetitions": reps, "cache": "cold: copies in turn"},
    }


def _measure(
    name: str, bits: int, n: int, k: int, reps: int, seconds: float, said: Callable[[str], object]
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = [
        torch.randint(low, high, (n, k), generator=generator, dtype=torch.int8)
        for _ in range(COPIES)
    ]
    prepare, to_words, to_codes = CONTENDERS[name](bits, codes[0].shape)
    prepared = [prepare(c) for c in codes]
    calls = {
        "pack": [partial(to_words, c) for c in prepared],
        "unpack": [partial(to_codes, to_words(c)) for c in prepared],
    }
    rows = []
    for way, some in calls.items():
        us = microseconds(some, reps, torch.device("cpu"), seconds)
        rows.append({"contender": name, "bits": bits, "way": way, "us": us, "mbps": 2 * n * k / us})
        said(f"{bits} bits, {way}, {name}: {rows[-1]['mbps']:.0f} MB/s")
    return rows


def table(record: Mapping[str, Any]) -> Table:
    """One line for each number of bits and way: MB/s of everybody, and how many times qlab's rate
    that is."""
    names = [name for name in CONTENDERS if name not in record["absent"]]
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title=f"{record['device']}: codes [{record['n']}, {record['k']}] to int32 words and back",
    )
    for name in ("bits", "way", *names):
        drawn.add_column(name, justify="right")
    rates = {(row["bits"], row["way"], row["contender"]): row["mbps"] for row in record["rows"]}
    for bits, way in dict.fromkeys((row["bits"], row["way"]) for row in record["rows"]):
        own_rate = rates[bits, way, OURS]
        cells = []
        for name in names:
            mbps = rates[bits, way, name]
            ratio = "" if name == OURS else f" ({own_rate / mbps:.1f}x)"
            cells.append(f"{mbps:.0f}{ratio}")
        drawn.add_row(str(bits), way, *cells)
    missing = f"; not installed: {', '.join(record['absent'])}" if record["absent"] else ""
    drawn.caption = (
        f"MB/s of dense bfloat16 weight on one core; (x): qlab's rate over a contender's{missing}"
    )
    return drawn
