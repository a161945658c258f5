"""The record of a comparison of products as text: sentences and a table."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

from qlab.bench.contenders import DENSE, LIBRARY, OURS
from qlab.bench.matmul import place


def verdict(record: Mapping[str, Any]) -> list[str]:
    """In sentences: where int4 loses to the library's dense matmul, where it loses to another int4,
    who could not take part."""
    ours = [row for row in record["rows"] if "ratio" in row]
    sentences = [
        sentence
        for n, k in record["shapes"]
        for sentence in _against_library(
            n, k, [row for row in ours if (row["n"], row["k"]) == (n, k)], record["dtype"]
        )
    ]
    sentences += [sentence for row in ours for sentence in _against_int4(row)]
    return sentences + [f"{name} {why}" for name, why in record["absent"].items()]


def _against_library(n: int, k: int, rows: list[Mapping[str, Any]], dtype: str) -> list[str]:
    """Where the int4 products of a shape lose to the library's dense one."""
    compared = [row for row in rows if LIBRARY in row["ratio"]]
    lost = [
        f"{1 / row['ratio'][LIBRARY]:.2f} times its time at {row['m']}"
        for row in compared
        if row["ratio"][LIBRARY] < 1
    ]
    library = f"the library's {dtype} matmul"
    if lost:
        return [
            f"{n}x{k}: int4 loses to {library} at {len(lost)} of {len(compared)} numbers of "
            f"tokens: {', '.join(lost)}"
        ]
    return [f"{n}x{k}: int4 is nowhere slower than {library}"] if compared else []


def _against_int4(row: Mapping[str, Any]) -> list[str]:
    """The fastest other int4 product, where it is faster than qlab's."""
    faster = {
        name: ratio for name, ratio in row["ratio"].items() if ratio < 1 and name not in DENSE
    }
    if not faster:
        return []
    best = min(faster, key=faster.__getitem__)
    return [
        f"{row['n']}x{row['k']} at {row['m']}: {best} is faster, qlab takes "
        f"{1 / faster[best]:.2f} times its time"
    ]


def table(record: Mapping[str, Any]) -> Table:
    """One line for each shape and number of tokens: qlab's figures, then every baseline's time and
    its ratio to qlab's."""
    names = dict.fromkeys(row["contender"] for row in record["rows"])
    others = [name for name in names if name != OURS]
    rates, zeros = record["rates"], ", zeros" if record["zeros"] else ""
    drawn = Table(
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title=(
            f"{record['device']['name']}: {record['dtype']} x int4, groups of "
            f"{record['group']}{zeros}; copies {rates['copy_gbps']:.0f} GB/s, multiplies "
            f"{rates['matmul_tflops']:.2f} TFLOP/s"
        ),
    )
    for name in ("n x k", "m", "how", "us", "graph us", "GB/s", "TFLOP/s", "% of floor", *others):
        justify: Any = "left" if name in ("n x k", "how") else "right"
        drawn.add_column(name, justify=justify, overflow="fold")
    by_place = {(row["contender"], *place(row)): row for row in record["rows"]}
    for n, k in record["shapes"]:
        for m in record["tokens"]:
            row = by_place.get((OURS, n, k, m))
            times = [_time(by_place.get((name, n, k, m)), row) for name in others]
            drawn.add_row(f"{n}x{k}", str(m), *_figures(row), *times)
    drawn.caption = (
        "us: median on a cold cache; a baseline's (x) is its time over qlab's: above 1, qlab is "
        "faster"
    )
    return drawn


def _time(rival: Mapping[str, Any] | None, row: Mapping[str, Any] | None) -> str:
    """A baseline's time, and its ratio to qlab's."""
    if rival is None:
        return "-"
    ratio = f" ({rival['us'] / row['us']:.2f}x)" if row else ""
    return f"{rival['us']:.1f}{ratio}"


def _figures(row: Mapping[str, Any] | None) -> list[str]:
    """The cells of qlab's own product."""
    if row is None:
        return ["-"] * 6
    c = row["config"]
    tile = f" {c['bm']}x{c['bn']}x{c['bk']}" if c["bm"] else ""
    split = f"/{c['split']}" if c["split"] > 1 else ""
    how = f"{c['kind']}{tile}{split} ({row['source']}{', stale' if row['stale'] else ''})"
    graph = "-" if row["graph_us"] is None else f"{row['graph_us']:.1f}"
    return [
        how,
        f"{row['us']:.1f}",
        graph,
        f"{row['gbps']:.1f}",
        f"{row['tflops']:.3f}",
        f"{row['percent_of_floor']:.0f}",
    ]
