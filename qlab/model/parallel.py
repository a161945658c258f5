"""Which part of a model each of several ranks holds (tensor parallel): what the model's own plan
cuts, and over how many ranks that is possible, from headers alone.

transformers names a style for modules (`tp_plan`). A weight [o, k] that is cut by outputs gives a
part of y; one that is cut by inputs gives a summand of y, from its part of x. Between the two, a
rank has the attention heads and the channels that it holds and no others, so that all cuts between
them are at the same places.

    whole model -> each rank: its rows of q, k, v, gate, up; its columns of o, down;  y = sum of y_r
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from qlab.algebra.online import matrix_of
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.online import at_input, at_output
from qlab.model.skeleton import Skeleton

Axis = Literal["o", "k"]


@dataclass(frozen=True)
class Style:
    """What a style of a plan means where no gradient is wanted.

    axis: along which the weight is cut, None where every rank has it whole. packed: how many
    weights lie one behind the other along it, each of which is cut. splits: whether the input comes
    whole, so that a rank takes its part of it. behind: what becomes of the output: the ranks'
    summands are summed, or their parts gathered. whole: whether a weight that the plan cuts by
    inputs is cut by outputs, and takes the inputs of all ranks; its part of the output is the
    summand, with zeros around it.
    """

    axis: Axis | None = None
    packed: int = 1
    splits: bool = False
    behind: Literal["sum", "gather"] | None = None
    whole: bool = False

    @property
    def is_open(self) -> bool:
        """Whether parts of the weight meet parts of others, so that all are cut alike."""
        return self.axis is not None and not self.splits and self.behind != "gather"


GATHERED, SPLIT = Style("o", behind="gather"), Style("k", splits=True, behind="sum")
STYLES: Mapping[str, Style] = {
    "colwise": Style("o"),
    "colwise_rep": GATHERED,
    "colwise_gather_output": GATHERED,
    "packed_colwise": Style("o", packed=2),
    "rowwise": Style("k", behind="sum"),
    "rowwise_rep": SPLIT,
    "rowwise_split_input": SPLIT,
    "packed_rowwise": Style("k", packed=2),
    "embedding_rowwise": Style("o", behind="sum"),
    "moe_tp_experts": Style(behind="sum"),
    "all_reduce": Style(behind="sum"),
    # what these do concerns gradients, or how transformers holds a parameter
    "replicate": Style(),
    "replicated_with_grad_allreduce": Style(),
    "mla_kv_a_proj": Style(),
    "local_params": Style(),
}


@dataclass(frozen=True)
class Limit:
    """What keeps a degree from being legal: it has to divide `count`. what: `count` of these."""

    what: str
    count: int


# ------------------------------------------------------------------ the plan
def styles_of(skeleton: Skeleton, rounds: bool = False) -> dict[str, Style]:
    """Name of a module, or of a fused weight of experts -> its style, of all that have one.

    rounds: whether more is rounded at run time than the directory says, such as a cache.

    Errors: a model without a plan, one whose plan cuts nothing inside its blocks, a style that qlab
    does not know, or one at what it cannot cut.
    """
    model, kind = skeleton.model, skeleton.checkpoint.raw.get("model_type")
    plan = getattr(model, "tp_plan", None) or {}
    names = [name for name, _ in model.named_modules()]
    names += [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    named = {name: plan[generic(name)] for name in names if generic(name) in plan}
    for name, style in named.items():
        if style not in STYLES:
            raise QlabError(
                f"{generic(name)} has the tensor parallel style {style!r}, which qlab does not "
                "know; run the model in one process"
            )
    styles = {name: _turned(model, name, STYLES[style]) for name, style in named.items()}
    inside = tuple(f"{path}." for path in skeleton.blocks)
    if not any(style.axis and name.startswith(inside) for name, style in styles.items()):
        raise QlabError(
            f"transformers has no tensor parallel plan for the blocks of {kind} models; run this "
            "one in one process"
        )
    for name, style in styles.items():
        _refuse_uncuttable(model, name, style)
    # A sum over ranks is rounded in another order: it would move an input, or a key, to the next
    # code, and that soon all behind it.
    checkpoint = skeleton.checkpoint
    says = any(extra.attended and extra.applied for extra in checkpoint.extras)
    rounds = rounds or says or bool(checkpoint.inputs)
    return {
        name: replace(style, axis="o", whole=True)
        if rounds and style.axis == "k" and style.packed == 1 and _is_module(skeleton, name)
        else style
        for name, style in styles.items()
    }


def _is_module(skeleton: Skeleton, name: str) -> bool:
    """Whether a weight is multiplied by a module of its own, which takes the inputs of all ranks;
    that of experts is a parameter where it has no codes."""
    if not skeleton.names.fused(name):
        return True
    pieces = skeleton.names.pieces(name)
    return any(skeleton.checkpoint.quantized.get(piece.module) for piece in pieces)


def generic(name: str) -> str:
    """A name with a star in the place of each number, as plans write it."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _turned(model: nn.Module, name: str, style: Style) -> Style:
    """The style of the weight as codes have it, [o, k]: some experts are [e, k, o] in the model."""
    owner = model.get_submodule(name.rpartition(".")[0])
    is_fused = style.axis is not None and name.rpartition(".")[2] in owner._parameters
    if not is_fused:
        return style
    turned: Axis = "k" if style.axis == "o" else "o"
    # the sum is that of the module of all experts, which has a style of its own
    return replace(
        style, axis=turned if getattr(owner, "is_transposed", False) else style.axis, behind=None
    )


def _refuse_uncuttable(model: nn.Module, name: str, style: Style) -> None:
    if style.axis is None:
        return
    owner, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    fused = owner._parameters.get(key)
    has_biases = fused is not None and f"{key}_bias" in owner._parameters
    if has_biases or not (fused is not None or isinstance(_at(model, name), LEAVES)):
        what = "experts with biases" if has_biases else f"a {type(_at(model, name)).__name__}"
        raise QlabError(
            f"{generic(name)} is {what}, which qlab does not cut for several ranks; run the model "
            "in one process"
        )


LEAVES = (nn.Linear, nn.Embedding)


def _at(model: nn.Module, name: str) -> Any:
    owner = model.get_submodule(name.rpartition(".")[0])
    return getattr(owner, name.rpartition(".")[2])


# ------------------------------------------------------------------ the degrees
def degrees(model: Checkpoint | Skeleton) -> tuple[int, ...]:
    """Over how many ranks a directory can run, in rising order, from headers alone.

    Errors: a model whose plan qlab cannot follow (`styles_of`).
    """
    skeleton = model if isinstance(model, Skeleton) else Skeleton(model, model.dtype)
    return _divisors(limits(skeleton, styles_of(skeleton)))


def _divisors(found: tuple[Limit, ...]) -> tuple[int, ...]:
    common = math.gcd(*(limit.count for limit in found))
    return tuple(n for n in range(1, common + 1) if common % n == 0)


def refuse_degree(limits: tuple[Limit, ...], world: int) -> None:
    """Refuse a number of ranks that is not legal, with those that are."""
    broken = [limit for limit in limits if limit.count % world]
    if broken:
        legal = ", ".join(map(str, _divisors(limits)))
        raise QlabError(
            f"{broken[0].count} {broken[0].what} cannot be divided over {world} ranks; run it on "
            f"{legal}"
        )


def limits(skeleton: Skeleton, styles: Mapping[str, Style]) -> tuple[Limit, ...]:
    """What a degree has to divide, each once: heads, and the scales along what is cut. What is
    gathered outside of the blocks, such as logits, may be in unequal parts and limits nothing."""
    inside = tuple(f"{path}." for path in skeleton.blocks)
    found: dict[Limit, None] = {}
    for name, style in styles.items():
        limits_ranks = style.axis is not None and (style.is_open or name.startswith(inside))
        if limits_ranks and not isinstance(_at(skeleton.model, name), nn.Embedding):
            found |= dict.fromkeys(_limits_of(skeleton, name, style))
    return tuple(found)


def _limits_of(skeleton: Skeleton, name: str, style: Style) -> Iterator[Limit]:
    """What a degree has to divide because of one weight."""
    if style.is_open:
        yield from _heads(skeleton, name)
    if style.whole:  # engines cut it as the plan does
        yield from _limits_of_parts(skeleton, name, replace(style, axis="k", whole=False))
    if not style.whole or parts_of(skeleton, name, style)[1] > 1:
        yield from _limits_of_parts(skeleton, name, style)


def _limits_of_parts(skeleton: Skeleton, name: str, style: Style) -> Iterator[Limit]:
    """What a degree has to divide so that groups stay whole along the axis that is cut."""
    size, unit = parts_of(skeleton, name, style)
    what = f"{'outputs' if style.axis == 'o' else 'inputs'} of {generic(name)}"
    if size % unit:
        yield Limit(f"last group of the {size} {what}, which {unit} does not divide,", 1)
    else:
        yield Limit(what if unit == 1 else f"groups of {unit} {what}", size // unit)
    if style.axis == "k":
        yield from _limits_of_inputs(skeleton, name)


def _heads(skeleton: Skeleton, name: str) -> Iterator[Limit]:
    """The heads of the attention that a linear belongs to, if it does."""
    attention, path = _attention_around(skeleton.model, name)
    if attention is None:
        return
    config = getattr(attention, "config", skeleton.model.config.get_text_config())
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise QlabError(
            f"{generic(path)} does not say how many heads it has, so that qlab cannot cut it "
            "between them; run the model in one process"
        )
    groups = getattr(attention, "num_key_value_groups", None)
    shared = heads // groups if groups else getattr(config, "num_key_value_heads", None)
    yield Limit(f"key-value heads of {generic(path)}", shared or heads)
    yield Limit(f"heads of {generic(path)}", heads)


def _attention_around(model: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """The innermost attention that has a module, and its name."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        is_named = "attention" in type(module).__name__.lower()
        if is_named or hasattr(module, "num_key_value_groups"):
            return module, path
    return None, ""


def parts_of(skeleton: Skeleton, name: str, style: Style) -> tuple[int, int]:
    """(channels along the axis that is cut, of one of the packed weights; how many of them stay
    together)."""
    is_fused = skeleton.names.fused(name)
    weight = name if is_fused else f"{name}.weight"
    shape = skeleton.model.get_parameter(weight).shape[-2:]
    owner = skeleton.model.get_submodule(name.rpartition(".")[0])
    turned = is_fused and getattr(owner, "is_transposed", False)
    o, k = (shape[1], shape[0]) if turned else (shape[0], shape[1])
    pieces = skeleton.names.pieces(weight)
    specs = {skeleton.checkpoint.quantized.get(piece.module) for piece in pieces} - {None}
    if style.axis == "o":
        units = [spec.tile.rows or 1 for spec in specs if spec]
        matrices = () if is_fused or style.whole else map(matrix_of, at_output(skeleton, name))
    else:
        units, matrices = [spec.tile.cols or 1 for spec in specs if spec], ()
    units += [M.shape[-1] for M in matrices if M is not None]
    return (o if style.axis == "o" else k) // style.packed, math.lcm(*units)


def _limits_of_inputs(skeleton: Skeleton, name: str) -> Iterator[Limit]:
    """What keeps the inputs of a weight together beside its own scales: groups that are rounded
    together."""
    checkpoint, k = skeleton.checkpoint, parts_of(skeleton, name, Style("k"))[0]
    for module in skeleton.names.modules(name):
        inputs = checkpoint.inputs.get(module)
        cols = None if inputs is None else inputs.spec.tile.cols
        if cols is None:
            continue
        count = k // cols if k % cols == 0 else 1
        yield Limit(f"groups of {cols} inputs of {generic(name)} that are rounded together", count)


def mixed_inputs(skeleton: Skeleton, styles: Mapping[str, Style], world: int) -> frozenset[str]:
    """The weights that the plan cuts by inputs, and whose input is multiplied at run time with a
    matrix over channels of several ranks."""

    def is_mixed(name: str, style: Style) -> bool:
        width = parts_of(skeleton, name, replace(style, axis="k"))[0] // world
        matrices = [matrix_of(op) for op in at_input(skeleton, name)]
        return any(M is not None and (M.ndim > 2 or width % M.shape[-1] != 0) for M in matrices)

    cut = {
        name: style
        for name, style in styles.items()
        if (style.axis == "k" or style.whole) and not style.splits
    }
    return frozenset(name for name, style in cut.items() if is_mixed(name, style))
