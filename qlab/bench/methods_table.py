"""Methods side by side, as a table for the eye."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from qlab.evaluation.comparison import spread


def table(record: Mapping[str, Any]) -> Table:
    """The record for the eye, the reference first."""
    reference = record["reference"]
    right = ("perplexity", "change in %", "KL", "top-1 in %", "bits", "MB", "seconds", "peak MiB")
    drawn = Table(
        "method",
        "spec",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title=(
            f"{record['model']}: {record['inputs']} inputs, {reference['windows']} held-out "
            f"windows of {reference['length']} tokens ({reference['predictions']:,} predictions)"
        ),
    )
    for name in right:
        drawn.add_column(name, justify="right")
    for row in (reference, *record["rows"]):
        drawn.add_row(*_cells(row, quantized=row is not reference))
    drawn.caption = "95 % intervals over windows; those of the change are paired"
    for row in record["rows"]:
        if len(row.get("seeds", ())) > 1:
            kl = [each["kl"] for each in row["seeds"]]
            drawn.caption += f"\n{row['method']}: KL {spread(kl, row['kl_ci'])}"
    if record["inputs"] == "reference" and len(record["rows"]) > 1:
        drawn.caption += (
            "; seconds and peak memory are those of the one pass that served every method"
        )
    return drawn


def _cells(row: Mapping[str, Any], quantized: bool) -> list[str]:
    """The cells of one model; those that only a quantized one has are `-` for the reference."""
    low, high = (change(ratio) for ratio in row["ratio_ci"])
    compared = {
        "change": f"{change(row['ratio'])} {low}..{high}",
        "kl": f"{row['kl']:.4f}",
        "top1": f"{100 * row['top1_agreement']:.1f}",
        "seconds": f"{row['seconds']:.1f}",
    }
    if not quantized:
        compared = dict.fromkeys(compared, "-")
    return [
        row["method"],
        row["spec"] or "-",
        f"{row['perplexity']:.2f} {_range(row['perplexity_ci'])}",
        compared["change"],
        compared["kl"],
        compared["top1"],
        f"{row['bits_per_weight']:.2f}",
        "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}",
        compared["seconds"],
        f"{row['peak_rss_bytes'] / 2**20:.0f}",
    ]


def _range(interval: Sequence[float]) -> str:
    return f"{interval[0]:.2f}..{interval[1]:.2f}"


def change(ratio: float) -> str:
    """A ratio of perplexities as a change in per cent."""
    return f"{100 * (ratio - 1):+.1f}"
