"""`transform_config`: groups of matrices that weights and activations are multiplied with. Source:
compressed-tensors 0.20.

{"config_groups": {group: {"type", "apply": [{"targets", "location", "inverse", "ignore"}],
"head_dim", ...}}}, where a location of y = x @ W.T is one of:

weight_input, weight_output: the weights were multiplied before they were rounded. Readers do
    nothing.
input, output: x -> x @ M and y -> y @ M at run time. M [n, n] multiplies every n neighbouring
    channels; n is `head_dim`, or all channels without it.
q_attn, k_cache: the same for every head of queries and of keys. One Hadamard matrix at both changes
    no product, (q M) (k M)^T = q k^T: it matters where keys are rounded behind it. qlab refuses
    other pairs.

M is the tensor <module>.<group>_<location>.weight. It is written once for all modules of a group
that share it, under the name of one of them. The Hadamard types hold +-1: M is that matrix in the
order `perm` of rows and columns (with `randomize`), transposed by `inverse`, over sqrt(n). A
random-matrix is stored as it is used.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import MatMul
from qlab.codecs.extra import Extra
from qlab.errors import QlabError
from qlab.process.shown import some

KEY, LINEAR = "transform_config", "Linear"
HADAMARD = ("hadamard", "random-hadamard")
TYPES = (*HADAMARD, "random-matrix")
AROUND = ("input", "output")  # locations at a linear module
ATTENDED = {"query": "q_attn", "key": "k_cache"}  # what an attention reads -> the location
ONLINE = (*AROUND, *ATTENDED.values())  # locations at run time
LOCATIONS = ("weight_input", "weight_output", *ONLINE)
GROUP_KEYS = {"type", "apply", "randomize", "requires_grad", "head_dim", "precision"}
PLACE_KEYS = {"targets", "location", "inverse", "ignore"}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Place:
    """An entry of `apply`: where a group's matrix is multiplied, and in which modules."""

    location: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    inverse: bool

    def __contains__(self, path: str) -> bool:
        """Whether the module of this path is among the modules: a linear, or an attention, of whose
        class no other module is."""
        is_class = LINEAR.__eq__ if self.location in AROUND else _is_class
        targeted = any(_names(target, path, is_class) for target in self.targets)
        return targeted and not any(_names(target, path, is_class) for target in self.ignore)


@dataclass(frozen=True, kw_only=True)
class Group:
    """One kind of matrix, and its places. tensors: the names of its tensors in the files,
    <module>.<name>_<location>.weight and .perm."""

    name: str
    type: str
    places: tuple[Place, ...]
    head_dim: int | None
    randomize: bool
    dtype: torch.dtype
    tensors: tuple[str, ...]

    @property
    def online(self) -> bool:
        """Whether the matrix is multiplied at run time, in some place."""
        return any(place.location in ONLINE for place in self.places)

    def at(self, path: str, location: str) -> list[Place]:
        """The places at a location of this module."""
        return [place for place in self.places if place.location == location and path in place]

    def matrix(
        self, path: str, place: Place, channels: int, tensor: Callable[[str], Tensor]
    ) -> Tensor:
        """M [n, n] for the input or output [..., channels] of a module. tensor: reads a tensor of
        the files by its name."""
        n = self.head_dim or channels
        if channels % n:
            raise QlabError(
                f"{path} has {channels} {place.location} channels, which the head_dim {n} of "
                f"{KEY}'s group {self.name} does not divide; its config is wrong"
            )
        name, H = self._stored(path, place, n, tensor)
        H = H.to(self.dtype)
        if not H.isfinite().all():
            raise QlabError(f"{name} holds NaN or Inf; the file is damaged")
        if self.type not in HADAMARD:
            return H
        if self.randomize:
            order = _order(f"{name.removesuffix('weight')}perm", n, tensor)
            H = H[order][:, order]
        # rounded once, as what was written: other bits turn codes of inputs of 4 bits
        return ((H.mT if place.inverse else H).double() / n**0.5).to(self.dtype)

    def _stored(
        self, path: str, place: Place, n: int, tensor: Callable[[str], Tensor]
    ) -> tuple[str, Tensor]:
        """Name and content of a module's tensor [n, n]: its own, or the one of this size that it
        shares with other modules."""
        own_name = f"{path}.{self.name}_{place.location}.weight"
        if own_name in self.tensors:
            names = [own_name]
        else:
            names = [name for name in self.tensors if self._may_share(name, place)]
        fitting = []
        for name in names:
            H = tensor(name)
            if H.shape == (n, n) and H.is_floating_point():
                fitting.append((name, H))
        if len(fitting) != 1:
            raise QlabError(
                f"{path} shares the [{n}, {n}] matrix of {KEY}'s group {self.name} with others, "
                f"and the files hold {len(fitting)} such matrices; "
                "the files are incomplete or damaged"
            )
        return fitting[0]

    def _may_share(self, name: str, place: Place) -> bool:
        """Whether a place may use the matrix under this name. The inverse of a random matrix is
        stored as a matrix of its own, so that only places of the same `inverse` share one."""
        if not name.endswith(".weight"):
            return False
        owner, _, kind = name.removesuffix(".weight").rpartition(".")
        return self.type in HADAMARD or any(
            other.inverse == place.inverse
            for other in self.places
            if kind == f"{self.name}_{other.location}"
            and (other.location not in AROUND or owner in other)
        )


def _order(name: str, n: int, tensor: Callable[[str], Tensor]) -> Tensor:
    """The order of n channels under this name; refuses a tensor that is none."""
    order = tensor(name)
    everyone = torch.arange(n, dtype=order.dtype)
    if order.is_floating_point() or not torch.equal(order.sort().values, everyone):
        raise QlabError(f"{name} is no order of {n} channels; the file is damaged")
    return order


def _names(target: str, path: str, is_class: Callable[[str], bool]) -> bool:
    """Whether a target of a config means the module of this path, which is of the classes that
    `is_class` says."""
    if target.startswith("re:"):
        return target == path or re.match(target[3:], path) is not None
    return target == path or is_class(target)


def _is_class(target: str) -> bool:
    """Whether a target that is no pattern names a class of modules."""
    return "." not in target and target != "lm_head"


def transforms(config: Mapping[str, Any], names: Collection[str]) -> Extra | None:
    """What the key says, with its matrices among `names`; refuses transforms that qlab does not
    compute."""
    value = config.get(KEY)
    if not value:
        return None
    groups = _groups(value, names)
    if not groups:
        return None
    online = [group for group in groups if group.online]
    if online:
        says = f"activations are rotated at run time by {_listed(online)}"
    else:
        says = f"rotations {_listed(groups)} are in the weights"
    missing = [f"any tensor of {KEY}'s group {group.name}" for group in online if not group.tensors]
    return Extra(
        key=KEY,
        says=says,
        online=bool(online),
        applied=True,
        tensors=tuple(chain.from_iterable(group.tensors for group in online)),
        missing=tuple(missing),
        fault=_fault,
        ops=partial(_operations, online),
    )


def _listed(groups: list[Group]) -> str:
    return some([group.name for group in groups])


def _operations(
    groups: list[Group],
    path: str,
    location: str,
    channels: int,
    tensor: Callable[[str], Tensor],
) -> tuple[Op, ...]:
    """What the groups do to the input or output of a linear module, or to what an attention reads
    (see Extra.ops)."""
    stored = ATTENDED.get(location, location)
    at = [(group, place) for group in groups for place in group.at(path, stored)]
    if len(at) > 1:
        raise QlabError(
            f"{path} has an {location} that {at[0][0].name} and {at[1][0].name} of {KEY} "
            "rotate, in an order that the config does not say; "
            "qlab reads one such group per module and location"
        )
    return tuple(MatMul(group.matrix(path, place, channels, tensor)) for group, place in at)


def _groups(value: Any, names: Collection[str]) -> list[Group]:
    """The groups of a transform_config."""
    if (
        not isinstance(value, Mapping)
        or value.keys() != {"config_groups"}
        or not isinstance(value["config_groups"], Mapping)
    ):
        raise QlabError(
            f"quantization_config has {KEY} {value!r:.80}, which is no object of config_groups "
            "alone; its config is wrong"
        )
    return [_group(name, group, names) for name, group in value["config_groups"].items()]


def _group(name: str, group: Any, names: Collection[str]) -> Group:
    where = f"{KEY}'s group {name}"
    if (
        not isinstance(group, Mapping)
        or group.keys() - GROUP_KEYS
        or group.get("type") not in TYPES
    ):
        raise QlabError(
            f"{where} is {group!r:.80}; "
            f"qlab reads objects of type {', '.join(TYPES)} with {', '.join(sorted(GROUP_KEYS))}"
        )
    head_dim, apply = group.get("head_dim"), group.get("apply", [])
    is_size = head_dim is None or (type(head_dim) is int and head_dim > 0)
    if not is_size or not isinstance(apply, list):
        raise QlabError(
            f"{where} has head_dim {head_dim!r} and apply {apply!r:.80}; "
            "they are a number of channels and a list"
        )
    dtype = _dtype(where, group.get("precision", "torch.float32"))
    places = tuple(_place(where, place) for place in apply)
    _check_attention(where, group, places)
    return Group(
        name=name,
        type=group["type"],
        places=places,
        head_dim=head_dim,
        randomize=bool(group.get("randomize")),
        dtype=dtype,
        tensors=_tensors(name, places, names),
    )


def _dtype(where: str, precision: Any) -> torch.dtype:
    """The dtype in which a group multiplies."""
    dtype = DTYPES.get(precision.removeprefix("torch.")) if isinstance(precision, str) else None
    if dtype is None:
        raise QlabError(f"{where} has precision {precision!r}; qlab reads {', '.join(DTYPES)}")
    return dtype


def _tensors(group: str, places: tuple[Place, ...], names: Collection[str]) -> tuple[str, ...]:
    """The tensors of a group among `names`."""
    kinds = set()
    for place in places:
        if place.location in ONLINE:
            kinds |= {(f"{group}_{place.location}", kind) for kind in ("weight", "perm")}
    return tuple(sorted(name for name in names if tuple(name.split(".")[-2:]) in kinds))


def _place(where: str, place: Any) -> Place:
    location = place.get("location") if isinstance(place, Mapping) else place
    if not isinstance(place, Mapping) or place.keys() - PLACE_KEYS or location not in LOCATIONS:
        raise QlabError(
            f"{where} applies to location {location!r:.80}; qlab reads {', '.join(LOCATIONS)}"
        )
    targets = _targets(where, "targets", place.get("targets", []))
    ignore = _targets(where, "ignore", place.get("ignore", []))
    classes = [
        target
        for target in (*targets, *ignore)
        if not target.startswith("re:") and _is_class(target)
    ]
    unknown = [name for name in classes if name != LINEAR]
    if location in AROUND and unknown:
        raise QlabError(
            f"{where} targets the class {unknown[0]!r} at its {location}; "
            f"qlab knows the class {LINEAR} only"
        )
    return Place(location, targets, ignore, inverse=bool(place.get("inverse", False)))


def _targets(where: str, key: str, value: Any) -> tuple[str, ...]:
    """The names and patterns under a key, which holds one or a list of them."""
    targets = [value] if isinstance(value, str) else value
    if not isinstance(targets, list) or not all(
        isinstance(text, str) and _compiles(text) for text in targets
    ):
        raise QlabError(
            f"{where} has {key} {targets!r:.80}, which are no names or regular expressions"
        )
    return tuple(targets)


def _check_attention(where: str, group: Mapping[str, Any], places: tuple[Place, ...]) -> None:
    """Refuse matrices at queries and keys that do not cancel in their products."""

    def at(location: str) -> list[tuple]:
        here = [place for place in places if place.location == location]
        return sorted((place.targets, place.ignore, place.inverse) for place in here)

    queries, keys = at("q_attn"), at("k_cache")
    cancels = group["type"] in HADAMARD and not group.get("requires_grad")
    if queries != keys or (queries and not cancels):
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
    damaged = matrix.is_floating_point() and not matrix.isfinite().all()
    return "holds NaN or Inf" if damaged else None
