"""Traced programs, shared within a process.

Tracing is most of the work on a small model, and a block would be traced again wherever its model
is opened again. Two segments share a program only if nothing tells them apart: what they are made
of, the form of their inputs, and every operation that they run on these inputs. The last sees what
no attribute shows, such as a function that was replaced.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from enum import Enum
from threading import Lock
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qlab.algebra.graph import Code, tensors_of
from qlab.algebra.tracing.as_it_is import UntracedModules, stood_in, untraced_modules
from qlab.algebra.tracing.kept import kept, tensors_held
from qlab.algebra.tracing.on_meta import OnMeta, on_meta
from qlab.algebra.tracing.on_tensors import OnTensors, without_values
from qlab.algebra.tracing.trace import trace
from qlab.process.surroundings import foreign

KEPT = 64  # programs; one of a common block takes about a megabyte
BY_IDENTITY = (type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device, Enum)
_kept: OrderedDict[Hashable, Code] = OrderedDict()
_untraced: OrderedDict[Hashable, UntracedModules] = OrderedDict()  # of segments that are alike
_lock = Lock()


def program(
    segment: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    path: str,
    index: int = -1,
    ignored: frozenset[str] = frozenset(),
) -> Code:
    """The program of a segment called with these inputs, from an earlier trace where there is one.

    path: names the segment in errors. index: its own number among its like; where an attribute
    holds it, the operations alone say whether it matters. ignored: attributes that say where a
    model comes from, and not what it computes. Errors: those of `trace`.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    look = _Look(segment, index, ignored)
    alike = look(segment), spec, tuple(_input(leaf, look) for leaf in leaves)

    def runs(untraced: UntracedModules) -> tuple[Hashable, str | None]:
        """What the untraced modules are made of, their index too, and the operations of the
        rest."""
        modules = {name: segment.get_submodule(name) for name in untraced}
        looks = tuple((name, _Look(m, None, ignored)(m)) for name, m in modules.items())
        with foreign:
            return looks, operations(stood_in(segment, untraced), args, kwargs)

    whole = runs({})
    with _lock:
        untraced = _untraced.get((alike, whole), {})
    run = runs(untraced) if untraced else whole
    with _lock:
        code = _kept.get((alike, run))
        if code is not None:
            _kept.move_to_end((alike, run))
            return code
    code = trace(segment, args, kwargs, path, untraced).code
    untraced_now = untraced_modules(code)
    if untraced_now.keys() != untraced.keys():
        run = runs(untraced_now)
    if run[1] is None:  # what such a segment does is known to its own trace only
        return code
    with _lock:
        if untraced_now:
            _remember(_untraced, (alike, whole), untraced_now)
        return _remember(_kept, (alike, run), code)


def _remember(remembered: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> Any:
    """The value of a key: the first that was given."""
    value = remembered.setdefault(key, value)
    while len(remembered) > KEPT:
        remembered.popitem(last=False)
    return value


def _input(leaf: Any, look: "_Look") -> Hashable:
    """The form of one input. Its sizes belong to it: for others a segment may do something else."""
    return (leaf.dtype, leaf.shape, leaf.stride()) if isinstance(leaf, Tensor) else look(leaf)


class _Look:
    """What a segment is made of, as a value: equal where every class, attribute and shape is equal.

    Parameters and buffers enter a program as inputs, so their values are no part of it. Those of
    other tensors are.
    """

    def __init__(self, segment: nn.Module, index: int | None, ignored: frozenset[str]):
        self.index, self.ignored = index, ignored
        self.lifted = {id(t) for t in (*segment.parameters(), *segment.buffers())}
        self.above: list[int] = []
        # Holds the object, so that its id stays its own.
        self.seen: dict[int, tuple[Any, Hashable]] = {}

    def __call__(self, thing: Any) -> Hashable:
        if thing is None or isinstance(thing, bool | int | float | complex | str | bytes):
            return type(thing), repr(thing)
        if isinstance(thing, BY_IDENTITY):
            return thing
        if id(thing) in self.above:
            return "again", len(self.above) - self.above.index(id(thing))
        if id(thing) not in self.seen:
            self.above.append(id(thing))
            self.seen[id(thing)] = thing, self._parts(thing)
            self.above.pop()
        return self.seen[id(thing)][1]

    def _parts(self, thing: Any) -> Hashable:
        if isinstance(thing, Tensor):
            form = type(thing), thing.dtype, tuple(thing.shape)
            if id(thing) in self.lifted or thing.is_meta:
                return form
            return (*form, _values(thing)) if type(thing) is Tensor else _Itself(thing)
        if type(thing) in (list, tuple, torch.Size):
            return type(thing), tuple(self(part) for part in thing)
        if type(thing) in (set, frozenset):
            return type(thing), frozenset(self(part) for part in thing)
        if type(thing) in (dict, OrderedDict):
            return type(thing), self._entries(thing)
        try:
            reduced = thing.__reduce_ex__(2)
        except Exception:  # whatever an object raises that cannot be taken apart
            return _Itself(thing)
        if isinstance(reduced, str):  # a global's name
            return _Itself(thing)
        maker, arguments, state, items, entries = (*reduced, None, None, None)[:5]
        if isinstance(thing, nn.Module):
            state = self._without_index(vars(thing))
        return (
            maker,
            self(arguments),
            self(state),
            self(list(items or ())),
            self(dict(entries or ())),
        )

    def _entries(self, mapping: Mapping[Any, Any]) -> Hashable:
        kept = (
            (k, v) for k, v in mapping.items() if not (isinstance(k, str) and k in self.ignored)
        )
        return tuple((self(k), self(v)) for k, v in kept)

    def _without_index(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        def is_index(name: str, value: Any) -> bool:
            named = re.search("idx|index|layer", name) is not None
            return named and type(value) is int and value == self.index

        return {name: value for name, value in attributes.items() if not is_index(name, value)}


class _Itself:
    """An object that equals itself alone, held so that no other takes its place in memory."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


def _values(t: Tensor) -> str:
    """A hash of a tensor's numbers."""
    with unset_fake_temporarily():
        octets = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return hashlib.sha256(octets.numpy().tobytes()).hexdigest()


def operations(segment: nn.Module, args: tuple, kwargs: dict[str, Any]) -> str | None:
    """A hash of every operation that a segment runs on inputs of these shapes, and of what each
    takes from which; None where it does not run on shapes alone.

    That is asked on the meta device, where operations cost least, and with tensors that have a
    place on the CPU only of a segment that does not run there.
    """
    tensors = tensors_of(args, kwargs)
    try:
        return _told(OnMeta, *on_meta(segment, tensors), args, kwargs)
    except Exception:  # whatever the segment's own forward raises
        pass
    try:
        copied, fakes = without_values(segment, tensors)
        shapes_alone = detect_fake_mode(fakes)
        return _told(lambda told: shapes_alone, copied, fakes, args, kwargs)
    except Exception:  # `trace` names it
        return None


def _told(
    within: Callable[[Any], Any],
    copied: nn.Module,
    tensors: tuple[Tensor, ...],
    args: tuple,
    kwargs: dict[str, Any],
) -> str:
    inputs = [(str(i), tensor) for i, tensor in enumerate(tensors)]
    told = _Told([*copied.named_parameters(), *copied.named_buffers(), *inputs])
    told.note("under", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
    before = tensors_held(copied)
    with torch.no_grad(), within(told.note), told:
        told.note("returns", OnTensors(copied, args, kwargs)(*tensors))
    told.note("keeps", [str(path) for path in kept(before, copied)])
    return told.hash.hexdigest()


class _Told(TorchDispatchMode):
    """Notes the operations that run under it, with a name for every tensor that they hand on."""

    def __init__(self, entering: Iterable[tuple[str, Tensor]]):
        super().__init__()
        self.hash = hashlib.sha256()
        self.alive: list[Tensor] = []  # so that the id of a named tensor stays its own
        self.names: dict[int, str] = {}
        for name, tensor in entering:
            self._call(tensor, f"enters as {name}")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        self.note(str(func), (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._call(tensor, str(len(self.alive)))
                self.note("makes", tensor)
        return out

    def note(self, operation: str, taken: Any) -> None:
        """Take down one operation, or its result."""
        leaves, spec = pytree.tree_flatten(taken)
        told = [self._one(leaf) for leaf in leaves]
        self.hash.update("\n".join([operation, str(spec), *told, ""]).encode())

    def _call(self, tensor: Tensor, name: str) -> None:
        self.alive.append(tensor)
        self.names[id(tensor)] = name

    def _one(self, leaf: Any) -> str:
        if not isinstance(leaf, Tensor):
            return f"{type(leaf).__name__} {leaf!r}"
        if id(leaf) not in self.names:  # a constant of the segment's own
            if type(leaf) is not Tensor:
                raise ValueError("a tensor without values, which nothing handed on")
            self._call(leaf, _values(leaf))
        name = self.names[id(leaf)]
        form = (leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device)
        return f"{name} {form}"
