"""What a segment is called with, taken apart into leaves and put together again.

Lists, tuples and dictionaries come apart as in PyTorch's pytrees. So does any other object by its
attributes: a cache, or a dictionary of a kind of its own, in which blocks leave tensors for later
ones.
"""

from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import SymBool, SymFloat, SymInt, Tensor, nn
from torch.utils import _pytree as pytree

FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
SIZES = (SymInt, SymFloat, SymBool)  # their attributes lead to everything that is being traced
WHOLE = (Tensor, nn.Module, type, ModuleType, Enum, *FUNCTIONS, *SIZES)


@dataclass(frozen=True)
class Form:
    """How leaves are put together. objects: per leaf of `spec`, the object that it stands for, or
    None."""

    spec: pytree.TreeSpec
    objects: tuple["_Object | None", ...]


@dataclass(frozen=True)
class _Object:
    kind: Any  # its class
    content: Form
    leaves: int


def take_apart(tree: Any) -> tuple[list[Any], Form]:
    """The leaves of arguments, in order, and their form."""
    return _take_apart(tree, ())


def _take_apart(tree: Any, above: tuple[int, ...]) -> tuple[list[Any], Form]:
    outer, spec = pytree.tree_flatten(tree)
    leaves: list[Any] = []
    objects: list[_Object | None] = []
    for leaf in outer:
        if not _opens(leaf) or id(leaf) in above:
            leaves.append(leaf)
            objects.append(None)
            continue
        inner, form = _take_apart(_content(leaf), (*above, id(leaf)))
        leaves += inner
        objects.append(_Object(type(leaf), form, len(inner)))
    return leaves, Form(spec, tuple(objects))


def put_together(leaves: list[Any], form: Form) -> Any:
    """Arguments of this form: the inverse of `take_apart`, with lists, dictionaries and objects of
    their own."""
    outer, at = [], 0
    for spec in form.objects:
        if spec is None:
            outer.append(leaves[at])
            at += 1
            continue
        outer.append(_rebuilt(spec, put_together(leaves[at : at + spec.leaves], spec.content)))
        at += spec.leaves
    return pytree.tree_unflatten(outer, form.spec)


def take_over(former: Any, changed: Any) -> Any:
    """What is held, with the content of what it was changed into; lists, dictionaries and objects
    stay themselves."""
    if type(former) is not type(changed):
        return changed
    if isinstance(former, tuple) and len(former) == len(changed):
        parts = [take_over(a, b) for a, b in zip(former, changed)]
        return type(former)._make(parts) if hasattr(former, "_make") else type(former)(parts)
    if isinstance(former, dict):
        entries = {key: take_over(former.get(key), value) for key, value in changed.items()}
        former.clear()
        former.update(entries)
    elif isinstance(former, list):
        former[:] = [take_over(a, b) for a, b in zip_longest(former, changed)][: len(changed)]
    elif not _opens(former):
        return changed
    if _opens(former):
        attributes = {
            key: take_over(vars(former).get(key), value) for key, value in vars(changed).items()
        }
        vars(former).clear()
        vars(former).update(attributes)
    return former


def _opens(thing: Any) -> bool:
    return hasattr(thing, "__dict__") and not isinstance(thing, WHOLE)


def _content(thing: Any) -> tuple[dict[str, Any], Any]:
    """An object's attributes, and its entries where it is a dictionary or a list as well."""
    entries = (
        dict(thing) if isinstance(thing, dict) else list(thing) if isinstance(thing, list) else None
    )
    return dict(vars(thing)), entries


def _rebuilt(spec: _Object, content: tuple[dict[str, Any], Any]) -> Any:
    attributes, entries = content
    thing = spec.kind.__new__(spec.kind)
    vars(thing).update(attributes)
    if isinstance(thing, dict):
        dict.update(thing, entries)
    elif isinstance(thing, list):
        thing[:] = entries
    return thing
