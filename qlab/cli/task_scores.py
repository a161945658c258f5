"""eval --tasks: what a model scores in lm-eval's tasks, beside a reference."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from qlab.cli.applying import applied, refuse_without_recipe
from qlab.cli.choices import Choices
from qlab.cli.options import listed
from qlab.cli.output import console, report
from qlab.cli.serving import KEY
from qlab.errors import QlabError
from qlab.process.extras import needed

if TYPE_CHECKING:
    from qlab.evaluation.tasks.scores import TaskDifferences, TaskScores

Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        help="scores in these tasks of lm-eval instead of perplexity, such as arc_easy,piqa",
    ),
]
TasksFrom = Annotated[
    Path | None,
    typer.Option("--tasks-from", help="a folder of tasks (YAML) instead of lm-eval's own"),
]
ServerUrl = Annotated[
    str, typer.Option("--server", help="ask MODEL at this address, of any OpenAI-compatible server")
]
AgainstServer = Annotated[
    str, typer.Option("--against-server", help="ask the reference at this address")
]
ApiKey = Annotated[str, typer.Option("--api-key", help=f"of the servers (default: ${KEY})")]
ServedName = Annotated[
    str,
    typer.Option("--served-model-name", help="of MODEL at --server, where that has several"),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="documents of each task (default: all)")
]
Shots = Annotated[
    int | None, typer.Option("--shots", min=0, help="examples (default: as the task says)")
]
Chat = Annotated[bool, typer.Option("--chat", help="questions in the model's chat template")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="questions at a time")]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", min=3, help="tokens of a question and its answer")
]
TaskDtype = Annotated[
    str, typer.Option("--dtype", help="of the activations: bfloat16, float16 or float32")
]
Plot = Annotated[Path | None, typer.Option("--plot", help="draw what is left of each score (PNG)")]
WIDE = 150  # characters of the table of differences
ONLY_PERPLEXITY = ("text", "windows", "seeds")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What --tasks and the options beside it say."""

    tasks: Tasks = ""
    tasks_from: TasksFrom = None
    server: ServerUrl = ""
    against_server: AgainstServer = ""
    api_key: ApiKey = ""
    served_model_name: ServedName = ""
    limit: Limit = None
    shots: Shots = None
    chat: Chat = False
    batch: Batch = 8
    max_model_len: MaxModelLen = None
    dtype: TaskDtype = "bfloat16"
    plot: Plot = None

    def scores(self, model: Any, device: str, server: str, name: str = "") -> "TaskScores":
        """What one of the models scores."""
        import qlab

        return qlab.evaluate_tasks(
            model,
            listed(self.tasks),
            folder=self.tasks_from,
            server=server or None,
            api_key=self.api_key or os.environ.get(KEY, "").split("\n")[0],
            served_model_name=name,
            limit=self.limit,
            shots=self.shots,
            chat=self.chat,
            batch=self.batch,
            max_length=self.max_model_len,
            device=device,
            dtype=self.dtype,  # type: ignore[arg-type]
        )


def with_tasks(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every field of `Asked`, in place of its parameter `asked`."""
    options = [
        Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(Asked)
    ]
    parameters: list[Parameter] = []
    for parameter in signature(command).parameters.values():
        by_name = parameter.replace(kind=Parameter.KEYWORD_ONLY)
        parameters += options if parameter.name == "asked" else [by_name]

    @wraps(command)
    def with_options(**values: Any) -> None:
        asked = Asked(**{option.name: values.pop(option.name) for option in options})
        command(**values, asked=asked)

    with_options.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return with_options


def refuse_without_tasks(typed: frozenset[str]) -> None:
    """Refuse options that say how tasks are evaluated where there are none."""
    unused = [each.name for each in fields(Asked) if each.name in typed and each.name != "tasks"]
    if unused:
        raise QlabError(
            f"{_option(unused[0])} would not be used, since no task is evaluated; give --tasks, or "
            "leave it out"
        )


def evaluate_by_tasks(
    model: str, method: str, choices: Choices, against: str | None, asked: Asked, json: Path | None
) -> None:
    """Print what a model scores, and what is left in it of a reference's scores."""
    import qlab

    _check(method, choices, against, asked)
    given: Any = applied(model, method, choices) if _has_recipe(method, choices) else model
    if _has_recipe(method, choices):
        against = against or model
    opened = None if against is None else qlab.open(against)
    scores = asked.scores(given, choices.device, asked.server, asked.served_model_name)
    said: dict[str, Any] = {
        "model": model,
        "against": against,
        "tasks_from": _path(asked.tasks_from),
    }
    said |= {"limit": asked.limit, "shots": asked.shots, "dtype": asked.dtype}
    name = f"{model} by {method or choices.recipe}" if _has_recipe(method, choices) else model
    if opened is None or against is None:
        console().print(_table_of_scores(scores, name))
        console().print(
            "no reference was given; --against MODEL adds what is left of its scores",
            soft_wrap=True,
        )
        report({**said, **scores.json()}, json)
        return
    reference = asked.scores(opened, choices.device, asked.against_server)
    differences = scores.against(reference)
    console(WIDE).print(table_of_differences(differences, name, against))
    report({**said, **differences.json()}, json)
    if asked.plot is not None:
        from qlab.evaluation.tasks.plot import draw

        draw(differences, f"{name} against {against}", asked.plot)


def table_of_differences(differences: "TaskDifferences", model: str, against: str) -> Table:
    """A row for every score of every task."""
    columns = ("reference", "model", "difference (95 %, paired)", "lost, gained", "recovery")
    table = Table("task", "n", *columns, title=f"{model} against {against}")
    table.add_column(no_wrap=True)  # the verdict
    for row in differences.rows:
        low, high = row.interval
        table.add_row(
            row.score.name,
            str(len(row.score.documents)),
            f"{row.reference.value:.4f}",
            f"{row.score.value:.4f}",
            f"{row.difference:+.4f} ({low:+.4f} to {high:+.4f})",
            "" if row.lost is None else f"{row.lost}, {row.gained}",
            "" if row.recovery is None else f"{100 * row.recovery:.1f} %",
            row.verdict,
        )
    return table


def _table_of_scores(scores: "TaskScores", model: str) -> Table:
    table = Table("task", "documents", "value", "95 % interval", title=model)
    for score in scores.scores:
        low, high = score.interval
        count, value = str(len(score.documents)), f"{score.value:.4f}"
        table.add_row(score.name, count, value, f"{low:.4f} to {high:.4f}")
    return table


def _check(method: str, choices: Choices, against: str | None, asked: Asked) -> None:
    """Refuse what would not be used, and places that cannot be written, before any work."""
    has_recipe = _has_recipe(method, choices)
    if not has_recipe:
        refuse_without_recipe(choices)
    unused = [name for name in ONLY_PERPLEXITY if name in choices.typed]
    unused += ["length"] if "length" in choices.typed and not has_recipe else []
    if unused:
        raise QlabError(
            f"{_option(unused[0])} is of perplexity, and --tasks evaluates tasks; leave one out"
        )
    if has_recipe and asked.server:
        raise QlabError("--server runs a model as it is; leave out --method or --recipe")
    for option, value in {"--against-server": asked.against_server, "--plot": asked.plot}.items():
        if value and against is None and not has_recipe:
            raise QlabError(f"{option} would not be used without a reference; give --against MODEL")
    if asked.plot is not None:
        from qlab.files.figures import refuse_foreign_figure

        needed("matplotlib", "bench")
        refuse_foreign_figure(asked.plot)


def _has_recipe(method: str, choices: Choices) -> bool:
    return bool(method or choices.recipe)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path)
