"""The main job: a model directory and a recipe in, a quantized model directory out, one segment in
memory at a time. It is `write(apply(...))`."""

from collections.abc import Mapping
from pathlib import Path

import torch

from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.apply import Quantized
from qlab.driver.job import CODEC, Job
from qlab.driver.observe import Inputs
from qlab.driver.result import Result
from qlab.driver.write import write_all
from qlab.files.checkpoint import Checkpoint


def quantize(
    model: Checkpoint,
    recipe: Transform,
    data: Data | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
    keep_statistics: str | Path | None = None,
    offload: str | Path | None = None,
) -> Result:
    """Apply a recipe to every block of a model and write the result as a model directory.

    One block is in memory at a time. The same call gives the same bytes, also when a killed run is
    continued.

    Args:
        model: The model that is quantized.
        recipe: The stages, applied to each block in their order.
        data: Calibration tokens, or samples of images and text; None for recipes that need no
            statistics.
        out: The directory that is written. It appears whole, at the end.
        inputs: "quantized" calibrates a site on what the quantized sites before it produce, so that
            it may correct their errors; where sites cannot be solved one after the other, on what
            the quantized blocks before its own produce. "reference" calibrates every site on the
            activations of the unquantized model.
        dtype: Of the activations while calibrating. None takes the model's own, where that holds
            all of its numbers. Statistics and solvers use float32.
        device: Where blocks are run and solved, such as "cpu" or "cuda".
        memory: A bound on the process's memory in bytes. As many experts are observed at a time as
            fit, several ranks shard a block that does not fit, and a run whose predicted peak is
            above it is refused. None sets no bound.
        overwrite: Whether an output that qlab wrote, and nobody changed since, may be replaced.
        resume: Whether to go on with a killed run of the same job. A stage of your own is the same
            one where its name, spec and `detail` are.
        calibrate_all_experts: Whether the statistics of every expert are of all tokens, rather than
            of those that the router sends to it; nothing else changes.
        codec: The format that is written, a name in `qlab.codecs.CODECS`.
        target: The engine that is to load the directory, a name in `qlab.codecs.engines`, whose
            limits are checked before anything runs. None checks no engine's.
        keep_statistics: A folder for the statistics of the unquantized model, with
            inputs="reference": those that are there are used, and others are put there. Another
            recipe for the model, on the same data, then runs no block before its solver. None keeps
            none.
        offload: A folder for what is kept while the model is worked on: hidden states between
            blocks, sums of statistics until a step asks for them, and blocks that wait for a
            measurement of the whole model. It is made where it is missing. None keeps states beside
            the output, sums in memory, and the rest where the system has its temporary files. What
            is written does not depend on it.

    Returns:
        The directory, the report's row of every site, the plan, and what the run cost.

    Raises:
        QlabError: What the recipe asks for cannot be done, or `out` may not be written to; names
            the site, pattern or path. Everything that can be known before the work is refused
            before it.

    Example:
        >>> import qlab
        >>> model = qlab.open("demo")
        >>> result = qlab.quantize(model, qlab.rtn("int4-g64"), None, "my-int4")
        >>> result.path.name, result.bits_per_weight
        ('my-int4', 4.25)
    """
    results = compare(
        model,
        {"": recipe},
        data,
        out,
        inputs=inputs,
        dtype=dtype,
        device=device,
        memory=memory,
        overwrite=overwrite,
        resume=resume,
        calibrate_all_experts=calibrate_all_experts,
        codec=codec,
        target=target,
        keep_statistics=keep_statistics,
        offload=offload,
    )
    return results[""]


def compare(
    model: Checkpoint,
    recipes: Mapping[str, Transform],
    data: Data | None,
    out: str | Path,
    *,
    inputs: Inputs = "quantized",
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    calibrate_all_experts: bool = False,
    codec: str = CODEC,
    target: str | None = None,
    keep_statistics: str | Path | None = None,
    offload: str | Path | None = None,
) -> dict[str, Result]:
    """Quantize a model by several recipes, each into a folder of its own.

    Every folder holds what `quantize` makes of its recipe, bit for bit, and all recipes are checked
    before any runs. With inputs="quantized" every recipe has a pass over the data of its own, since
    the next block sees its errors. With inputs="reference" all recipes share one pass and all
    statistics, and each result tells the seconds and the peak memory of that pass; a stage that
    corrects errors of earlier sites (`aim_at_reference`) is refused there.

    Args:
        model: The model that is quantized.
        recipes: Name of a folder in `out` -> its recipe.
        data: See `quantize`.
        out: The directory around the folders.
        inputs: See `quantize`, and above.
        dtype: See `quantize`.
        device: See `quantize`.
        memory: See `quantize`.
        overwrite: See `quantize`; of every folder.
        resume: See `quantize`; of every folder.
        calibrate_all_experts: See `quantize`.
        codec: See `quantize`.
        target: See `quantize`.
        keep_statistics: See `quantize`.
        offload: See `quantize`.

    Returns:
        Name of a folder -> the result of its recipe.

    Raises:
        QlabError: As of `quantize`; also for names that are no folder's.

    Example:
        >>> import qlab
        >>> recipes = {"int4": qlab.rtn("int4-g64"), "int8": qlab.rtn("int8-channel")}
        >>> results = qlab.compare(qlab.open("demo"), recipes, None, "compared")
        >>> {name: str(result.path.name) for name, result in results.items()}
        {'int4': 'int4', 'int8': 'int8'}
        >>> results["int4"].bits_per_weight < results["int8"].bits_per_weight
        True
    """
    named = {
        name: Quantized(
            job=Job(
                model=model,
                recipe=recipe,
                data=data,
                inputs=inputs,
                calibrate_all_experts=calibrate_all_experts,
                dtype=dtype,
                device=device,
                memory=memory,
                codec=None,
                offload=offload,
            )
        )
        for name, recipe in recipes.items()
    }
    return write_all(
        named,
        out,
        codec=codec,
        target=target,
        overwrite=overwrite,
        resume=resume,
        keep_statistics=keep_statistics,
    )
