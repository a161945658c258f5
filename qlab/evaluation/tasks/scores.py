"""What a model scores in tasks, and what is left of it in another model: figures with intervals
over documents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qlab.errors import QlabError
from qlab.evaluation.statistics import bootstrap, holds, mcnemar, paired_shares, resampled
from qlab.process.shown import Shown, interval, some

INDISTINGUISHABLE = "indistinguishable"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure of one task.

    task, metric, filter: as lm-eval calls them. value: the figure. is_higher_better: whether more
    is better. of_documents: what the figure is made of, document by document. aggregate: that makes
    it; None is the mean. documents: hashes of the documents.
    """

    task: str
    metric: str
    filter: str
    value: float
    is_higher_better: bool
    of_documents: tuple[Any, ...]
    documents: tuple[str, ...]
    aggregate: Callable[[Sequence[Any]], float] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two figures the same figure of two models."""
        return self.task, self.metric, self.filter

    @property
    def name(self) -> str:
        """The task and the metric, and the filter where there is one."""
        kind = self.metric if self.filter == "none" else f"{self.metric}, {self.filter}"
        return f"{self.task} ({kind})"

    @property
    def is_of_answers(self) -> bool:
        """Whether every document is right or wrong, and the figure the share of right ones."""
        return self.aggregate is None and all(value in (0, 1) for value in self.of_documents)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Of the value, over documents."""
        if self.aggregate is not None:
            return resampled(self.aggregate, self.of_documents)
        return bootstrap(torch.tensor(self.of_documents, dtype=torch.float64))

    def json(self) -> dict[str, Any]:
        """The figure as plain data."""
        return {
            "task": self.task,
            "metric": self.metric,
            "filter": self.filter,
            "value": self.value,
            "value_ci": list(self.interval),
            "is_higher_better": self.is_higher_better,
            "documents": len(self.documents),
        }


@dataclass(frozen=True, repr=False, kw_only=True)
class TaskScores(Shown):
    """What a model scores in tasks. scores: every figure of every task. texts: task -> what the
    model wrote, document by document; of tasks that generate."""

    scores: tuple[Score, ...]
    texts: Mapping[str, tuple[str, ...]]

    def against(self, reference: "TaskScores") -> "TaskDifferences":
        """What is left of a reference's scores in this model.

        Args:
            reference: what `evaluate_tasks` returned for another model, of the same tasks.

        Raises:
            QlabError: a task that the reference did not have, or had other documents in.
        """
        theirs = {score.key: score for score in reference.scores}
        missing = [score.name for score in self.scores if score.key not in theirs]
        if missing:
            raise QlabError(
                f"the reference has no score in {some(missing)}; give both models the same tasks"
            )
        return TaskDifferences(
            rows=tuple(TaskDifference(score, theirs[score.key]) for score in self.scores)
        )

    def summary(self) -> dict[str, str]:
        """Every figure with its interval."""
        return {
            score.name: f"{interval(score.value, score.interval)} of {len(score.documents)}"
            for score in self.scores
        }

    def json(self) -> dict[str, Any]:
        """The scores as plain data."""
        return {"scores": [score.json() for score in self.scores]}


class TaskDifference:
    """One figure of a model beside a reference's, document by document.

    Args:
        score: the model's.
        reference: of the reference.
    """

    def __init__(self, score: Score, reference: Score):
        if score.documents != reference.documents:
            raise QlabError(
                f"{score.name} is of {len(score.documents)} documents and the reference's of "
                f"{len(reference.documents)} others; evaluate both models with the same limit"
            )
        self.score, self.reference = score, reference
        is_of_answers = score.is_of_answers and reference.is_of_answers
        pairs = list(zip(reference.of_documents, score.of_documents)) if is_of_answers else []
        self.lost = sum(1 for before, now in pairs if before and not now) if pairs else None
        self.gained = sum(1 for before, now in pairs if now and not before) if pairs else None

    @property
    def difference(self) -> float:
        """The model's figure minus the reference's."""
        return self.score.value - self.reference.value

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 % of the difference, paired over documents: `paired_shares` of right answers, a
        bootstrap otherwise."""
        ours, theirs = self.score.of_documents, self.reference.of_documents
        if self.lost is not None and self.gained is not None:
            return paired_shares(self.lost, self.gained, len(ours))
        if self.score.aggregate is not None:
            return resampled(self.score.aggregate, ours, theirs)
        differences = [a - b for a, b in zip(ours, theirs)]
        return bootstrap(torch.tensor(differences, dtype=torch.float64))

    @property
    def recovery(self) -> float | None:
        """What the model keeps of the reference's figure: model / reference, or reference / model
        where less is better; None where that divides by 0."""
        return self._recovery(self.score.value)

    @property
    def recovery_interval(self) -> tuple[float, float] | None:
        """The paired interval of the difference around the reference's figure, as recoveries."""
        ends = [self._recovery(self.reference.value + end) for end in self.interval]
        known = [end for end in ends if end is not None]
        return (min(known), max(known)) if len(known) == 2 else None

    def _recovery(self, value: float) -> float | None:
        over, under = value, self.reference.value
        if not self.score.is_higher_better:
            over, under = under, over
        return over / under if under else None

    @property
    def flips_p(self) -> float | None:
        """McNemar's mid-p value that as many answers turn wrong as turn right."""
        if self.lost is None or self.gained is None:
            return None
        return mcnemar(self.lost, self.gained)

    @property
    def verdict(self) -> str:
        """Whether the interval holds 0, and else which way it lies."""
        if holds(self.interval, 0.0):
            return INDISTINGUISHABLE
        return "better" if (self.difference > 0) == self.score.is_higher_better else "worse"

    def json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "task": self.score.task,
            "metric": self.score.metric,
            "filter": self.score.filter,
            "documents": len(self.score.documents),
            "is_higher_better": self.score.is_higher_better,
            "reference": self.reference.value,
            "value": self.score.value,
            "difference": self.difference,
            "difference_ci": list(self.interval),
            "recovery": self.recovery,
            "lost": self.lost,
            "gained": self.gained,
            "flips_p": self.flips_p,
            "verdict": self.verdict,
        }


@dataclass(frozen=True, repr=False, kw_only=True)
class TaskDifferences(Shown):
    """What is left of a reference's scores in a model, a row for every figure."""

    rows: tuple[TaskDifference, ...]

    def summary(self) -> dict[str, str]:
        """Every row in words."""
        return {
            row.score.name: (
                f"{row.reference.value:.4f} -> {row.score.value:.4f}, difference "
                f"{interval(row.difference, row.interval)}, {row.verdict}"
            )
            for row in self.rows
        }

    def json(self) -> dict[str, Any]:
        """The rows as plain data."""
        return {"tasks": [row.json() for row in self.rows]}
