"""The figures of a comparison: what each method costs in quality, and where in the model the error
arises."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlab.files.figures import literal, save_figure


def draw(record: Mapping[str, Any], out: Path) -> None:
    """Write methods.png and layers.png into `out`."""
    save_figure(_methods(record), out / "methods.png")
    save_figure(_layers(record), out / "layers.png")


def draw_matmuls(record: Mapping[str, Any], path: Path) -> None:
    """Write a figure of a comparison of products to `path`: time over tokens for every shape, one
    line a contender."""
    from matplotlib.figure import Figure

    shapes, rows = record["shapes"], record["rows"]
    figure = Figure(figsize=(5 * len(shapes), 4.5), layout="constrained")
    title = (
        f"{record['device']['name']}: {record['dtype']} x int4, groups of {record['group']}, cold "
        "cache"
    )
    figure.suptitle(literal(title), fontsize="medium")
    names = list(dict.fromkeys(row["contender"] for row in rows))
    for axes, (n, k) in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes):
        rows_of_shape = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        for i, name in enumerate(names):
            rows_of_contender = [row for row in rows_of_shape if row["contender"] == name]
            if rows_of_contender:
                style = {"marker": ".", "color": f"C{i}", "label": literal(name)}
                times = [row["us"] for row in rows_of_contender]
                axes.plot([row["m"] for row in rows_of_contender], times, **style)
        first = [row for row in rows_of_shape if row["contender"] == names[0]]
        if first:
            style = {"color": "black", "linestyle": ":", "label": f"floor of {names[0]}"}
            axes.plot([row["m"] for row in first], [row["floor_us"] for row in first], **style)
        axes.set(title=f"{n}x{k}", xlabel="tokens", ylabel="microseconds", yscale="log")
        axes.set_xscale("log", base=2)
        axes.legend(fontsize="small")
    save_figure(figure, path)


def _figure(title: str) -> tuple[Any, Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(literal(title), fontsize="medium")
    return figure, left, right


def _label(method: str) -> str:
    """A method's name as it is drawn, without the way to its file."""
    return literal(method.rpartition("/")[2])


def _title(record: Mapping[str, Any]) -> str:
    reference, rows = record["reference"], record["rows"]
    return (
        f"{Path(record['model']).name}, {rows[0]['spec']}, {record['inputs']} inputs, "
        f"{reference['predictions']:,} predictions, reference perplexity "
        f"{reference['perplexity']:.2f}"
    )


def _methods(record: Mapping[str, Any]) -> Any:
    """Change of perplexity and KL divergence of every method, with their intervals."""
    figure, left, right = _figure(_title(record))
    rows = record["rows"]
    change = [100 * (row["ratio"] - 1) for row in rows]
    change_ci = [[100 * (end - 1) for end in row["ratio_ci"]] for row in rows]
    _bars(left, rows, change, change_ci, "perplexity, change in % (95 %, paired)", "{:+.1f} %")
    _bars(
        right,
        rows,
        [row["kl"] for row in rows],
        [row["kl_ci"] for row in rows],
        "KL divergence in nats (95 %)",
        "{:.4f}",
    )
    return figure


def _bars(
    axes: Any, rows: Any, values: list[float], intervals: list, title: str, form: str
) -> None:
    below = [max(value - low, 0.0) for value, (low, _) in zip(values, intervals)]
    above = [max(high - value, 0.0) for value, (_, high) in zip(values, intervals)]
    drawn = axes.barh(
        [_label(row["method"]) for row in rows],
        values,
        xerr=[below, above],
        capsize=4,
        color="tab:blue",
        alpha=0.7,
    )
    axes.bar_label(drawn, [form.format(value) for value in values], padding=4)
    axes.invert_yaxis()  # in the order of the table
    axes.margins(x=0.25)  # room for the labels
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title(title, fontsize="medium")


def _in_running_order(site: str) -> list[str | int]:
    """A key that sorts layers.2 before layers.10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", site)]


def _layers(record: Mapping[str, Any]) -> Any:
    """Error of the hidden states after every block, and the calibration loss of every site where a
    method has one."""
    figure, left, right = _figure(_title(record))
    for i, row in enumerate(record["rows"]):
        # one style on both sides
        style: dict[str, Any] = {"label": _label(row["method"]), "color": f"C{i}"}
        blocks, losses = len(row["layer_error"]), row["losses"]
        left.plot(range(blocks), row["layer_error"], marker=".", **style)
        if losses:
            places = [blocks * n / len(losses) for n in range(len(losses))]
            in_order = [losses[site] for site in sorted(losses, key=_in_running_order)]
            right.plot(places, in_order, ".", markersize=3, **style)
    for axes, title in (
        (left, "relative error of hidden states"),
        (right, "relative calibration loss per site"),
    ):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("block")
        if axes.lines:
            axes.set_yscale("log")
            axes.legend()
        else:
            axes.text(
                0.5,
                0.5,
                "no method here observes its inputs",
                ha="center",
                transform=axes.transAxes,
            )
    return figure
