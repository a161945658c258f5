"""eval --method and --recipe: what a recipe loses, before anything is written."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qlab.cli.choices import Choices, job_of
from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.data.calibration import Tokens
    from qlab.driver.apply import Quantized
    from qlab.evaluation.comparison import Seeds
    from qlab.evaluation.perplexity import Evaluation

NEEDS_RECIPE = ("spec", "asymmetric", "calib", "samples", "seed", "seeds", "inputs")


def refuse_without_recipe(choices: Choices) -> None:
    """Refuse options that say how a recipe is applied where none is."""
    unused = [name for name in NEEDS_RECIPE if name in choices.typed]
    if unused:
        raise QlabError(
            f"--{unused[0]} would not be used, since no recipe is applied; give --method or "
            "--recipe, or leave it out"
        )


def seeds_of(
    model: str, method: str, choices: Choices, seeds: int, against: str, data: "Tokens"
) -> "Seeds":
    """The evaluations of a recipe under several calibration seeds, from that of the choices on.
    seeds: how many."""
    import qlab
    from qlab.evaluation.perplexity import read

    reference = read(qlab.open(against), data, device=choices.device)

    def run(seed: int) -> "Evaluation":
        quantized = applied(model, method, replace(choices, seed=seed))
        return qlab.evaluate(quantized, reference, data, choices.device)

    return qlab.over_seeds(run, list(range(choices.seed, choices.seed + seeds)))


def applied(model: str, method: str, choices: Choices) -> "Quantized":
    """What the recipe makes of the model; refuses what cannot be done, whatever the format."""
    import qlab

    job = job_of(model, method, choices)
    return qlab.apply(
        job.model,
        job.recipe,
        job.data,
        inputs=job.inputs,
        device=job.device,
        memory=job.memory,
        offload=job.offload,
    )
