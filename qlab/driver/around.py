"""What happens at run time at the modules of a model beside the rounding of a linear's input, as
the format that is written holds it."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qlab.algebra.graph import Code, ModuleGraph, Op
from qlab.algebra.online import QuantizeInput, matrix_of
from qlab.algebra.wires import Wire, wires
from qlab.codecs import Codec
from qlab.codecs.around import SECTION, Places, Rows
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.online import attentions, within
from qlab.model.skeleton import Skeleton

LINEAR = {"in": "input", "out": "output"}  # kind of a wire at a site -> the place
EXPERTS = (
    "the input of fused experts, which are many modules in files, turns at run time; leave experts "
    "out of it (at, rules)"
)


def place_of(path: str, code: Code, wire: Wire) -> tuple[str, str] | None:
    """The module of the model and its place at which a wire is; None of wires that enter or leave
    the block."""
    if wire.site is not None:
        return within(path, wire.site.path), LINEAR[wire.kind]
    return (within(path, wire.owner), wire.kind) if wire.of_attention else None


def places_of(
    path: str, code: Code, inserts: Mapping[str, tuple[Op, ...]]
) -> dict[str, dict[str, tuple[Op, ...]]]:
    """Module of the model -> what happens at its places, of the inserts of a block. The rounding of
    a linear's input by itself is no part of it: formats hold it beside the weight."""
    found: dict[str, dict[str, tuple[Op, ...]]] = {}
    for name, wire in wires(code).items():
        at, ops = place_of(path, code, wire), inserts.get(name, ())
        plain_input = wire.kind == "in" and all(isinstance(op, QuantizeInput) for op in ops)
        if ops and at and not plain_input:
            found.setdefault(at[0], {})[at[1]] = ops
    return found


def held(graph: ModuleGraph, codec: Codec) -> tuple[dict[str, Places], ModuleGraph]:
    """What the format holds of what happens at the modules of a block, and the block without that.

    Refuses rotations and roundings that the format has no place for. Operations of other kinds, and
    all of a format without such places, stay in the block.
    """
    if codec.around is None:
        return {}, graph
    taken: dict[str, Places] = {}
    left = dict(graph.inserts)
    routed = {graph.where(site) for site in graph.code.sites if site.route}
    for module, places in places_of(graph.path, graph.code, graph.inserts).items():
        if not all(_is_known(op) for op in sum(places.values(), ())):
            continue
        reason = EXPERTS if module in routed else codec.around.refusal(places)
        if reason:
            raise QlabError(f"{module} still needs an operation at run time: {reason}")
        taken[module] = places
    for name, wire in wires(graph.code).items():
        at = place_of(graph.path, graph.code, wire)
        if at and at[0] in taken and wire.kind != "in":
            left.pop(name, None)
    return taken, graph.with_inserts(left)


def _is_known(op: Op) -> bool:
    return isinstance(op, QuantizeInput) or matrix_of(op) is not None


def encoded(
    skeleton: Skeleton, modules: Mapping[str, Places], codec: Codec
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors in the files of what happens at the modules of a block, and its section of the
    notes."""
    if not modules or codec.around is None:
        return {}, {}
    named = {called(skeleton, module)[-1]: places for module, places in modules.items()}
    tensors, rows = codec.around.encode(named)
    return tensors, {SECTION: rows}


def called(skeleton: Skeleton, module: str) -> tuple[str, ...]:
    """What readers call a module: in the model's spelling and, last, in that of the files."""
    if f"{module}.weight" in dict(skeleton.model.named_parameters(remove_duplicate=False)):
        return skeleton.names.modules(module)
    return skeleton.names.spellings_of(module)


def told(skeleton: Skeleton, rows: Rows, codes: Mapping[str, Code], codec: Codec) -> dict[str, Any]:
    """What the configuration says of the rows of all blocks, by every name of a module."""
    if not rows or codec.around is None:
        return {}
    attending = [name for path, code in codes.items() for name in attentions(path, code)]
    linears = [name for name in skeleton.names.linears()]
    names = {called(skeleton, name)[-1]: called(skeleton, name) for name in [*attending, *linears]}
    by_name = {name: row for module, row in rows.items() for name in names[module]}
    every = [name for module in attending for name in called(skeleton, module)]
    return codec.around.config(by_name, every)


def refuse_misread(written: Checkpoint, rows: Rows, codec: Codec) -> None:
    """Refuse a complete directory in which something else happens at a module than the rows say."""
    for module, places in rows.items():
        there = {
            place: written.around(module, place, _size(steps)) for place, steps in places.items()
        }
        assert codec.around is not None  # which wrote the rows
        _, read = codec.around.encode({module: there})
        for place, steps in places.items():
            if _numbers(read[module].get(place, ())) != _numbers(steps):
                raise QlabError(f"the {place} of {module} is turned or rounded in another way")


def _size(steps: Sequence[Mapping[str, Any]]) -> int:
    """The channels that the matrix among the operations turns."""
    return next((step["size"] for step in steps if "size" in step), 1)


def _numbers(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is done, without the names under which it is stored."""
    return [
        {key: value for key, value in step.items() if key not in ("group", "tensor")}
        for step in steps
    ]
