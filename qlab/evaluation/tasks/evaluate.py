"""One model through the tasks of lm-eval."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlab.driver.apply import Quantized
from qlab.errors import QlabError
from qlab.evaluation.tasks.scores import Score, TaskScores
from qlab.files.checkpoint import Checkpoint
from qlab.process.extras import needed
from qlab.process.surroundings import drawn_from, undisturbed

if TYPE_CHECKING:
    from qlab.evaluation.tasks.loading import Loaded

SEED = 1234  # of lm-eval's own command
PROMPTS = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")  # scored by a prompt's


@undisturbed
@torch.no_grad()
def evaluate_tasks(
    model: Checkpoint | Quantized,
    tasks: Sequence[str],
    *,
    folder: str | Path | None = None,
    server: str | None = None,
    api_key: str = "",
    served_model_name: str = "",
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    batch: int = 8,
    max_length: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> TaskScores:
    """What a model scores in tasks of lm-eval, in this process or behind a server.

    `scores.against(reference)` compares two models document by document. lm-eval asks and scores;
    the order of documents, few-shot examples and draws are the same in every call.

    Args:
        model: a model, its path, or what a recipe makes of it (`apply`). Of one behind a server
            only the tokenizer and the configuration are read.
        tasks: names of tasks, groups and tags, also patterns such as "arc_*".
        folder: with YAML files of tasks in lm-eval's form, which are then the only tasks; paths in
            `data_files` may be relative to the YAML file. None takes lm-eval's own tasks, whose
            data comes from the hub or its cache.
        server: the address of an OpenAI-compatible server that runs the model.
        api_key: of the server.
        served_model_name: of the model there, where it has several.
        limit: the first documents of each task; None takes all.
        shots: examples before each question; None takes what the task says.
        chat: put prompts into the tokenizer's chat template.
        batch: prompts at a time.
        max_length: tokens of a prompt and its answer; longer prompts lose their beginning. None
            takes what the model takes, at most 4096.
        device: where the model runs, such as "cpu" or "cuda".
        dtype: of its activations.

    Returns:
        A TaskScores: every metric of every task with its interval over documents, and of every
        group what its tasks score together.

    Raises:
        QlabError: lm-eval is not installed, no such task, data that cannot be had, questions
            without a token, a server that does not answer as OpenAI's or gives no
            log-probabilities of prompts.

    Source:
        lm-evaluation-harness (EleutherAI).

    Example:
        >>> import qlab
        >>> reference = qlab.evaluate_tasks("demo", ["choices"], folder="my-tasks")
        >>> scores = qlab.evaluate_tasks("demo-int4", ["choices"], folder="my-tasks")
        >>> scores.against(reference).rows[0].verdict
        'indistinguishable'
    """
    if not tasks:
        raise QlabError("there is no task to evaluate; give the names of some")
    for name, number in {"limit": limit, "batch": batch}.items():
        if number is not None and number < 1:
            raise QlabError(f"{name} is {number}; give at least 1")
    if shots is not None and shots < 0:
        raise QlabError(f"shots is {shots}; give 0 or more")
    needed("lm_eval", "eval")
    from qlab.evaluation.tasks.loading import load
    from qlab.evaluation.tasks.models import Server, in_process, served

    loaded = load(tasks, None if folder is None else Path(folder))
    if server is None:
        asked: Any = in_process(model, device, dtype, batch, max_length)
    else:
        checkpoint = model.model if isinstance(model, Quantized) else model
        needs_prompts = any(task.OUTPUT_TYPE in PROMPTS for task in loaded.tasks.values())
        place = Server(url=server, key=api_key, name=served_model_name)
        asked = served(checkpoint, place, batch, max_length, needs_prompts)
    for task in loaded.tasks.values():
        _set_shots(task, shots)
    samples = _answered(asked, loaded, limit, chat)
    scores = [score for name in loaded.tasks for score in _scores(loaded, name, samples[name])]
    return TaskScores(
        scores=(*scores, *_of_groups(loaded, scores)),
        texts={
            name: tuple(sample["resps"][0][0] for sample in samples[name])
            for name, task in loaded.tasks.items()
            if task.OUTPUT_TYPE == "generate_until"
        },
    )


def _answered(asked: Any, loaded: "Loaded", limit: int | None, chat: bool) -> Mapping[str, Any]:
    """What lm-eval says of every document of every task."""
    import requests
    from lm_eval import evaluate

    from qlab.evaluation.tasks.models import answers

    with _draws_of_its_own():
        try:
            found = evaluate(
                asked,
                {"tasks": dict(loaded.tasks)},
                limit=limit,
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
        except requests.RequestException as error:
            raise answers(error) from error
        except AssertionError as error:  # lm-eval's checks of what tasks ask
            said = str(error) or "a question or an answer is empty, or has no token of its own"
            raise QlabError(f"lm-eval cannot ask these tasks: {said:.300}") from error
    return found["samples"]


def _set_shots(task: Any, shots: int | None) -> None:
    """How many examples come before a question, and the seed that draws them. A task that says 0
    means it."""
    says = task.get_config("num_fewshot")
    if says != 0:
        task.set_config(key="num_fewshot", value=(says or 0) if shots is None else shots)
    task.set_fewshot_seed(SEED)


@contextmanager
def _draws_of_its_own() -> Iterator[None]:
    """Tasks draw from the generators of the whole process: they start alike in every call, and have
    their states back then."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    with drawn_from(SEED):
        random.seed(SEED)
        numpy.random.seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


def _scores(loaded: "Loaded", name: str, samples: Sequence[Mapping[str, Any]]) -> Iterator[Score]:
    """Every metric of a task, behind every filter of its answers. A metric of which the task does
    not say how it is aggregated is a mean, as in lm-eval."""
    from lm_eval.api.metrics import mean

    task = loaded.tasks[name]
    aggregations, better = task.aggregation(), task.higher_is_better()
    for filtered in dict.fromkeys(sample["filter"] for sample in samples):
        rows = [sample for sample in samples if sample["filter"] == filtered]
        rows.sort(key=lambda row: row["doc_id"])
        for metric in rows[0]["metrics"]:
            values, aggregate = tuple(row[metric] for row in rows), aggregations.get(metric, mean)
            yield Score(
                task=name,
                metric=metric,
                filter=filtered,
                value=float(aggregate(list(values))),
                is_higher_better=better.get(metric) is not False,
                of_documents=values,
                documents=tuple(row["doc_hash"] for row in rows),
                aggregate=None if aggregate is mean else aggregate,
            )


def _of_groups(loaded: "Loaded", scores: Sequence[Score]) -> Iterator[Score]:
    """What the tasks of a group score together, over all documents, in metrics that all have."""
    for group, names in loaded.groups.items():
        members = [score for score in scores if score.task in names]
        for key in dict.fromkeys((score.metric, score.filter) for score in members):
            rows = [score for score in members if (score.metric, score.filter) == key]
            if len(rows) < len(names) or any(row.aggregate is not None for row in rows):
                continue
            values = tuple(value for row in rows for value in row.of_documents)
            yield Score(
                task=group,
                metric=key[0],
                filter=key[1],
                value=sum(values) / len(values),
                is_higher_better=rows[0].is_higher_better,
                of_documents=values,
                documents=tuple(document for row in rows for document in row.documents),
            )
