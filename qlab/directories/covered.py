"""Whether a directory is what the recipe that its qlab.json records makes of its weights: nothing
less, and on no other grid."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qlab.algebra.scope import Scope, scope_named
from qlab.algebra.spec import parse_spec
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import uncounted

LEFT = "it is not quantized, and the recorded recipe covers it"


def unlike_recipe(model: Checkpoint, record: Mapping[str, Any]) -> dict[str, str]:
    """Module or site -> what the recorded recipe makes of it and the directory does not hold; empty
    where nothing is recorded.

    A directory that was converted is held to the recipe's reach and not to its grid, which another
    format may spell in another way.
    """
    job, converted = record.get("job", {}), False
    while isinstance(job.get("converted_from"), dict):
        job, converted = job["converted_from"], True
    stages = list(_stages(job))
    rows = {name: row["spec"] for name, row in record.get("sites", {}).items() if "spec" in row}
    kinds = {
        _kind(name) for name in [*model.quantized, *(name for name, spec in rows.items() if spec)]
    }

    def left(name: str) -> bool:
        """Whether a stage reaches an unquantized weight whose fellows in other blocks are
        quantized."""
        return _kind(name) in kinds and any(
            name in scope and not scope.outside for scope, _ in stages
        )

    found = {name: LEFT for name, spec in rows.items() if not spec and left(name)}
    for name, spec in rows.items():
        wanted = [grid for scope, grid in stages if name in scope]
        if spec and wanted and spec not in wanted and not converted:
            found[name] = f"it is {spec}, and the recorded recipe makes it {wanted[0]}"
    chosen = job.get("sites")  # of a recipe for weights by their names in the files
    said = rows.keys() | record.get("unused", {}).keys()
    for module, site in _dense(model).items():
        reached = module in chosen if isinstance(chosen, list) else left(site)
        if reached and site not in said and module not in said:
            found[module] = LEFT
    return found


def _stages(job: Mapping[str, Any]) -> Iterator[tuple[Scope, str]]:
    """What every stage of a recorded job that rounds may touch, and the name of its grid."""
    recorded = job.get("recipe")
    for stage in recorded if isinstance(recorded, list) else ():
        try:
            yield scope_named(stage["scope"]), str(parse_spec(stage["spec"]))
        except (
            KeyError,
            TypeError,
            AttributeError,
            QlabError,
        ):  # it rounds nothing, or to a grid without a name
            continue


def _kind(name: str) -> str:
    """A name without its numbers: the linears of one place in all blocks are of one kind."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _dense(model: Checkpoint) -> dict[str, str]:
    """Module of the files with an unquantized matrix -> its name as a site. Where transformers
    knows the architecture, those of its blocks and of blocks that its config.json does not count;
    layers for other ends are none."""
    matrices = [
        name
        for name, stored in model.stored.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    ]
    dense = sorted({name.removesuffix(".weight") for name in matrices} - model.quantized.keys())
    if not model.known:
        return {module: module for module in dense}
    try:
        skeleton = Skeleton(model, model.dtype)
    except QlabError:  # damaged, which is a fault of its own
        return {}
    blocks, sites = (
        tuple(f"{block}." for block in uncounted(skeleton)),
        skeleton.names.sites_of_modules(),
    )
    return {
        module: sites.get(module, module)
        for module in dense
        if module in sites or (blocks and module.startswith(blocks))
    }
