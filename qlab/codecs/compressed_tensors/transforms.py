"""`transform_config`: groups of matrices that weights and activations are multiplied with. Source:
compressed-tensors 0.20.

{"config_groups": {group: {"type", "apply": [{"targets", "location", "inverse", "ignore"}],
"head_dim", ...}}}, with y = x @ W.T:

weight_input, weight_output: done before the weights were rounded; nothing is left of it.
input, output: x -> x @ M and y -> y @ M at run time, for every n neighbouring channels where M [n,
n] is narrower (`head_dim`). M is the tensor <module>.<group>_<location>.weight, written once for
all modules of a group that share it: +-1 for the Hadamard types, which are divided by sqrt(n),
taken in the order `perm` of rows and columns (`randomize`) and transposed by `inverse`; a
random-matrix is stored as it is used.
q_attn, k_cache: the same to every head of queries and of keys. One Hadamard matrix at both changes
no product, (q M) (k M)^T = q k^T, so that qlab leaves it out; other pairs are refused.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import MatMul
from qlab.codecs.extra import Extra
from qlab.errors import QlabError

KEY, LINEAR = "transform_config", "Linear"
HADAMARD, TYPES = ("hadamard", "random-hadamard"), ("hadamard", "random-hadamard", "random-matrix")
DONE, AROUND = ("weight_input", "weight_output"), ("input", "output")
ONLINE = (*AROUND, "q_attn", "k_cache")
GROUP_KEYS = {"type", "apply", "randomize", "requires_grad", "head_dim", "precision"}
PLACE_KEYS = {"targets", "location", "inverse", "ignore"}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Place:
    """Modules that a group's matrix belongs to, and where."""

    location: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    inverse: bool

    def __contains__(self, path: str) -> bool:
        """Whether a linear module of this path is one of them."""
        return any(_names(t, path) for t in self.targets) and not any(
            _names(t, path) for t in self.ignore
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """One kind of matrix, and its places. tensors: those of the files,
    <module>.<name>_<location>.weight."""

    name: str
    type: str
    places: tuple[Place, ...]
    head_dim: int | None
    randomize: bool
    dtype: torch.dtype
    tensors: tuple[str, ...]

    def at(self, path: str, location: str) -> list[Place]:
        """The places among them at the input or output of this linear module."""
        return [place for place in self.places if place.location == location and path in place]

    def matrix(
        self, path: str, place: Place, channels: int, tensor: Callable[[str], Tensor]
    ) -> Tensor:
        """M [n, n] for the input or output [..., channels] of a module: its own tensor, or the one
        of its size that it shares."""
        own, n = f"{path}.{self.name}_{place.location}.weight", self.head_dim or channels
        if channels % n:
            raise QlabError(
                f"{path} has {channels} {place.location} channels, which the head_dim {n} of "
                f"{KEY}'s group {self.name} does not divide; its config is wrong"
            )
        names = (
            [own]
            if own in self.tensors
            else [name for name in self.tensors if self._shared(name, place)]
        )
        found = {
            name: H
            for name in names
            if (H := tensor(name)).shape == (n, n) and H.is_floating_point()
        }
        if len(found) != 1:
            raise QlabError(
                f"{path} shares the [{n}, {n}] matrix of {KEY}'s group {self.name} with others, "
                f"and the files hold {len(found)} such matrices; the files are incomplete or "
                "damaged"
            )
        [(name, H)] = found.items()
        H = H.to(self.dtype)
        if not H.isfinite().all():
            raise QlabError(f"{name} holds NaN or Inf; the file is damaged")
        if self.randomize and self.type in HADAMARD:
            order = tensor(name.removesuffix("weight") + "perm")
            if order.is_floating_point() or not torch.equal(
                order.sort().values, torch.arange(n, dtype=order.dtype)
            ):
                raise QlabError(
                    f"{name.removesuffix('weight')}perm is no order of {n} channels; the file is "
                    "damaged"
                )
            H = H[order][:, order]
        if self.type in HADAMARD:
            H = (H.mT if place.inverse else H) / n**0.5
        return H

    def _shared(self, name: str, place: Place) -> bool:
        """Whether a place may use the matrix under this name. An inverted random matrix is another
        matrix."""
        owner, _, kind = name.removesuffix(".weight").rpartition(".")
        same = [
            p
            for p in self.places
            if kind == f"{self.name}_{p.location}" and (p.location not in AROUND or owner in p)
        ]
        return name.endswith(".weight") and (
            self.type in HADAMARD or any(p.inverse == place.inverse for p in same)
        )


def _names(target: str, path: str) -> bool:
    return target in (path, LINEAR) or (
        target.startswith("re:") and re.match(target[3:], path) is not None
    )


def transforms(config: Mapping[str, Any], names: Collection[str]) -> Extra | None:
    """What the key says, with its matrices among `names`; refuses by name what qlab does not
    compute."""
    said = config.get(KEY)
    if not said:
        return None
    if (
        not isinstance(said, Mapping)
        or said.keys() != {"config_groups"}
        or not isinstance(said["config_groups"], Mapping)
    ):
        raise QlabError(
            f"quantization_config has {KEY} {said!r:.80}, which is no object of config_groups "
            "alone; its config is wrong"
        )
    groups = [_group(name, group, names) for name, group in said["config_groups"].items()]
    online = [group for group in groups if any(place.location in ONLINE for place in group.places)]
    missing = [f"any tensor of {KEY}'s group {group.name}" for group in online if not group.tensors]
    if not groups:
        return None

    def ops(
        path: str, location: str, channels: int, tensor: Callable[[str], Tensor]
    ) -> tuple[Op, ...]:
        at = [(group, place) for group in online for place in group.at(path, location)]
        if len(at) > 1:
            raise QlabError(
                f"{path} has an {location} that {at[0][0].name} and {at[1][0].name} of {KEY} "
                "rotate, in an order that the config does not say; qlab reads one such group per "
                "module and location"
            )
        return tuple(MatMul(group.matrix(path, place, channels, tensor)) for group, place in at)

    done = f"rotations {', '.join(group.name for group in groups)} are in the weights"
    says = (
        f"activations are rotated at run time by {', '.join(group.name for group in online)}"
        if online
        else done
    )
    return Extra(
        key=KEY,
        says=says,
        online=bool(online),
        applied=True,
        tensors=tuple(n for g in online for n in g.tensors),
        missing=tuple(missing),
        fault=_fault,
        ops=ops,
    )


def _group(name: str, group: Any, names: Collection[str]) -> Group:
    where = f"{KEY}'s group {name}"
    if (
        not isinstance(group, Mapping)
        or group.keys() - GROUP_KEYS
        or group.get("type") not in TYPES
    ):
        raise QlabError(
            f"{where} is {group!r:.80}; qlab reads objects of type {', '.join(TYPES)} with "
            f"{', '.join(sorted(GROUP_KEYS))}"
        )
    head_dim, precision, apply = (
        group.get("head_dim"),
        group.get("precision", "torch.float32"),
        group.get("apply", []),
    )
    if not (head_dim is None or (type(head_dim) is int and head_dim > 0)) or not isinstance(
        apply, list
    ):
        raise QlabError(
            f"{where} has head_dim {head_dim!r} and apply {apply!r:.80}; they are a number of "
            "channels and a list"
        )
    dtype = DTYPES.get(precision.removeprefix("torch.")) if isinstance(precision, str) else None
    if dtype is None:
        raise QlabError(f"{where} has precision {precision!r}; qlab reads {', '.join(DTYPES)}")
    places = tuple(_place(where, place) for place in apply)
    _check_attention(where, group, places)
    kinds = {
        (f"{name}_{place.location}", kind)
        for place in places
        if place.location in ONLINE
        for kind in ("weight", "perm")
    }
    tensors = tuple(sorted(n for n in names if tuple(n.split(".")[-2:]) in kinds))
    return Group(
        name=name,
        type=group["type"],
        places=places,
        head_dim=head_dim,
        randomize=bool(group.get("randomize")),
        dtype=dtype,
        tensors=tensors,
    )


def _place(where: str, place: Any) -> Place:
    if (
        not isinstance(place, Mapping)
        or place.keys() - PLACE_KEYS
        or place.get("location") not in (*DONE, *ONLINE)
    ):
        location = place.get("location") if isinstance(place, Mapping) else place
        raise QlabError(
            f"{where} applies to location {location!r:.80}; qlab reads "
            f"{', '.join((*DONE, *ONLINE))}"
        )
    targets, ignore = (
        [v] if isinstance(v := place.get(key, []), str) else v for key in ("targets", "ignore")
    )
    for key, found in (("targets", targets), ("ignore", ignore)):
        if not isinstance(found, list) or not all(
            isinstance(text, str) and _compiles(text) for text in found
        ):
            raise QlabError(
                f"{where} has {key} {found!r:.80}, which are no names or regular expressions"
            )
    foreign = [
        t
        for t in (*targets, *ignore)
        if not t.startswith("re:") and "." not in t and t not in (LINEAR, "lm_head")
    ]
    if place["location"] in AROUND and foreign:
        raise QlabError(
            f"{where} targets the class {foreign[0]!r} at its {place['location']}; qlab knows the "
            f"class {LINEAR} only"
        )
    return Place(
        place["location"], tuple(targets), tuple(ignore), bool(place.get("inverse", False))
    )


def _check_attention(where: str, group: Mapping[str, Any], places: tuple[Place, ...]) -> None:
    """Refuse matrices at queries and keys that do not cancel in their products."""
    queries, keys = (
        [(p.targets, p.ignore, p.inverse) for p in places if p.location == at]
        for at in ("q_attn", "k_cache")
    )
    if sorted(queries) != sorted(keys) or (
        queries and (group["type"] not in HADAMARD or group.get("requires_grad"))
    ):
        raise QlabError(
            f"{where} transforms queries and keys in ways that do not cancel in their products; "
            "qlab reads one Hadamard matrix at both"
        )


def _compiles(text: str) -> bool:
    try:
        return not text.startswith("re:") or bool(re.compile(text[3:]))
    except re.error:
        return False


def _fault(matrix: Tensor) -> str | None:
    return (
        "holds NaN or Inf" if matrix.is_floating_point() and not matrix.isfinite().all() else None
    )
