"""Several runs in one table: what was done, what it cost and what it lost, read back from the
directories that they wrote."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.directories.inspect import Inspection, inspect
from qlab.driver.result import Written
from qlab.errors import QlabError, printable
from qlab.evaluation.figures import Evaluation, Perplexity
from qlab.evaluation.statistics import bootstrap, holds
from qlab.files.atomic import atomically
from qlab.files.directory import read_json

BENCH = "bench.json"
# what an evaluation measures
MEASURED = ("perplexity", "reference_perplexity", "kl", "top1_agreement", "windows", "length")
# "best" is the run of the lowest perplexity, and a "tie" what its paired interval does not tell
# from it; the last column, so that tables of before it are still known
STANDING = "standing"
COST = ("seconds", "peak_rss_bytes")
COLUMNS = (
    "run",
    "method",
    "spec",
    "format",
    "inputs",
    "calibration",
    "bits_per_weight",
    "bytes",
    "weights",
    "largest_weight_error",
    "loss",
    *COST,
    *MEASURED,
    STANDING,
)
WORDS = {
    "bits_per_weight": "bits",
    "bytes": "MB",
    "largest_weight_error": "weight error",
    "peak_rss_bytes": "peak MiB",
    "reference_perplexity": "reference",
    "top1_agreement": "top-1",
}
Run = str | Path | Written


@dataclass(frozen=True, repr=False)
class Results:
    """Several runs as a table.

    rows: one mapping per run, with the keys COLUMNS; None stands for what a run does not say or
    nobody measured.
    """

    rows: Sequence[Mapping[str, Any]]

    @property
    def columns(self) -> list[str]:
        """The names of COLUMNS for which any run has a value."""
        return [name for name in COLUMNS if any(row[name] is not None for row in self.rows)]

    def json(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [dict(row) for row in self.rows]

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as CSV with a header, all columns and full figures, also written to `path` where
        one is given.

        Raises:
            QlabError: The file is there already and is no such table.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        if path is not None:
            if not isinstance(path, str | Path):
                raise QlabError(
                    f"a table goes into a file, and not into a {type(path).__name__}; give its path"
                )
            file = Path(path).expanduser()
            _refuse_other(file)
            atomically(file, lambda scratch: scratch.write_text(text.getvalue(), encoding="utf-8"))
        return text.getvalue()

    def to_dataframe(self) -> Any:
        """A pandas DataFrame of the rows.

        Raises:
            QlabError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise QlabError(
                "pandas is not installed, which a DataFrame needs; `pip install pandas`, or use "
                "to_csv()"
            ) from error
        return pandas.DataFrame(self.json(), columns=list(COLUMNS))

    def _cells(self) -> list[list[str]]:
        columns = self.columns
        return [[_said(name, row[name]) for name in columns] for row in self.rows]

    def __str__(self) -> str:
        lines = [[WORDS.get(name, name) for name in self.columns], *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
            for line in lines
        )

    def __repr__(self) -> str:
        return f"Results({len(self.rows)} runs; columns: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        header = "".join(f"<th>{escape(WORDS.get(name, name))}</th>" for name in self.columns)
        rows = [f"<tr>{header}</tr>"]
        for line in self._cells():
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
            rows.append(f"<tr>{cells}</tr>")
        return f"<table>{''.join(rows)}</table>"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(*(WORDS.get(name, name) for name in self.columns))
        for line in self._cells():
            table.add_row(*line)
        yield table


def results(runs: Sequence[Run | tuple[Run, Evaluation | Perplexity]] | Run) -> Results:
    """A table with one row per run, in the order given.

    Args:
        runs: One run, or several. A run is a directory, whoever wrote it; or what `quantize`,
            `quantize_files` or `convert` returned, which knows the seconds and the bytes that it
            took; or a pair of one of these and what `evaluate` or `perplexity` returned for it. A
            directory of `python -m qlab.bench` has a row for each of its methods.

    Returns:
        What each run did, what it cost and what it lost; None where nobody measured it.

    Raises:
        QlabError: No run was given, or a run is none of these.

    Example:
        >>> import qlab
        >>> table = qlab.results(["demo-int4"])
        >>> table.rows[0]["spec"], table.rows[0]["seconds"]
        ('int4-g64', None)
        >>> qlab.results([]).rows
        Traceback (most recent call last):
        qlab.errors.QlabError: no run was given; name the directories that were written, ...
    """
    if not isinstance(runs, Run | Iterable) or isinstance(runs, bytes):
        raise QlabError(
            f"runs is a {type(runs).__name__}; give directories, or what quantize() returned, in "
            "a list"
        )
    given = [runs] if isinstance(runs, Run) else list(runs)
    if not given:
        raise QlabError(
            "no run was given; name the directories that were written, or pass what quantize() "
            "returned"
        )
    pairs = [pair for run in given for pair in _rows(run)]
    standings = _standings([measured for _, measured in pairs])
    return Results(
        [row | {STANDING: standing} for (row, _), standing in zip(pairs, standings, strict=True)]
    )


def _standings(measured: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Run by run, "best" for that of the lowest perplexity, "tie" for what its paired interval does
    not tell from it; None for all where fewer than two were measured on the same windows."""
    first = next((each for each in measured if each.get("nll_by_window")), {})
    same = [each.get("ids_sha256") == first.get("ids_sha256", "") for each in measured]
    if sum(same) < 2:
        return [None] * len(measured)
    best = min((each for each, is_same in zip(measured, same) if is_same), key=_perplexity)
    return [
        None if not is_same else "best" if each is best else "tie" if _is_tie(each, best) else None
        for each, is_same in zip(measured, same)
    ]


def _perplexity(measured: Mapping[str, Any]) -> float:
    return float(measured["perplexity"])


def _is_tie(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    nll, nll_other = (
        torch.tensor(each["nll_by_window"], dtype=torch.float64) for each in (one, other)
    )
    return holds(bootstrap(nll - nll_other, torch.exp), 1.0)


def _refuse_other(file: Path) -> None:
    """Refuse to replace what is no table of results."""
    header = ",".join(COLUMNS[:-1]).encode()
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise QlabError(f"{file} cannot be written; give a file in a folder that is there")
    if file.exists() and not (file.is_file() and file.read_bytes().startswith(header)):
        raise QlabError(
            f"{file} exists and is no table of results; give another name, or remove it"
        )


def _rows(run: Any) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    """The rows of a run, each with what was measured of it."""
    measured = None
    if isinstance(run, tuple) and len(run) == 2:
        run, measured = run
    if measured is not None and not isinstance(measured, Evaluation | Perplexity):
        raise QlabError(
            f"a run is paired with a {type(measured).__name__}; pair it with what evaluate() or "
            "perplexity() returned"
        )
    if isinstance(run, str | Path):
        folder = Path(run).expanduser()
        if (folder / BENCH).is_file():
            yield from _benched(folder)
            return
    elif isinstance(run, Written):
        folder = run.path
    else:
        raise QlabError(
            f"a run is a directory or what quantize() returned, and not a {type(run).__name__}"
        )
    cost = {name: getattr(run, name, None) for name in COST}
    evaluation = {} if measured is None else measured.json()
    yield _row(inspect(folder), cost | evaluation), evaluation


def _benched(folder: Path) -> Iterator[tuple[dict[str, Any], Mapping[str, Any]]]:
    for row in read_json(folder / BENCH)["rows"]:
        directory = folder / row["method"]
        columns = _row(inspect(directory), row) if directory.is_dir() else _only(row)
        name = {"run": f"{folder.name}/{row['method']}", "method": row["method"]}
        yield columns | name, row


def _row(inspection: Inspection, measured: Mapping[str, Any]) -> dict[str, Any]:
    """What a directory says of itself, and what was measured of it."""
    job = inspection.record.get("job", {})
    sites = list(inspection.record.get("sites", {}).values())
    errors = [site["weight_error"] for site in sites if site.get("weight_error") is not None]
    losses = [site["loss"] for site in sites if site.get("loss") is not None]
    stages = [stage for stage in job.get("recipe") or () if stage["stage"] != "keep"]
    specs = sorted({row["spec"] for row in inspection.sites.values() if row.get("spec")})
    row = {
        "run": inspection.path.name,
        "method": "+".join(stage["stage"] for stage in stages) or None,
        "spec": ", ".join(specs) or None,
        "format": inspection.format,
        "inputs": job.get("inputs"),
        "calibration": _data(job.get("data")),
        "bits_per_weight": inspection.record.get("bits_per_weight"),
        "bytes": sum(inspection.dtypes.values()),
        "weights": sum("stored" in row for row in inspection.sites.values()),
        "largest_weight_error": max(errors, default=None),
        "loss": sum(losses) if losses else None,
    }
    return _only(row | {name: measured.get(name) for name in (*COST, *MEASURED)})


def _only(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the table out of a row, all of them."""
    return {name: row.get(name) for name in COLUMNS}


def _data(described: Mapping[str, Any] | None) -> str | None:
    """Calibration data, as a recorded job describes it, in a few words."""
    if not described:
        return None
    length = f" x {described['length']}" if "length" in described else ""
    return (
        f"{described.get('samples')}{length} of "
        f"{', '.join(described.get('texts') or ('token ids',))}"
    )


def _said(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "bytes":
        return f"{value / 1e6:.1f}"
    if name == "peak_rss_bytes":
        return f"{value / 2**20:.0f}"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))
