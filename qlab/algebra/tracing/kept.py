"""What a segment keeps: tensors that a run leaves in attributes of its modules, or in objects and
classes that these hold."""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from qlab.errors import QlabError

Path = tuple[Any, ...]  # attributes, keys and places, one inside the other
CLOSED = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    torch.dtype,
    torch.device,
    Enum,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    ModuleType,
)


def tensors_held(segment: nn.Module) -> dict[Path, tuple[int, int]]:
    """Where a segment's tensors are, each with what changes when another takes its place or when it
    is written to."""
    return {
        path: (id(thing), thing._version)
        for path, thing in _reached(segment)
        if isinstance(thing, Tensor)
    }


def kept(before: Mapping[Path, tuple[int, int]], segment: nn.Module) -> tuple[Path, ...]:
    """Where tensors came or changed since."""
    return tuple(path for path, now in tensors_held(segment).items() if before.get(path) != now)


def holder(segment: nn.Module, path: Path) -> Any:
    """The innermost thing on a path that a segment had before it ran, without the tensor itself."""
    thing: Any = segment
    for step in path[:-1]:
        inner = dict(_parts(thing)).get(step)
        if inner is None:
            break
        thing = inner
    return thing


def refuse_shared(blocks: Mapping[str, nn.Module], path: str, kept: Iterable[Path]) -> None:
    """Refuse a block that leaves a tensor where another block may look for it."""
    for where in kept:
        owner = holder(blocks[path], where)
        for other, block in blocks.items():
            if other != path and any(thing is owner for _, thing in _reached(block)):
                name = owner.__name__ if isinstance(owner, type) else type(owner).__name__
                raise QlabError(
                    f"{path} leaves a tensor in {name}.{where[-1]}, which {other} holds too; qlab "
                    "streams models whose blocks hand on what they return, or leave in their "
                    "arguments"
                )


def _reached(root: Any) -> Iterator[tuple[Path, Any]]:
    seen = {id(root)}
    ahead: list[tuple[Path, Any]] = [((), root)]
    while ahead:
        path, thing = ahead.pop()
        yield path, thing
        for step, part in _parts(thing):
            if isinstance(part, Tensor):
                yield (*path, step), part
            elif id(part) not in seen and not isinstance(part, CLOSED):
                seen.add(id(part))
                ahead.append(((*path, step), part))


def _parts(thing: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(thing, (Tensor, *CLOSED)):
        return
    if isinstance(thing, dict):
        yield from list(thing.items())
    if isinstance(thing, list | tuple):
        yield from enumerate(thing)
    if isinstance(thing, type):
        yield from ((n, v) for n, v in vars(thing).items() if isinstance(v, Tensor | dict | list))
        return
    yield from list(getattr(thing, "__dict__", {}).items())
    if isinstance(thing, nn.Module):
        yield "its class", type(thing)
