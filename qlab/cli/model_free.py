"""quantize --model-free: from the files alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from qlab.cli.choices import Choices, codec_of, maker_of, recipe_for, refuse_unused
from qlab.cli.options import resolved
from qlab.cli.output import console, report
from qlab.errors import QlabError

if TYPE_CHECKING:
    from qlab.algebra.transform import Transform
    from qlab.files.checkpoint import Checkpoint


def refuse_site_choices(choices: Choices) -> None:
    """Refuse what chooses among the weights as a model shows them."""
    if choices.keep:
        raise QlabError(
            "--keep chooses among the sites of blocks, which need the model; --model-free takes "
            "--include and --exclude"
        )
    if choices.outside:
        raise QlabError(
            "--outside asks the model what lies around its blocks; --model-free takes --include "
            "and --exclude"
        )


def quantize_without_model(
    model: str,
    out: Path,
    *,
    method: str,
    choices: Choices,
    include: list[str] | None,
    exclude: list[str] | None,
    overwrite: bool,
    resume: bool,
    json_file: Path | None,
) -> None:
    """Quantize the weights that `include` and `exclude` choose, and say what was written."""
    from qlab.directories.model_free import KEPT, quantize_files
    from qlab.files.checkpoint import open_checkpoint
    from qlab.process.ranks import agreed, is_first

    def asked() -> "tuple[Checkpoint, Transform, str]":
        refuse_of_runs(choices)
        maker = maker_of(method, choices, usual="rtn")
        opened = open_checkpoint(resolved(model))
        codec = codec_of(choices, maker)
        return opened, recipe_for(opened, maker, choices, codec), codec

    opened, recipe, codec = agreed(asked)
    result = quantize_files(
        opened,
        recipe,
        out,
        include=include or ("*",),
        exclude=(*KEPT, *(exclude or ())),
        codec=codec,
        target=choices.target or None,
        overwrite=overwrite,
        resume=resume,
    )
    if not is_first():
        return
    cost = f"{result.seconds:.1f} s, peak {result.peak_rss_bytes / 2**20:.0f} MiB"
    console().print(
        f"{result.path}: {codec}, {len(result.sites)} weights, {result.bits_per_weight:.3f} bits "
        f"per weight, {cost}",
        soft_wrap=True,
    )
    report(result.json(), json_file)


def refuse_of_runs(choices: Choices) -> None:
    """Refuse options that say how a model is run."""
    refuse_unused(choices.calib, choices.images, "--model-free runs no model")
    given = {
        f"--bits {choices.bits}": choices.bits,
        "--memory": choices.memory,
        "--offload": choices.offload,
        "--calibrate-all-experts": choices.calibrate_all_experts,
        "--inputs reference": choices.inputs == "reference",
        f"--device {choices.device}": choices.device != "cpu",
    }
    unused = [option for option, value in given.items() if value]
    if unused:
        raise QlabError(
            f"{unused[0]} would change nothing, since --model-free runs no model; leave it out, or "
            "leave out --model-free"
        )
