"""What binds cost: the runs of windows forward and backward, and gradients on their way between
ranks.

Each part of a pass backward has its gradients added by their owners, who tell the sums to all: with
p parts of b bytes and w ranks that is b (p (1 - 1/w) + w - 1). A pass over some of the windows also
moves their final hidden states to the ranks that run their heads, and the gradients of these back.
"""

from collections.abc import Iterator

from qlab.algebra.bind import Bind, Foreseen
from qlab.driver.expense import Expense, share_of, windows_of
from qlab.driver.foreseen import FP32, Measured, runs_of
from qlab.driver.job import Job
from qlab.driver.parts import Parts
from qlab.driver.sites import Sites


def measuring(
    job: Job, sites: Sites, measured: Measured, ranks: int, of_pass: float
) -> Iterator[Expense]:
    """The stages of a run in which binds measure.

    Args:
        job: The run.
        sites: Its weights.
        measured: What its binds will run.
        ranks: The processes that share it. A bind that is not divided is measured by rank 0.
        of_pass: Operations of a pass forward over all windows.
    """
    for place, of in measured.items():
        stage = job.recipe[place]
        if of is None or job.data is None or not isinstance(stage, Bind):
            continue
        windows, world = windows_of(job.data), ranks if stage.divided else 1
        of_window, (forward, backward) = of_pass / windows, runs_of(of)
        share = share_of(windows, world), share_of(max(of.in_a_pass, 1), world)
        passes = of.backward / max(of.in_a_pass, 1)
        sums = passes * of.summed * (Parts(of.in_a_pass).count * (1 - 1 / world) + world - 1)
        sent = sums + _to_heads(job, sites, of, windows) * (1 - 1 / world)
        if not forward + backward:
            continue
        yield Expense(
            stage=f"{stage.name} measured",
            operations=(forward + backward) * of_window,
            slowest=(forward * share[0] + backward * share[1]) * of_window,
            sent=sent,
            received=sent / world,
        )


def _to_heads(job: Job, sites: Sites, of: Foreseen, windows: int) -> float:
    """The bytes of final hidden states, and of their gradients, in passes over some windows."""
    if job.data is None or of.in_a_pass >= windows:
        return 0.0
    *_, (path, code) = [(path, code) for path, code in sites.codes.items() if code.sites]
    hidden = sites.shapes[f"{path}.{code.sites[0].path}"][-1]
    return 2.0 * of.backward * job.data.longest * hidden * FP32
