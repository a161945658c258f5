"""Whether an engine loads a directory: from headers, its configuration and its traced blocks."""

from collections.abc import Mapping

from qlab.algebra.spec import Spec
from qlab.codecs import CODECS, engines
from qlab.driver.admissible import Refusals, joined_sites
from qlab.driver.sites import sites_of
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.parallel import limits, mixed_inputs, refuse_degree, styles_of
from qlab.model.skeleton import Skeleton

TURNS, CACHE = "transform_config", "kv_cache_scheme"  # keys of what happens at run time


def refuse_unloadable(model: Checkpoint, target: str, ranks: int = 1) -> None:
    """Refuse a directory that an engine does not load, or not over so many ranks.

    Args:
        model: The directory.
        target: The engine, a name in `qlab.codecs.engines.TARGETS`.
        ranks: Of tensor parallelism.

    Raises:
        QlabError: Names the weights, what the engine does not load of them and the nearest that it
            does; an architecture that it does not build; or the numbers of ranks over which the
            directory can be divided.
    """
    engine = engines.target_named(target)
    unbuilt = engines.refusal_of_architectures(target, model.raw.get("architectures"))
    if unbuilt:
        raise QlabError(f"{model.path}: {unbuilt}")
    specs = {module: spec for module, spec in model.quantized.items() if spec}
    if specs:
        _refuse_weights(model, target, specs)
    for extra in model.extras:
        held = {TURNS: engine.turns, CACHE: engine.caches}.get(extra.key, ())
        if extra.online and not held:
            raise QlabError(
                f"{model.path}: {extra.says}, which {target} does not do; run it with qlab or "
                "quantize without it"
            )
    if ranks > 1:
        _refuse_ranks(model, target, ranks)


def _refuse_ranks(model: Checkpoint, target: str, ranks: int) -> None:
    """Refuse a number of ranks that the model's plan, its heads and its groups do not allow, what
    attention reads that is rounded, and inputs that are turned over channels of several ranks, both
    of which qlab alone is known to divide."""
    skeleton = Skeleton(model, model.dtype)
    try:
        styles = styles_of(skeleton)
        refuse_degree(limits(skeleton, styles), ranks)
    except QlabError as error:
        raise QlabError(f"{model.path}: {error}") from error
    for extra in model.extras:
        if extra.attended and extra.applied:
            raise QlabError(
                f"{model.path}: {extra.says}, which {target} was not seen to do over several "
                "ranks; run it on 1"
            )
    turned = sorted(mixed_inputs(skeleton, styles, ranks))
    if turned:
        raise QlabError(
            f"{model.path}: the input of {turned[0]} is turned at run time over channels of "
            f"several ranks, which {target} was not seen to do; run it on 1"
        )


def _refuse_weights(model: Checkpoint, target: str, specs: Mapping[str, Spec]) -> None:
    """Refuse weights, and inputs beside them, that the engine does not load."""
    codec = format_of(model)
    sites = sites_of(Skeleton(model, model.dtype), (), None)
    refusals = Refusals()
    for module, spec in specs.items():
        experts, shape = ".experts." in module, sites.shapes.get(module)
        k = None if shape is None else shape[-1]
        refusals.add(engines.refusal(target, codec, spec, experts, k), module)
        if module in model.inputs:
            rounded = model.inputs[module]
            refusals.add(engines.refusal_of_inputs(target, spec, rounded, experts), module)
    for names in joined_sites(sites.sites):
        alone = [name for name in names if not sites.sites[name].route]
        mixed = engines.division(target, {name: model.quantized.get(name) for name in alone})
        refusals.add(mixed, *alone)
    refusals.raise_first()
    several = engines.uniformity(target, specs)
    if several:
        raise QlabError(f"{model.path}: {several}; quantize all weights to one")


def format_of(model: Checkpoint) -> str:
    """The name of a quantized directory's format, as `--codec` has it where qlab writes it."""
    named = [name for name, codec in CODECS.items() if codec is model.codec]
    return named[0] if named else str(model.raw["quantization_config"].get("quant_method"))
