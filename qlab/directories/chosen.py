"""Which weights of a directory a recipe quantizes without a model: chosen by their names in the
files."""

from collections.abc import Collection, Sequence

from qlab.algebra.scope import matches
from qlab.algebra.spec import Float, Spec
from qlab.algebra.transform import Transform
from qlab.algebra.views import Uncovered
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.linears import holds_experts
from qlab.model.modules import Modules

KEPT = (
    "*embed*",
    "*wte",
    "*wpe",
    "*lm_head",
    "*norm*",
    "*.gate",
    "*router*",
    "*shared_expert_gate",
)


def chosen_weights(
    modules: Modules, recipe: Transform, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, Spec]:
    """Module -> the spec to which the recipe rounds its weight.

    Refuses patterns without a weight, and weights that cannot be quantized.
    """
    source = modules.checkpoint
    _refuse_quantized(source)
    candidates = _candidates(source)
    _refuse_idle_patterns(source, candidates, include, exclude)
    chosen = [
        module
        for module in candidates
        if any(matches(pattern, module) for pattern in include)
        and not any(matches(pattern, module) for pattern in exclude)
    ]
    _refuse_chosen(modules, chosen)
    specs = _specs(recipe, chosen)
    if not specs:
        raise QlabError(
            f"the recipe and the patterns choose no weight of {source.path}, so there is nothing "
            "to write"
        )
    return specs


def _refuse_quantized(source: Checkpoint) -> None:
    """Refuse a directory that is quantized already; 8-bit floats are dequantized first."""
    for module, spec in sorted(source.quantized.items(), key=lambda item: item[0]):
        if spec and (not isinstance(spec, Float) or spec.bits < 8):
            raise QlabError(
                f"{module} of {source.path} is quantized to {spec} already; start from the "
                "unquantized model"
            )
    for extra in source.extras:
        if extra.online:
            raise QlabError(
                f"{source.path} has a {extra.key} ({extra.says}) that belongs to its present "
                "weights; start from the unquantized model"
            )


def _candidates(source: Checkpoint) -> list[str]:
    """The modules of the files with a weight [o, k], with codes, or with fused experts."""
    weights = {
        name.removesuffix(".weight")
        for name, stored in source.stored.items()
        if name.endswith(".weight") and len(stored.shape) == 2
    }
    return sorted(weights | source.quantized.keys() | _fused_experts(source))


def _fused_experts(source: Checkpoint) -> set[str]:
    return {name for name, stored in source.stored.items() if holds_experts(name, stored)}


def _refuse_idle_patterns(
    source: Checkpoint, candidates: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> None:
    """Refuse a pattern that matches no weight; those of KEPT may."""
    for pattern in (*include, *(pattern for pattern in exclude if pattern not in KEPT)):
        if any(matches(pattern, module) for module in candidates):
            continue
        if not candidates:
            raise QlabError(
                f"{source.path} holds no weight [o, k], so there is nothing to quantize"
            )
        raise QlabError(
            f"the pattern {pattern!r} matches no weight [o, k] of {source.path}; they are "
            f"named like {candidates[0]}"
        )


def _refuse_chosen(modules: Modules, chosen: Collection[str]) -> None:
    """Refuse chosen weights that are no linear's, fused experts, or codes without a config."""
    source = modules.checkpoint
    no_linears = sorted(modules.other_matrices() & set(chosen))
    if no_linears:
        raise QlabError(
            f"{', '.join(no_linears[:4])} belongs to no nn.Linear of the model, and readers would "
            "skip it; --exclude it"
        )
    fused = sorted(_fused_experts(source) & set(chosen))
    if fused:
        raise QlabError(
            f"{fused[0]} of {source.path} holds {source.stored[fused[0]].shape[0]} experts in one "
            "tensor, and only a model's definition tells where each of their projections lies; "
            "quantize with the model, or --exclude it"
        )
    for module in chosen:
        weight = f"{module}.weight"
        if module in source.quantized or source.shape_and_dtype(weight)[1].is_floating_point:
            continue
        raise QlabError(
            f"{weight} of {source.path} is stored as {source.stored[weight].dtype}, which are no "
            "weights but codes that its config.json does not explain; --exclude it, or start from "
            "the unquantized model"
        )


def _specs(recipe: Transform, chosen: Sequence[str]) -> dict[str, Spec]:
    """Module -> the spec of the last stage that rounds it."""
    if any(stage.scope.outside for stage in recipe):
        raise QlabError(
            "without a model nobody knows what lies around its blocks; leave outside() away, and "
            "name those weights as they are stored"
        )
    specs: dict[str, Spec] = {}
    for stage in recipe:
        inside = [module for module in chosen if module in stage.scope]
        if isinstance(stage.view, Uncovered) and inside:
            raise QlabError(
                f"no rule covers {', '.join(inside[:4])}; add a pattern, with keep() to leave "
                "them as they are"
            )
        if stage.spec is not None:
            specs |= dict.fromkeys(inside, stage.spec)
    return specs
