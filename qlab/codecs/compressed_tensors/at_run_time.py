"""What happens at run time at modules, written: rotations go to transform_config, roundings of keys
and values to kv_cache_scheme, and those of queries, keys and values to a config group of attention
modules. A rotation comes before a rounding, as readers compute them. How the input of a linear is
rounded lies beside its weight (`activations.py`).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import QuantizeInput, matrix_of
from qlab.codecs.around import Places, Rows, hash_of_numbers
from qlab.codecs.compressed_tensors import attended, rotations
from qlab.codecs.compressed_tensors.cache import CACHED, KEY
from qlab.errors import QlabError

ATTENDED = ("query", "key", "value")
PLACES = ("input", "output", *ATTENDED)
GROUP = "attention"  # the config group of attention modules
Row = dict[str, Any]


# ------------------------------------------------------------------ what is held
def refusal(places: Places) -> str | None:
    """Why a directory cannot hold what happens at a module, or None."""
    for place, ops in places.items():
        reason = _refusal_at(place, ops)
        if reason:
            return reason
    query, key = (_rotation(places.get(place, ())) for place in ("query", "key"))
    turn_alike = query is key or (query is not None and key is not None and torch.equal(query, key))
    if not turn_alike:
        return (
            "compressed-tensors turns queries and keys of an attention together, by one matrix; "
            "use rotate_scores"
        )
    return _refusal_of_roundings(places)


def _refusal_at(place: str, ops: Sequence[Op]) -> str | None:
    turns = [op for op in ops if matrix_of(op) is not None]
    rounding = _rounding(ops)
    if place not in PLACES or (place == "value" and turns):
        return f"compressed-tensors has no place for {_named(ops)} there"
    expected = [*turns[:1], *([rounding] if rounding else [])]
    in_order = len(ops) == len(expected) and all(a is b for a, b in zip(ops, expected))
    if not in_order or (place == "output" and rounding):
        return f"compressed-tensors turns a value once and then rounds it, not {_named(ops)}"
    reason = rotations.refusal(turns[0], place) if turns else None
    if reason or rounding is None or place not in ATTENDED:
        return reason
    return attended.refusal(rounding)


def _refusal_of_roundings(places: Places) -> str | None:
    """Why queries, keys and values of an attention are not rounded so in a directory, or None."""
    roundings = {place: _rounding(places.get(place, ())) for place in ATTENDED}
    rounded = {place: op for place, op in roundings.items() if op is not None}
    if tuple(rounded) not in ((), CACHED, ATTENDED):
        return (
            "compressed-tensors rounds keys and values, or queries too, and not "
            f"{', '.join(rounded)} alone; round what a whole attention reads (kv_cache, "
            "attention_inputs)"
        )
    args = [attended.args_of(op) for op in rounded.values()]
    if any(each != args[0] for each in args):
        return "compressed-tensors rounds keys, values and queries of an attention alike"
    return None


def _refusal_of_another(module: str, places: Places) -> str | None:
    """Why a directory cannot hold what happens at a second attention of a module ("self_attn#2"),
    or None. Files know the module alone."""
    roundings = {place: _rounding(ops) for place, ops in places.items()}
    stored = any(op.scales is not None for op in roundings.values() if op is not None)
    if "#" not in module or not (stored or roundings.get("query")):
        return None
    return (
        "several attentions run in one module there, for which compressed-tensors has one scale; "
        "round keys and values to groups of the channels of a head (kv_cache with -g and a size), "
        "or evaluate the recipe with qlab.apply"
    )


def _rotation(ops: Sequence[Op]) -> Tensor | None:
    return next((matrix_of(op) for op in ops if matrix_of(op) is not None), None)


def _rounding(ops: Sequence[Op]) -> QuantizeInput | None:
    return next((op for op in ops if isinstance(op, QuantizeInput)), None)


def _named(ops: Sequence[Op]) -> str:
    return " and ".join(type(op).__name__ for op in ops)


# ------------------------------------------------------------------ tensors
def encode(modules: Mapping[str, Places]) -> tuple[dict[str, Tensor], Rows]:
    """The tensors of what happens at the modules of a block, and its rows. A matrix that several of
    them use is written once.

    A row of a place is a list of its operations: {"rotated": type of the matrix, "group", "size",
    "precision"} or {"rounded": QuantizationArgs}, with the name and the hash of its tensor.
    """
    block = _Block()
    rows: dict[str, dict[str, list[Row]]] = {}
    for module, places in modules.items():
        reason = refusal(places) or _refusal_of_another(module, places)
        if reason:
            raise QlabError(f"{module}: {reason}")
        rows[module] = {}
        for place in (place for place in PLACES if places.get(place)):
            steps = [block.row(module, place, op) for op in places[place]]
            rows[module][place] = [step for step in steps if step]
    return block.tensors, rows


class _Block:
    """The tensors of one block, which operations join one after the other."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._matrices: list[tuple[str, Tensor, Row]] = []  # location, matrix, its row

    def row(self, module: str, place: str, op: Op) -> Row:
        """The row of one operation. Empty for what lies beside the weight of a linear."""
        M = matrix_of(op)
        if M is not None:
            return self._rotation(module, place, M)
        if place not in ATTENDED:
            return {}
        assert isinstance(op, QuantizeInput)  # refused otherwise
        row: Row = {"rounded": attended.args_of(op)}
        for name, scales in attended.encode(f"{module}.{attended.SCALES[place]}", op).items():
            self.tensors[name] = scales
            row |= {"tensor": name, "sha256": hash_of_numbers(scales)}
        return row

    def _rotation(self, module: str, place: str, M_nn: Tensor) -> Row:
        """The row of a matrix: that of an equal one at such a place, or its own."""
        location = "attention" if place in ATTENDED else place
        for where, matrix, row in self._matrices:
            if where == location and torch.equal(matrix, M_nn):
                return row
        kind, stored = rotations.encode(M_nn)
        name = rotations.tensor_of(module, place)
        self.tensors[name] = stored
        row = {
            "rotated": kind,
            "group": rotations.name_of(module, place),
            "tensor": name,
            "size": len(stored),
            "precision": str(M_nn.dtype),
            "sha256": hash_of_numbers(stored),
        }
        self._matrices.append((location, M_nn, row))
        return row


# ------------------------------------------------------------------ configuration
def config(rows: Rows, attentions: Collection[str]) -> dict[str, Any]:
    """The keys of quantization_config that say what happens at the modules, and for attention
    modules whose queries are rounded a config group.

    attentions: the modules of all attentions, of which kv_cache_scheme means every one.
    """
    said = rotations.config(rows)
    args: dict[str, Mapping[str, Any]] = {}
    for module, row in rows.items():
        rounded = _args(row)
        if rounded is not None:
            args[module] = rounded
    queried = [module for module in args if _rounds(rows[module].get("query", ()))]
    cached = [module for module in args if module not in queried]
    for modules in (cached, queried):
        differing = [module for module in modules if args[module] != args[modules[0]]]
        if differing:
            raise QlabError(
                f"{modules[0]} and {differing[0]} round keys and values in different ways, and "
                "compressed-tensors rounds them alike in all attentions; give all of them one spec"
            )
    left = sorted(set(attentions).difference(cached))
    if cached and left:
        raise QlabError(
            f"{left[0]} does not round its keys and values as {cached[0]} does, and "
            "compressed-tensors rounds them in all attentions or in none; round them everywhere"
        )
    if cached:
        said[KEY] = args[cached[0]]
    if queried:
        said["config_groups"] = {GROUP: _group(sorted(queried), args[queried[0]])}
    return said


def _args(row: Mapping[str, Sequence[Mapping[str, Any]]]) -> Mapping[str, Any] | None:
    """The QuantizationArgs of what a module's attention reads, if that is rounded."""
    return next((step["rounded"] for step in row.get("key", ()) if "rounded" in step), None)


def _rounds(steps: Sequence[Mapping[str, Any]]) -> bool:
    return any("rounded" in step for step in steps)


def _group(targets: list[str], args: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": None,
        "input_activations": args,
        "output_activations": None,
        "targets": targets,
        "weights": None,
    }
