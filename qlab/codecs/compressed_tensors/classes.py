"""Targets that are classes of modules. Files do not say which class a module has. Where classes
have different schemes, the shapes of a module's tensors show with which of them it was written."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from qlab.algebra.spec import Int, Spec
from qlab.errors import QlabError

LINEAR, EMBEDDING = "Linear", "Embedding"
CLASSES = (LINEAR, EMBEDDING)


class Quantized(Protocol):
    """What a config says of a class: at least the spec of the weights of its modules."""

    @property
    def spec(self) -> Spec | None: ...


def written_with(path: str, candidates: Mapping[str, Quantized], stored: Collection[str]) -> str:
    """The class that a module was written as; refuses a module that fits several classes, or none.

    stored: the names of all tensors in the files, with their headers where these are at hand.
    """
    if len(set(candidates.values())) == 1:
        return next(iter(candidates))
    shapes = _shapes(path, stored)
    fitting = [
        name for name, scheme in candidates.items() if scheme.spec and _fits(scheme.spec, shapes)
    ]
    if len(fitting) != 1:
        raise QlabError(
            f"{path} may be of {' or of '.join(candidates)}, which quantization_config quantizes "
            "in different ways; name modules in its targets"
        )
    return fitting[0]


def _shapes(path: str, stored: Any) -> dict[str, tuple[int, ...]]:
    """Last name of a module's tensor -> its shape; empty where headers are not at hand."""
    if not isinstance(stored, Mapping):
        return {}
    kinds = ("weight", "weight_packed", "weight_scale", "weight_zero_point")
    return {
        kind: tuple(stored[f"{path}.{kind}"].shape) for kind in kinds if f"{path}.{kind}" in stored
    }


def _fits(spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a weight of this spec has tensors of these shapes."""
    scales = shapes.get("weight_scale", ())
    codes = shapes.get("weight_packed", shapes.get("weight", ()))
    if len(codes) != 2 or ("weight_zero_point" in shapes) == spec.symmetric:
        return False
    if spec.tile.rows is None:
        return scales in ((), (1,))
    if scales[:1] != codes[:1]:
        return False
    if spec.tile.cols is None:
        return scales in (codes[:1], (codes[0], 1))
    if len(scales) != 2:
        return False
    bits, word = 8, 8
    if "weight_packed" in shapes:
        bits, word = spec.bits, 32 if isinstance(spec, Int) else 8
    return codes[1] == -(-scales[1] * spec.tile.cols * bits // word)
