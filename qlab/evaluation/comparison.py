"""Two evaluations on the same windows, and several calibration seeds of one recipe: which
differences are more than chance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qlab.errors import QlabError
from qlab.evaluation.figures import Evaluation
from qlab.evaluation.statistics import bootstrap, holds
from qlab.process.shown import Shown, interval


@dataclass(frozen=True, repr=False, kw_only=True)
class Difference(Shown):
    """How one model differs from another on the same windows.

    ratio: the perplexity of the one over that of the other; kl: the divergence of the one minus
    that of the other, both from their reference. Fields ending in `_ci` are paired 95 % bootstrap
    intervals over windows.
    """

    ratio: float
    ratio_ci: tuple[float, float]
    kl: float
    kl_ci: tuple[float, float]
    windows: int

    @property
    def tie(self) -> bool:
        """Whether the perplexities cannot be told apart: the interval of their ratio holds 1."""
        return holds(self.ratio_ci, 1.0)

    @property
    def kl_tie(self) -> bool:
        """Whether the divergences cannot be told apart: the interval of their difference holds
        0."""
        return holds(self.kl_ci, 0.0)

    def summary(self) -> dict[str, str]:
        """Both figures, and whether each is a tie."""

        def verdict(tie: bool, figure: float) -> str:
            return "a tie" if tie else "the first is worse" if figure > 0 else "the first is better"

        ratio, kl = interval(self.ratio, self.ratio_ci), interval(self.kl, self.kl_ci)
        return {
            "ratio of perplexities": f"{ratio}, {verdict(self.tie, self.ratio - 1)}",
            "difference of KL (nats)": f"{kl}, {verdict(self.kl_tie, self.kl)}",
            "over": f"{self.windows} windows",
        }

    def json(self) -> dict[str, Any]:
        """The difference as plain data."""
        figures = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return figures | {"tie": self.tie, "kl_tie": self.kl_tie}


def difference(one: Evaluation, other: Evaluation) -> Difference:
    """How far two models evaluated on the same windows differ, and whether that is a tie.

    A difference within its paired interval is a tie, however the figures look.

    Args:
        one: what `evaluate` returned for a model.
        other: what it returned for another model, on the same windows.

    Returns:
        A Difference: the ratio of perplexities and the difference of divergences, with paired
        intervals over windows.

    Raises:
        QlabError: the two are of different windows, or were made by no `evaluate`.

    Source:
        Paired percentile bootstrap over windows (Efron and Tibshirani 1993).

    Example:
        >>> import qlab
        >>> windows = qlab.first_windows("demo", "held-out.jsonl", length=16, count=2)
        >>> result = qlab.evaluate("demo-int4", "demo", windows)
        >>> qlab.difference(result, result).tie
        True
    """
    for each in (one, other):
        if not isinstance(each, Evaluation) or not each.nll_by_window:
            raise QlabError(
                f"a difference is of two evaluations, and one is a {type(each).__name__} without "
                "figures of its windows; give what qlab.evaluate returned"
            )
    if one.ids_sha256 != other.ids_sha256:
        raise QlabError(
            f"the evaluations are of other windows ({one.windows} of {one.length} tokens, "
            f"{other.windows} of {other.length}); evaluate both models on the same"
        )
    nll, kl = (
        torch.tensor(getattr(one, figure), dtype=torch.float64)
        - torch.tensor(getattr(other, figure), dtype=torch.float64)
        for figure in ("nll_by_window", "kl_by_window")
    )
    return Difference(
        ratio=float(nll.mean().exp()),
        ratio_ci=bootstrap(nll, torch.exp),
        kl=float(kl.mean()),
        kl_ci=bootstrap(kl),
        windows=one.windows,
    )


@dataclass(frozen=True, repr=False, kw_only=True)
class Seeds(Shown):
    """One recipe calibrated with several seeds, each evaluated on the same windows.

    evaluations: seed -> its evaluation. The spread over seeds says what the choice of calibration
    windows changes; the intervals of each evaluation say what the choice of text to evaluate on
    does.
    """

    evaluations: Mapping[int, Evaluation]

    @property
    def kl(self) -> list[float]:
        """The divergence of every seed."""
        return [each.kl for each in self.evaluations.values()]

    @property
    def ratio(self) -> list[float]:
        """Perplexity / reference perplexity of every seed."""
        return [each.perplexity / each.reference_perplexity for each in self.evaluations.values()]

    def summary(self) -> dict[str, str]:
        """The spread over seeds beside the interval over windows of the first seed."""
        first = next(iter(self.evaluations.values()))
        return {
            "seeds": ", ".join(map(str, self.evaluations)),
            "perplexity / reference": spread(self.ratio, first.ratio_ci),
            "KL divergence (nats)": spread(self.kl, first.kl_ci),
            "over": f"{first.windows} windows of {first.length} tokens",
        }

    def json(self) -> dict[str, Any]:
        """The seeds as plain data."""
        return {
            "seeds": list(self.evaluations),
            "kl": self.kl,
            "ratio": self.ratio,
            "evaluations": [each.json() for each in self.evaluations.values()],
        }


def spread(figures: Sequence[float], windows: Sequence[float]) -> str:
    """The mean of a figure over seeds and its range, beside its interval over windows."""
    mean = sum(figures) / len(figures)
    return (
        f"{mean:.4f}, {min(figures):.4f} to {max(figures):.4f} over seeds "
        f"({windows[0]:.4f} to {windows[1]:.4f} over windows)"
    )


def over_seeds(run: Callable[[int], Evaluation], seeds: Sequence[int] = (0, 1, 2)) -> Seeds:
    """One recipe over several calibration seeds: what the choice of calibration windows changes.

    Args:
        run: seed -> the evaluation of the recipe calibrated with it. It quantizes and evaluates,
            always on the same windows.
        seeds: the seeds, each once.

    Returns:
        A Seeds: every evaluation, and their spread beside the interval over windows.

    Raises:
        QlabError: a seed is given twice or none is, or the evaluations are of different windows.

    Example:
        >>> import qlab
        >>> windows = qlab.first_windows("demo", "held-out.jsonl", length=16, count=2)
        >>> def run(seed):
        ...     data = qlab.tokens("demo", "my.jsonl", samples=2, length=16, seed=seed)
        ...     return qlab.evaluate(
        ...         qlab.apply("demo", qlab.gptq("int4-g64"), data), "demo", windows
        ...     )
        >>> result = qlab.over_seeds(run, [0, 1])
        >>> len(result.kl), max(result.kl) > min(result.kl)
        (2, True)
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise QlabError(
            f"the seeds are {', '.join(map(str, seeds)) or 'none'}; give each seed once, and at "
            "least one"
        )
    evaluations: dict[int, Evaluation] = {}
    for seed in seeds:
        evaluations[seed] = run(seed)
        difference(evaluations[seed], evaluations[seeds[0]])  # refuses other windows
    return Seeds(evaluations=evaluations)
