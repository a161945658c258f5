"""Targets that are classes of modules. Files do not say of which class a module is; where classes
have different schemes, the shapes of its tensors show which one it was written with."""

from collections.abc import Collection, Mapping
from typing import Any, Protocol

from qlab.algebra.spec import Int, Spec
from qlab.errors import QlabError

LINEAR, EMBEDDING = "Linear", "Embedding"
CLASSES = (LINEAR, EMBEDDING)


class Quantized(Protocol):
    """What is said of a class's modules: the spec of their weights, and perhaps more."""

    @property
    def spec(self) -> Spec | None: ...


def written_with(path: str, candidates: Mapping[str, Quantized], stored: Collection[str]) -> str:
    """The class that a module was written as; refuses one that may be of several."""
    if len(set(candidates.values())) == 1:
        return next(iter(candidates))
    shapes = _shapes(path, stored)
    fitting = [name for name, said in candidates.items() if said.spec and _fits(said.spec, shapes)]
    if len(fitting) != 1:
        raise QlabError(
            f"{path} may be of {' or of '.join(candidates)}, which quantization_config quantizes "
            "in different ways; name modules in its targets"
        )
    return fitting[0]


def _shapes(path: str, stored: Any) -> dict[str, tuple[int, ...]]:
    """Kind of a module's tensor -> its shape, as far as the files' headers are at hand."""
    if not isinstance(stored, Mapping):
        return {}
    kinds = ("weight", "weight_packed", "weight_scale", "weight_zero_point")
    return {
        kind: tuple(stored[name].shape) for kind in kinds if (name := f"{path}.{kind}") in stored
    }


def _fits(spec: Spec, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    scales, codes = (
        shapes.get("weight_scale", ()),
        shapes.get("weight_packed", shapes.get("weight", ())),
    )
    if len(codes) != 2 or ("weight_zero_point" in shapes) == spec.symmetric:
        return False
    if spec.tile.rows is None:
        return scales in ((), (1,))
    if scales[:1] != codes[:1] or (
        spec.tile.cols is None and scales not in (codes[:1], (codes[0], 1))
    ):
        return False
    if spec.tile.cols is None or len(scales) != 2:
        return spec.tile.cols is None
    bits = 8 if "weight_packed" not in shapes else spec.bits
    word = 32 if isinstance(spec, Int) and "weight_packed" in shapes else 8
    return codes[1] == -(-scales[1] * spec.tile.cols * bits // word)
