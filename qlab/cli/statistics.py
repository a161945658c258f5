"""stats list and stats prune: the statistics of models that are kept for other methods."""

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qlab.cli.options import Json, Statistics, resolved, statistics_folder
from qlab.cli.output import console, report
from qlab.errors import QlabError
from qlab.process.shown import size

if TYPE_CHECKING:
    from qlab.files.statistics import Kept, Shelf

OF_ONE = ("block", "wire", "statistic")  # what tells the statistics of one pass apart
DAY = 86400  # seconds

statistics = typer.Typer(
    no_args_is_help=True,
    help="Kept statistics of models, by which another method starts at its solver.",
)


@statistics.command("list")
def stats_list(folder: Statistics = None, json_file: Json = None) -> None:
    """What is kept: a line for each model and its calibration."""
    shelf = _shelf(folder)
    kept, damaged = shelf.listed()
    rows = _rows(kept)
    table = Table("model", "sha256", "calibration", "dtype", "statistics", "blocks", "size", "used")
    for row in rows:
        table.add_row(
            row["model"],
            row["model_sha256"][:12],
            _calibration(row["data"], row["tokens"]),
            f"{row['dtype'].removeprefix('torch.')}, {row['device']}",
            ", ".join(row["statistics"]),
            str(row["blocks"]),
            size(row["bytes"]),
            row["used"],
        )
    console(width=200).print(table)
    total = sum(each.bytes for each in kept)
    console().print(
        f"{len(kept)} statistics, {size(total)}, in {shelf.folder}{_broken(damaged)}",
        soft_wrap=True,
    )
    found = {"folder": str(shelf.folder), "bytes": total, "damaged": [*map(str, damaged)]}
    report({**found, "rows": rows}, json_file)


@statistics.command("prune")
def stats_prune(
    model: Annotated[
        str, typer.Option("--model", help="those of this directory, or of this sha256")
    ] = "",
    older_than: Annotated[
        float | None, typer.Option("--older-than", help="those that nobody used for so many days")
    ] = None,
    to_size: Annotated[
        float | None,
        typer.Option("--to-size", help="the longest unused ones, until so many GiB are left"),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="all of them")] = False,
    folder: Statistics = None,
    json_file: Json = None,
) -> None:
    """Remove kept statistics without asking, and those that are damaged; say what that freed.

    Of several options, what is removed meets all."""
    shelf = _shelf(folder)
    _refuse_unsaid(model, older_than, to_size, everything)
    kept, damaged = shelf.listed()
    chosen = [each for each in kept if not model or _is_of(each, model)]
    if model and not chosen:
        raise QlabError(
            f"{shelf.folder} holds no statistics of {model}; `qlab stats list` shows of which"
        )
    if older_than is not None:
        since = time.time() - older_than * DAY
        chosen = [each for each in chosen if each.used < since]
    if to_size is not None:
        chosen = _beyond(kept, chosen, to_size * 2**30)
    freed = sum(each.bytes for each in chosen) + sum(path.stat().st_size for path in damaged)
    for path in (*(each.path for each in chosen), *damaged):
        path.unlink(missing_ok=True)
    left = sum(each.bytes for each in kept) - sum(each.bytes for each in chosen)
    console().print(
        f"{len(chosen)} statistics removed{_broken(damaged)}; {size(freed)} are free, and "
        f"{size(left)} are left in {shelf.folder}",
        soft_wrap=True,
    )
    counts = {"removed": len(chosen), "damaged": len(damaged)}
    report({**counts, "freed_bytes": freed, "left_bytes": left}, json_file)


# ------------------------------------------------------------------ parts
def _shelf(folder: Path | None) -> "Shelf":
    from qlab.files.statistics import Shelf

    named = statistics_folder(folder)
    if folder is not None and not named.is_dir():
        raise QlabError(
            f"{folder} is no folder; give --statistics one that `qlab quantize` kept statistics in"
        )
    return Shelf(named)


def _rows(kept: "Sequence[Kept]") -> list[dict[str, Any]]:
    """One row for each model, calibration and dtype."""
    groups: dict[str, list[Kept]] = {}
    for each in kept:
        shared = {name: value for name, value in each.of.items() if name not in OF_ONE}
        groups.setdefault(repr(sorted(shared.items())), []).append(each)
    return [_row(group) for group in groups.values()]


def _row(group: "Sequence[Kept]") -> dict[str, Any]:
    first = group[0]
    used = datetime.fromtimestamp(max(each.used for each in group))
    return {
        "model": first.about["model"],
        "model_sha256": first.of["model"],
        "data": first.about["data"],
        "tokens": first.about["tokens"],
        "dtype": first.of["dtype"],
        "device": first.of["device"],
        "calibrate_all_experts": first.of["calibrate_all_experts"],
        "versions": first.of["versions"],
        "statistics": sorted({each.of["statistic"] for each in group}),
        "blocks": len({each.of["block"] for each in group}),
        "files": len(group),
        "bytes": sum(each.bytes for each in group),
        "used": used.isoformat(" ", "minutes"),
    }


def _calibration(data: Any, tokens: int) -> str:
    texts = ", ".join(Path(text).name for text in data.get("texts", ())) or "ids of one's own"
    return f"{tokens:,} tokens of {texts}, seed {data.get('seed')}"


def _broken(damaged: Sequence[Path]) -> str:
    return f", and {len(damaged)} damaged" if damaged else ""


def _refuse_unsaid(
    model: str, older_than: float | None, to_size: float | None, everything: bool
) -> None:
    """Refuse a prune that names nothing, or what no age and no size can be."""
    if everything and (model or older_than is not None or to_size is not None):
        raise QlabError("--all removes everything; leave it out, or the other options")
    if not (everything or model or older_than is not None or to_size is not None):
        raise QlabError(
            "nothing says what to remove; give --model, --older-than, --to-size or --all"
        )
    for name, value in {"--older-than": older_than, "--to-size": to_size}.items():
        if value is not None and not 0 <= value < float("inf"):
            raise QlabError(f"{name} {value} is below zero or no number; give 0 or more")


def _is_of(kept: "Kept", model: str) -> bool:
    """Whether a statistic is of a model: its directory, or the beginning of its sha256."""
    if len(model) >= 8 and kept.of["model"].startswith(model.lower()):
        return True
    return kept.about["model"] == str(resolved(model).resolve())


def _beyond(kept: "Sequence[Kept]", among: "Sequence[Kept]", most: float) -> "list[Kept]":
    """Of some statistics, the longest unused ones whose removal leaves at most so many bytes."""
    left, chosen = sum(each.bytes for each in kept), []
    for each in sorted(among, key=lambda each: each.used):
        if left <= most:
            break
        chosen.append(each)
        left -= each.bytes
    return chosen
