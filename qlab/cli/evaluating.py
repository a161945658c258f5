"""eval: how much worse a quantized model is."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from qlab.cli.applying import refuse_without_recipe, seeds_of
from qlab.cli.choices import Choices, typed_in
from qlab.cli.options import (
    Asymmetric,
    Calib,
    Device,
    InputsName,
    Json,
    Length,
    MethodName,
    Model,
    RecipeName,
    Samples,
    Seed,
    Seeds,
    SpecName,
)
from qlab.cli.output import console, report
from qlab.cli.task_scores import Asked, evaluate_by_tasks, refuse_without_tasks, with_tasks
from qlab.errors import QlabError
from qlab.process.progress import say

if TYPE_CHECKING:
    from qlab.data.calibration import Tokens
    from qlab.evaluation.perplexity import Evaluation, Perplexity
    from qlab.files.checkpoint import Checkpoint


@with_tasks
def evaluate(
    context: typer.Context,
    model: Model,
    asked: Asked,
    against: Annotated[
        str | None,
        typer.Option("--against", help="the reference model; without it, perplexity alone"),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="text or jsonl files (default: held-out demo)"),
    ] = None,
    length: Length = 512,
    windows: Annotated[int | None, typer.Option(min=2, help="default: all full windows")] = None,
    device: Device = "cpu",
    method: MethodName = "",
    recipe: RecipeName = None,
    spec: SpecName = "int4-g64",
    asymmetric: Asymmetric = False,
    calib: Calib = None,
    samples: Samples = 32,
    seed: Seed = 0,
    seeds: Seeds = 1,
    inputs: InputsName = "quantized",
    json_file: Json = None,
) -> None:
    """Perplexity over full windows of --length tokens; with a reference also KL divergence and
    top-1 agreement. With --method or --recipe it is what that makes of the model, which is the
    reference then; nothing is written. With --tasks it is the scores in tasks of lm-eval, each
    beside the reference's, document by document."""
    import qlab

    choices = Choices(
        recipe=recipe,
        spec=spec,
        asymmetric=asymmetric,
        calib=calib,
        samples=samples,
        length=length,
        seed=seed,
        inputs=inputs,
        device=device,
        typed=typed_in(context),
    )
    if asked.tasks:
        evaluate_by_tasks(model, method, choices, against, asked, json_file)
        return
    refuse_without_tasks(choices.typed)
    if method or recipe:
        _evaluate_recipe(
            model, method, choices, seeds, against or model, (text, windows), json_file
        )
        return
    refuse_without_recipe(choices)
    opened = qlab.open(model)
    reference = None if against is None else qlab.open(against)
    data = _held_out(reference or opened, text, length, windows)
    result: Perplexity | Evaluation
    if reference is None:
        result = qlab.perplexity(opened, data, device)
        console().print(_table_of_perplexity(result, model))
        console().print(
            "no reference was given; --against MODEL adds the KL divergence and the agreement "
            "with it",
            soft_wrap=True,
        )
    else:
        result = qlab.evaluate(opened, reference, data, device)
        console().print(_table_of_evaluation(result, model, str(against)))
        for line in _details_of_evaluation(result):
            console().print(line, soft_wrap=True, highlight=False)
    report(
        {"model": model, "against": against, "data": data.describe(), **result.json()}, json_file
    )


def _evaluate_recipe(
    model: str,
    method: str,
    choices: Choices,
    seeds: int,
    against: str,
    held_out: tuple[list[Path] | None, int | None],
    json_file: Path | None,
) -> None:
    """Print what a recipe loses. held_out: the files to evaluate on, and how many windows."""
    import qlab

    text, windows = held_out
    data = _held_out(qlab.open(against), text, choices.length, windows)
    result = seeds_of(model, method, choices, seeds, against, data)
    first, name = result.evaluations[choices.seed], method or str(choices.recipe)
    console().print(_table_of_evaluation(first, f"{model} by {name}", against))
    for line in _details_of_evaluation(first):
        console().print(line, soft_wrap=True, highlight=False)
    if seeds > 1:
        console().print(str(result), soft_wrap=True, highlight=False)
    said = {"model": model, "method": name, "spec": choices.spec, "against": against}
    report({**said, "data": data.describe(), **first.json(), "seeds": result.json()}, json_file)


def _held_out(
    model: "Checkpoint", text: list[Path] | None, length: int, windows: int | None
) -> "Tokens":
    """The windows that are evaluated, in the words of this model's tokenizer."""
    import qlab
    from qlab.demo.hub import evaluation_texts, is_demo

    if not text and not is_demo(model):
        say(
            "evaluating on the demo's held-out text, articles of English Wikipedia; --text takes "
            "your own"
        )
    data = qlab.first_windows(model, evaluation_texts(text), length, windows)
    if len(data.ids) < 2:
        raise QlabError(
            f"the text gives one window of {length} tokens, and an interval needs two; give more "
            "text or less --length"
        )
    if windows and len(data.ids) < windows:
        say(
            f"the text gives {len(data.ids)} windows of {length} tokens, and {windows} were asked "
            "for"
        )
    return data


def _table_of_perplexity(result: "Perplexity", model: str) -> Table:
    table = _table(f"{model}: {result.windows} windows of {result.length}")
    table.add_row("perplexity", f"{result.perplexity:.4f}", _range(result.perplexity_ci))
    return table


def _table_of_evaluation(result: "Evaluation", model: str, against: str) -> Table:
    table = _table(f"{model} against {against}: {result.windows} windows of {result.length}")
    table.add_row("perplexity", f"{result.perplexity:.4f}", _range(result.perplexity_ci))
    table.add_row("reference perplexity", f"{result.reference_perplexity:.4f}", "")
    ratio = result.perplexity / result.reference_perplexity
    table.add_row("perplexity / reference", f"{ratio:.4f}", _range(result.ratio_ci))
    table.add_row("KL divergence (nats)", f"{result.kl:.5f}", _range(result.kl_ci))
    table.add_row("top-1 agreement", f"{result.top1_agreement:.4f}", _range(result.top1_ci))
    return table


def _details_of_evaluation(result: "Evaluation") -> list[str]:
    """What has no interval of its own, one line each."""
    from qlab.evaluation.figures import INDISTINGUISHABLE

    lines = [f"{name}: {said}" for name, said in result.details().items()]
    return [*lines, *([INDISTINGUISHABLE] if result.indistinguishable else [])]


def _table(title: str) -> Table:
    return Table("", "value", "95 % interval", title=title)


def _range(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.4f} to {interval[1]:.4f}"
