"""Methods of a bench under further calibration seeds."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import qlab
from qlab.algebra.transform import Transform
from qlab.bench.unwritten import measured
from qlab.bench.written import quantized
from qlab.data.calibration import Tokens
from qlab.driver.observe import Inputs
from qlab.evaluation.perplexity import Reading
from qlab.files.checkpoint import Checkpoint


def of_seed(method: str, seed: int) -> str:
    """The name of a method that is calibrated with a seed."""
    return f"{method}-seed{seed}"


def seeds_of_written(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    drawn: Iterable[Tokens],
    out: Path,
    inputs: str,
    against: tuple[Reading, Tokens],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method with its figures, calibrated on the windows that further seeds chose. against:
    the reference, and the windows that it was read on."""
    for data in drawn:
        assert data.seed is not None  # it chose the windows
        methods = {of_seed(name, data.seed): name for name in recipes}
        by_seed = {named: recipes[name] for named, name in methods.items()}
        results = quantized(model, by_seed, data, out, inputs)
        for named, name in methods.items():
            evaluation = qlab.evaluate(qlab.open(results[named].path), *against)
            yield name, figures(data.seed, evaluation.json())


def seeds_of_unwritten(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    drawn: Iterable[Tokens],
    inputs: Inputs,
    against: tuple[Reading, Tokens],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of methods that no format holds."""
    for data in drawn:
        assert data.seed is not None  # it chose the windows
        for name, recipe in recipes.items():
            evaluation, _ = measured(model, recipe, data, inputs, against)
            yield name, figures(data.seed, evaluation.json())


def add_seeds(
    rows: Sequence[dict[str, Any]], first: int, others: Iterable[tuple[str, dict[str, Any]]]
) -> None:
    """Put the figures of every seed into the rows of their methods, those of the first seed, which
    are the row's own, before the others."""
    by_method = {row["method"]: row for row in rows}
    for row in rows:
        row["seeds"] = [figures(first, row)]
    for method, others_figures in others:
        by_method[method]["seeds"].append(others_figures)


def figures(seed: int, row: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a method calibrated with one seed."""
    ratio = row["perplexity"] / row["reference_perplexity"]
    return {"seed": seed, "perplexity": row["perplexity"], "ratio": ratio, "kl": row["kl"]}
