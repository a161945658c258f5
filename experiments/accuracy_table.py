"""What is left of a model's scores in tasks behind each way to quantize it?

Usage: python experiments/accuracy_table.py REFERENCE NAME=DIR ... tasks=NAME,NAME [folder=FOLDER]
       [limit=N] [batch=16] [dtype=bfloat16] [out=FILE.json]

Any models, and any tasks of lm-eval or of a folder (accuracy_tasks.py writes one that needs no
hub). Every model answers the same documents, in this process. Prints a row for every score: the
reference's, and of each model its own with its recovery, the answers that were lost and gained, and
`=` where the paired 95 % interval of the difference holds 0. A model that the file holds already,
with the same settings, is not run again.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import qlab

OPTIONS = {"tasks": "", "folder": "", "limit": "", "batch": "16", "dtype": "bfloat16", "out": ""}


def cell(row: dict[str, Any]) -> str:
    """A model's score in words."""
    recovery = "" if row["recovery"] is None else f" {100 * row['recovery']:.1f} %"
    flips = "" if row["lost"] is None else f" (-{row['lost']} +{row['gained']})"
    tie = " =" if row["verdict"] == "indistinguishable" else ""
    return f"{row['value']:.4f}{recovery}{flips}{tie}"


def table(record: dict[str, Any]) -> Table:
    """A row for every score, a column for every model."""
    models = record["models"]
    shown = Table("task", "documents", record["settings"]["reference"], *models)
    for rows in zip(*(model["tasks"] for model in models.values())):
        first, count = rows[0], str(rows[0]["documents"])
        name = f"{first['task']} ({first['metric']})"
        shown.add_row(name, count, f"{first['reference']:.4f}", *map(cell, rows))
    return shown


def main(arguments: list[str]) -> None:
    """Measure what is not stored yet, store it, and print all of it."""
    given = dict(argument.split("=", 1) for argument in arguments[1:])
    models = {name: given[name] for name in given if name not in OPTIONS}
    options = {**OPTIONS, **{name: given[name] for name in given if name in OPTIONS}}
    reference, out = arguments[0], Path(options.pop("out") or "accuracy-table.json")
    settings = {"reference": reference, **options}
    record = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if record.get("settings") != settings:
        record = {"settings": settings, "models": {}}
    asked: dict[str, Any] = {
        "tasks": options["tasks"].split(","),
        "folder": options["folder"] or None,
        "limit": int(options["limit"]) if options["limit"] else None,
        "batch": int(options["batch"]),
        "dtype": getattr(torch, options["dtype"]),
    }
    missing = [name for name in models if name not in record["models"]]
    theirs = qlab.evaluate_tasks(reference, **asked) if missing else None
    for name in missing:
        started = time.process_time()
        scores = qlab.evaluate_tasks(models[name], **asked)
        assert theirs is not None
        differences = scores.against(theirs).json()
        seconds = round(time.process_time() - started, 1)
        record["models"][name] = {**differences, "processor_seconds": seconds}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    Console(width=60 + 36 * len(models)).print(table(record))


main(sys.argv[1:])
