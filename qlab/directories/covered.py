"""Whether a directory holds what the recipe in its qlab.json makes of the model: no weight left
unquantized, and none on another grid."""

from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any

from qlab.algebra.scope import Scope, scope_named
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.model.modules import Modules
from qlab.model.uncounted import uncounted
from qlab.process.shown import family

LEFT = "it is not quantized, and the recorded recipe covers it"


def unlike_recipe(model: Modules, record: Mapping[str, Any]) -> dict[str, str]:
    """Module or site -> what the recorded recipe makes of it and the directory does not hold; empty
    where nothing is recorded.

    Of a directory that was converted only the recipe's reach is checked: another format may spell
    its grid in another way.
    """
    job, converted = _first_job(record.get("job", {}))
    stages = list(_stages(job))
    specs = {name: row["spec"] for name, row in record.get("sites", {}).items() if "spec" in row}
    quantized = [*model.checkpoint.quantized, *(name for name, spec in specs.items() if spec)]
    left_out = partial(_left_out, stages, {family(name) for name in quantized})
    faults = {name: LEFT for name, spec in specs.items() if not spec and left_out(name)}
    if not converted:
        faults |= _on_other_grids(stages, specs)
    reported = specs.keys() | record.get("unused", {}).keys()
    chosen = job.get("sites")  # of a recipe for weights by their names in the files
    for module, site in _unquantized(model).items():
        reached = module in chosen if isinstance(chosen, list) else left_out(site)
        if reached and site not in reported and module not in reported:
            faults[module] = LEFT
    return faults


def _first_job(job: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The job that quantized, before all conversions, and whether there were any."""
    converted = False
    while isinstance(job.get("converted_from"), dict):
        job, converted = job["converted_from"], True
    return job, converted


def _left_out(stages: Sequence[tuple[Scope, str]], kinds: Set[str], name: str) -> bool:
    """Whether a stage reaches an unquantized weight, and the same weight of other blocks is
    quantized. kinds: of all quantized weights."""
    if family(name) not in kinds:
        return False
    return any(name in scope and not scope.outside for scope, _ in stages)


def _on_other_grids(
    stages: Sequence[tuple[Scope, str]], specs: Mapping[str, str | None]
) -> dict[str, str]:
    """Quantized site -> its grid, where no stage that reaches the site makes that grid."""
    faults = {}
    for name, spec in specs.items():
        grids = [grid for scope, grid in stages if name in scope]
        if spec and grids and spec not in grids:
            faults[name] = f"it is {spec}, and the recorded recipe makes it {grids[0]}"
    return faults


def _stages(job: Mapping[str, Any]) -> Iterator[tuple[Scope, str]]:
    """What every stage of a recorded job that rounds may touch, and the name of its grid."""
    recipe = job.get("recipe")
    for stage in recipe if isinstance(recipe, list) else ():
        try:
            yield scope_named(stage["scope"]), str(parse_spec(stage["spec"]))
        except (KeyError, TypeError, AttributeError, QlabError):
            continue  # it rounds nothing, or to a grid without a name


def _unquantized(model: Modules) -> dict[str, str]:
    """Module of the files with an unquantized matrix -> its name as a site.

    Where transformers knows the architecture, only modules of its blocks and of blocks that its
    config.json does not count; modules of layers for other ends are left out.
    """
    checkpoint = model.checkpoint
    matrices = {
        name.removesuffix(".weight")
        for name, stored in checkpoint.stored.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    modules = sorted(matrices - checkpoint.quantized.keys())
    try:
        skeleton = model.skeleton
    except QlabError:  # damaged, which is a fault of its own
        return {}
    if skeleton is None:
        return {module: module for module in modules}
    sites = skeleton.names.sites_of_modules()
    uncounted_blocks = tuple(f"{block}." for block in uncounted(skeleton))
    return {
        module: sites.get(module, module)
        for module in modules
        if module in sites or module.startswith(uncounted_blocks)
    }
