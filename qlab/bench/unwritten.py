"""Methods that no file format holds, measured without being written: what `qlab.apply` makes of a
model is evaluated while it is solved."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import qlab
from qlab.algebra.transform import Transform
from qlab.data.calibration import Tokens
from qlab.driver.apply import Quantized
from qlab.driver.observe import Inputs
from qlab.driver.report import PeakMemory, site_rows
from qlab.driver.result import bits_per_weight
from qlab.driver.segments import Solved
from qlab.errors import QlabError
from qlab.evaluation.perplexity import Evaluation, Reading
from qlab.files.checkpoint import Checkpoint
from qlab.process.progress import say


@dataclass(frozen=True, repr=False, kw_only=True)
class _Noted(Quantized):
    """What a recipe makes of a model, which notes the rows of its sites while it is solved."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def solved(self) -> Iterator[Solved]:
        """Every block, as it is solved."""
        for block in super().solved():
            self.rows.update(site_rows(block.after))
            yield block
            del block


def unwritten(
    model: Checkpoint, recipes: Mapping[str, Transform], data: Tokens | None, inputs: Inputs
) -> dict[str, str]:
    """The methods that can be applied and not written, each with the reason. What is wrong with a
    recipe beside that is refused as when it is written."""
    reasons: dict[str, str] = {}
    for name, recipe in recipes.items():
        try:
            qlab.plan(model, recipe, data, inputs=inputs)
        except QlabError as error:
            try:
                _value(model, recipe, data, inputs).plan  # noqa: B018
            except QlabError:
                raise error from None
            reasons[name] = str(error)
            say(f"{name}: {error}; measured without being written")
    return reasons


def measured(
    model: Checkpoint,
    recipe: Transform,
    data: Tokens | None,
    inputs: Inputs,
    against: tuple[Reading, Tokens],
) -> tuple[Evaluation, dict[str, Any]]:
    """The evaluation of a method, and what it costs. Its seconds and its memory hold those of the
    evaluation. against: the reference, and the windows that it was read on."""
    value, started = _value(model, recipe, data, inputs), time.perf_counter()
    with PeakMemory() as peak:
        evaluation = qlab.evaluate(value, *against)
    cost = {
        "bits_per_weight": bits_per_weight(value.rows),
        "bytes": None,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak.bytes,
        "inputs": inputs,
        "losses": {site: row["loss"] for site, row in value.rows.items() if "loss" in row},
    }
    return evaluation, cost


def _value(model: Checkpoint, recipe: Transform, data: Tokens | None, inputs: Inputs) -> _Noted:
    applied = qlab.apply(model, recipe, data, inputs=inputs)
    return _Noted(job=applied.job)
