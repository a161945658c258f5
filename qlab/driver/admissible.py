"""Whether a weight may become a spec, in a format and for an engine.

Everything is refused by name, before anything runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from qlab.algebra.graph import Site
from qlab.algebra.spec import Int, Spec, with_scale_dtype
from qlab.algebra.tile import legal_groups
from qlab.algebra.transform import Transform, makes_weights, puts_on_values
from qlab.algebra.views import EachWeight
from qlab.codecs import CODECS, refusal_of_transposed
from qlab.codecs.engines import division, refusal, refusal_of_architectures, uniformity
from qlab.driver.sites import Sites
from qlab.errors import QlabError
from qlab.model.skeleton import Skeleton
from qlab.process.shown import some

T = TypeVar("T")

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KEEP_THEM = "leave them as they are (--keep PATTERN, or keep() in rules() in Python)"


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Decides whether a weight may become a spec in a format, for an engine.

    codec: the name of the format. dtype: of the checkpoint, in which scales are stored that have no
    dtype of their own. target: the name of the engine that is to load the directory (None: any).
    """

    codec: str
    dtype: torch.dtype
    target: str | None = None

    def refusal(
        self, spec: Spec, shape: torch.Size, *, transposed: bool = False, expert: bool = False
    ) -> str | None:
        """Why a weight may not become this spec, or None.

        shape: of the weight, [..., o, k], which the spec's tile fits. transposed: whether the dense
        weight is stored as [k, o]. expert: whether it is a mixture's.
        """
        reasons = self._refusals(spec, shape, transposed, expert)
        return next((reason for reason in reasons if reason), None)

    def _refusals(
        self, spec: Spec, shape: torch.Size, transposed: bool, expert: bool
    ) -> Iterator[str | None]:
        codec = CODECS[self.codec]
        if transposed:
            yield self.transposed_refusal
        yield codec.refusal(with_scale_dtype(spec, self.dtype))
        yield codec.misfit(spec, shape)
        if self.target:
            yield refusal(self.target, self.codec, spec, expert, shape[-1])
        yield codec.risk(spec)

    @property
    def transposed_refusal(self) -> str | None:
        """Why the format cannot hold weights whose dense form is stored as [k, o], or None."""
        return refusal_of_transposed(self.codec)

    def scale_dtypes(self, spec: Spec, own: torch.dtype | None = None) -> list[torch.dtype]:
        """The dtypes in which the format can store the scales of codes that exist; `own`, that of
        the scales, comes first."""
        fixed = spec.scale_dtype is not None and spec.scale_dtype.itemsize == 1
        dtypes = [own, *SCALE_DTYPES]
        if fixed:  # MX and NV: the dtype is part of the grid
            dtypes = [spec.scale_dtype]
        codec = CODECS[self.codec]
        return [
            dtype
            for dtype in dict.fromkeys(dtypes)
            if dtype is not None and codec.refusal(replace(spec, scale_dtype=dtype)) is None
        ]

    def nearest(self, spec: Spec) -> Spec | str:
        """The spec that codes which exist can have in the format: their own, or the one that
        differs in storing zero points that are all 0 or not; else why there is none."""
        candidates = [spec]
        if isinstance(spec, Int) and spec.zero_dtype == torch.int8:
            candidates = [
                replace(spec, scale_dtype=None, symmetric=symmetric)
                for symmetric in (spec.symmetric, not spec.symmetric)
            ]
        for candidate in candidates:
            if self.scale_dtypes(candidate):
                return candidate
        stored = replace(spec, scale_dtype=spec.scale_dtype or SCALE_DTYPES[0])
        return CODECS[self.codec].refusal(stored) or f"it has no {spec} weights"

    def nearest_to_round_to(self, spec: Spec) -> Spec | str:
        """The spec to which weights can be rounded for the format; else why there is none."""
        nearest = self.nearest(spec)
        if isinstance(nearest, str):
            return nearest
        return CODECS[self.codec].risk(nearest) or nearest

    def refuse_several(self, specs: Mapping[str, Spec], weights: str) -> None:
        """Refuse specs of which the engine loads one for all of them.

        weights: what is to be given one spec, in the error's words.
        """
        several = uniformity(self.target, specs) if self.target else None
        if several:
            raise QlabError(f"{several}; give all {weights} one")


def check_specs(
    specs: Mapping[str, Spec | None], model: Sites, skeleton: Skeleton, admission: Admission
) -> None:
    """Refuse what the codec's format cannot hold and what the engine does not load, each reason
    with its weights."""
    rounded = {name: spec for name, spec in specs.items() if spec}
    refusals = Refusals()
    for name, spec in rounded.items():
        site, shape = model.sites[name], model.shapes[name]
        misfit = tile_misfit(spec, shape)
        if misfit:
            refusals.add(misfit + _for_all_widths(spec, rounded, model), name)
            continue
        reason = _refusal_of_site(name, site, spec, skeleton) or admission.refusal(
            spec,
            shape,
            transposed=name in skeleton.names.transposed,
            expert=site.route is not None,
        )
        refusals.add(reason, name)
    if admission.target:
        for names in joined_sites(model.sites):
            divided = division(admission.target, {name: specs[name] for name in names})
            refusals.add(divided, *names)
        unbuilt = refusal_of_architectures(
            admission.target, skeleton.checkpoint.raw.get("architectures")
        )
        refusals.add(unbuilt, str(skeleton.checkpoint.path))
    refusals.raise_first()
    if rounded:
        CODECS[admission.codec].config(specs)  # refuses what no config can say of all of them
    admission.refuse_several(rounded, "sites")


def check_tiles(specs: Mapping[str, Spec | None], model: Sites) -> None:
    """Refuse specs whose tiles do not divide their weights, whatever format holds them."""
    rounded = {name: spec for name, spec in specs.items() if spec}
    refusals = Refusals()
    for name, spec in rounded.items():
        misfit = tile_misfit(spec, model.shapes[name])
        refusals.add(misfit and misfit + _for_all_widths(spec, rounded, model), name)
    refusals.raise_first()


def refuse_misfits(recipe: Transform, model: Sites) -> None:
    """Refuse steps that have no place for the input channels of a weight (a pattern of zeros)."""
    refusals = Refusals()
    for stage in recipe:
        check = stage.view.check if isinstance(stage.view, EachWeight) else None
        for name, site in model.sites.items():
            if check and stage.touches(name, site) and not site.router:
                refusals.add(refusal_by(check, model.shapes[name][-1]), name)
    refusals.raise_first()


def refuse_unrounded(recipe: Transform, codec: str) -> None:
    """Refuse a recipe that rounds no weight, where it makes no other weights and rounds nothing
    that attention reads, or the format holds no dense ones."""
    if any(stage.spec for stage in recipe):
        return
    if not makes_weights(recipe) and not puts_on_values(recipe):
        raise QlabError(
            "the recipe rounds no weight, so there is nothing to write; add a method such as "
            "rtn(spec)"
        )
    if CODECS[codec].dense is None:
        raise QlabError(
            f"the recipe rounds no weight, and {codec} holds rounded ones; write "
            "compressed-tensors, which holds dense ones too, or add a method such as rtn(spec)"
        )


class Refusals:
    """Reasons why weights are refused, each with the names of its weights."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str | None, *names: str) -> None:
        """Count these names among a reason's; None is no reason."""
        if reason:
            self._names.setdefault(reason, []).extend(names)

    def raise_first(self) -> None:
        """Refuse the weights of the first reason, if there is one."""
        for reason, names in self._names.items():
            raise QlabError(f"{some(names)}: {reason}")


def tile_misfit(spec: Spec, shape: torch.Size) -> str | None:
    """Why the spec's tile does not divide a weight of this shape, or None."""
    return refusal_by(spec.tile.check, shape)


def refusal_by(check: Callable[[T], None], size: T) -> str | None:
    """What a check says of the size of a weight, or None."""
    try:
        check(size)
    except QlabError as error:
        return str(error)
    return None


def _refusal_of_site(name: str, site: Site, spec: Spec, skeleton: Skeleton) -> str | None:
    """Why no format could hold the codes of a site's weight, or None."""
    if site.route and not skeleton.names.expert_pieces(name):
        return (
            "quantized experts are written one by one, and transformers knows no names for "
            f"them in this architecture; {KEEP_THEM}"
        )
    if site.route and spec.tile.rows is None:
        return (
            "fused experts have a scale per group, channel or block; one per tensor would "
            "join projections that the files hold apart"
        )
    if site.layout not in ("o k", "e o k") and name not in skeleton.names.transposed:
        return f"readers of every format look for codes in linears, and this is none; {KEEP_THEM}"
    return None


def _for_all_widths(spec: Spec, rounded: Mapping[str, Spec], model: Sites) -> str:
    """The groups that divide every width that is to have this spec, where there are several
    widths."""
    widths = {model.shapes[name][-1] for name, other in rounded.items() if other == spec}
    common = ", ".join(map(str, legal_groups(math.gcd(*widths)))) or "none"
    return f"; for all {len(widths)} widths {common}" if len(widths) > 1 else ""


def joined_sites(sites: Mapping[str, Site]) -> list[list[str]]:
    """Sites of one module that engines may join: they share an input, or are the experts of a
    mixture."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, site in sites.items():
        if not site.router:
            module, source = name.rpartition(".")[0], "" if site.route else site.source
            groups.setdefault((module, source), []).append(name)
    return list(groups.values())
