"""The operations at run time, as the files' configuration names them: the input of a linear is
rotated and then rounded, its output is rotated; what an attention reads is rotated and rounded."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qlab.algebra.graph import Code, Op
from qlab.algebra.online import QuantizeInput
from qlab.algebra.wires import Wire, wires
from qlab.errors import QlabError, warn
from qlab.model.skeleton import Skeleton


def at_input(skeleton: Skeleton, site: str) -> tuple[Op, ...]:
    """The operations on a site's input. Fused experts have one input, which all of them must round
    alike."""
    checkpoint = skeleton.checkpoint
    modules = [name for name in skeleton.names.modules(site) if name in checkpoint.inputs]
    specs = {checkpoint.inputs[name] for name in modules}
    fused = skeleton.names.fused(site)
    if fused and len(specs) > 1:
        raise QlabError(
            f"{site}: its experts round their inputs in ways of their own "
            f"({', '.join(map(str, specs))}); qlab reads experts whose inputs are rounded with "
            "one spec"
        )
    rounding = checkpoint.rounding(modules[-1]) if modules else ()
    if fused and any(spec.static for spec in specs):
        _refuse_scales_apart(site, [checkpoint.rounding(name) for name in modules])
    return _rotation(skeleton, site, "input") + rounding


def _refuse_scales_apart(site: str, roundings: Sequence[tuple[Op, ...]]) -> None:
    """Refuse stored scales that differ between experts, whose rows are rounded together."""
    first, *others = map(_stored, roundings)
    if not all(all(map(torch.equal, first, other)) for other in others):
        raise QlabError(
            f"{site}: its experts store input scales that differ; qlab reads experts that share "
            "one scale for their inputs"
        )


def _stored(ops: Sequence[Op]) -> list[Tensor]:
    """What is stored of the rounding of an input."""
    roundings = [op for op in ops if isinstance(op, QuantizeInput)]
    return [t for op in roundings for t in (op.scales, op.zeros, op.outer) if t is not None]


def at_output(skeleton: Skeleton, site: str) -> tuple[Op, ...]:
    """The operations on a site's output."""
    return _rotation(skeleton, site, "output")


def at_attentions(skeleton: Skeleton, path: str, code: Code) -> dict[str, tuple[Op, ...]]:
    """Wire -> the operations on it, of all that the attentions of a block read."""
    found: dict[str, tuple[Op, ...]] = {}
    if not skeleton.checkpoint.extras:
        return found
    seen: set[str] = set()
    for module, read in attentions(path, code).items():
        channels = {place: wire.channels // wire.heads for place, wire in read.items()}
        for name in skeleton.names.spellings_of(module):
            places = skeleton.checkpoint.attended(name, channels)
            found |= {read[place].name: ops for place, ops in places.items()}
            seen.add(name)
    _warn_of_others(skeleton, path, seen)
    return found


def _warn_of_others(skeleton: Skeleton, path: str, seen: set[str]) -> None:
    """Warn of attentions of a block whose keys and values are rounded and that its program does not
    show."""
    inside = tuple(f"{name}." for name in skeleton.names.spellings_of(path))
    for extra in skeleton.checkpoint.extras:
        owners = {name.rpartition(".")[0] for name in extra.tensors}
        hidden = sorted(name for name in owners - seen if name.startswith(inside))
        if hidden and extra.applied and extra.attended:
            warn(
                f"{skeleton.checkpoint.path}: {extra.says}, which qlab does not do in "
                f"{', '.join(hidden)}, whose attention the traced program does not show"
            )


def attentions(path: str, code: Code) -> dict[str, dict[str, Wire]]:
    """Module of the model -> what its attention reads, by kind, of every attention that the program
    of a block shows."""
    found: dict[str, dict[str, Wire]] = {}
    for wire in wires(code).values():
        if wire.of_attention:
            found.setdefault(within(path, wire.owner), {})[wire.kind] = wire
    return found


def within(path: str, module: str) -> str:
    """The name in the model of a module of a block; of the block itself, where that is ""."""
    return ".".join(part for part in (path, module) if part)


def _rotation(skeleton: Skeleton, site: str, location: str) -> tuple[Op, ...]:
    """The rotation of a site's "input" or "output"; the configuration may name the linear in the
    model's spelling or in the files'."""
    experts = skeleton.names.fused(site)
    if not experts and not isinstance(skeleton.model.get_submodule(site), nn.Linear):
        return ()
    o, k = skeleton.model.get_parameter(site if experts else f"{site}.weight").shape[-2:]
    channels = k if location == "input" else o
    rotations = (
        skeleton.checkpoint.rotations(name, location, channels)
        for name in dict.fromkeys(skeleton.names.modules(site))
    )
    around = [ops for ops in rotations if ops]
    if experts and around:
        raise QlabError(
            f"{site} has an {location} that is rotated at run time, which qlab does not do to "
            "experts"
        )
    return around[0] if around else ()
