"""`transform_config`, written: the inverse of `transforms.py`.

A matrix M [n, n] that turns every n neighbouring channels is a group of its own, with the places at
which it stands. Readers keep one matrix per group and size, so matrices that differ must not share
a group. A Hadamard matrix is stored as +-1 in bfloat16, which holds these exactly, and readers
divide it by sqrt(n); any other is a random-matrix, stored as it is used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import Op
from qlab.algebra.online import matrix_of
from qlab.codecs.compressed_tensors.transforms import ATTENDED, KEY

RANDOM_HADAMARD, RANDOM_MATRIX = "random-hadamard", "random-matrix"
NEAR = 1e-5  # relative; numbers of a matrix in float32 that stand for +-1 / sqrt(n)
PLACES = ("input", "output", *ATTENDED)


def refusal(op: Op, place: str) -> str | None:
    """Why a directory cannot hold this operation as a rotation at a place, or None."""
    M = matrix_of(op)
    if M is None:
        return f"compressed-tensors holds no run-time {type(op).__name__} there"
    if M.ndim != 2:
        return (
            "compressed-tensors turns all blocks of channels by one matrix, and here are "
            f"{len(M)}; draw one for all"
        )
    if place in ATTENDED and not _is_hadamard(M):
        return (
            "compressed-tensors turns queries and keys by Hadamard matrices, and this is none; "
            "use rotate_scores as it is (draw=random_hadamard)"
        )
    return None


def _signs_of(M_nn: Tensor) -> Tensor | None:
    """H [n, n] of +-1 where M = H / sqrt(n); None for any other matrix."""
    scaled = M_nn.double() * len(M_nn) ** 0.5
    signs = scaled.sign()
    return signs if bool(((scaled - signs).abs() <= NEAR).all()) else None


def _is_hadamard(M_nn: Tensor) -> bool:
    """Whether M is an orthogonal matrix of +-1 / sqrt(n)."""
    signs = _signs_of(M_nn)
    if signs is None:
        return False
    n = len(signs)
    identity = torch.eye(n, dtype=signs.dtype, device=signs.device)
    return torch.equal(signs @ signs.T, n * identity)


def encode(M_nn: Tensor) -> tuple[str, Tensor]:
    """The type of a matrix, and what is stored of it."""
    signs = _signs_of(M_nn)
    if signs is None:
        return RANDOM_MATRIX, M_nn.contiguous()
    return RANDOM_HADAMARD, signs.to(torch.bfloat16)


def name_of(module: str, place: str) -> str:
    """The name of the group of a matrix that stands first at this module and place."""
    kind = "scores" if place in ATTENDED else place
    return f"rotated_{kind}_of_{module.replace('.', '_')}"


def tensor_of(module: str, place: str) -> str:
    """The name in the files of the matrix of that group."""
    return f"{module}.{name_of(module, place)}_{ATTENDED.get(place, place)}.weight"


def config(rows: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """The transform_config of what happens at modules: module -> place -> what happens there, of
    which `rotated` is the type of a matrix."""
    groups: dict[str, dict[str, Any]] = {}
    for module, places in rows.items():
        for place, steps in places.items():
            for step in steps:
                if "rotated" in step:
                    group = groups.setdefault(step["group"], _group(step))
                    group["apply"] += _places(module, place)
    return {KEY: {"config_groups": groups}} if groups else {}


def _group(step: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apply": [],
        "head_dim": step["size"],
        "precision": step["precision"],
        "randomize": False,
        "requires_grad": False,
        "type": step["rotated"],
    }


def _places(module: str, place: str) -> list[dict[str, Any]]:
    """The entries of `apply`: the place, and where weights hold the inverse already."""

    def entry(location: str, inverse: bool = False) -> dict[str, Any]:
        return {"ignore": [], "inverse": inverse, "location": location, "targets": [module]}

    if place in ATTENDED:
        return [entry(ATTENDED[place])]
    if place == "output":
        return [entry("output")]
    return [entry("input"), entry("weight_input", inverse=True)]
