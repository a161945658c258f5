"""The figure of a comparison by tasks: what is left of each of the reference's scores."""

from pathlib import Path

from qlab.errors import QlabError
from qlab.evaluation.tasks.scores import INDISTINGUISHABLE, TaskDifferences
from qlab.files.figures import literal, save_figure

COLORS = {INDISTINGUISHABLE: "C7", "worse": "C3", "better": "C2"}


def draw(differences: TaskDifferences, title: str, path: Path) -> None:
    """Write a figure to `path`: a row for every score, its recovery with the paired interval.

    Raises:
        QlabError: no score has a recovery, because the reference scores 0 everywhere.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    rows = [
        (row, row.recovery, row.recovery_interval)
        for row in reversed(differences.rows)
        if row.recovery is not None
    ]
    if not rows:
        raise QlabError("the reference scores 0 in every task, so that nothing can be drawn")
    figure = Figure(figsize=(8, 1.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, (row, recovery, ends) in enumerate(rows):
        low, high = ends or (recovery, recovery)
        axes.plot([low, high], [y, y], color=COLORS[row.verdict])
        axes.plot([recovery], [y], marker="o", color=COLORS[row.verdict])
    axes.axvline(1.0, color="black", linestyle=":")
    axes.set_yticks(range(len(rows)), [literal(row.score.name) for row, _, _ in rows])
    axes.set(title=literal(title), xlabel="recovery, with the paired 95 % interval")
    save_figure(figure, path)
