"""The weights of a model as a recipe sees them: every site under its full name."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qlab.algebra.graph import Code, Site, is_matrix, tensors_of
from qlab.algebra.transform import Transform
from qlab.data.calibration import Data
from qlab.driver.batches import in_batches, record
from qlab.driver.outside import outside_sites
from qlab.errors import QlabError
from qlab.model.calls import Call, windows_axis
from qlab.model.loading import drop_outside, load_outside
from qlab.model.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class Sites:
    """codes: block -> its program. sites: full name -> site, of the blocks and of what a recipe
    reaches around them. shapes: full name -> [..., o, k]. around: full name -> a linear around the
    blocks. unread: full name -> why the program shows no site for this matrix. beside: the
    matrices in blocks that no site multiplies by.
    """

    codes: Mapping[str, Code]
    sites: Mapping[str, Site]
    shapes: Mapping[str, torch.Size]
    around: Mapping[str, Site]
    unread: Mapping[str, str]
    beside: tuple[str, ...]


def sites_of(skeleton: Skeleton, recipe: Transform, data: Data | None) -> Sites:
    """The sites of a model, traced on inputs of the form that calibration will have."""
    codes = trace_all(skeleton, data)
    around = outside_sites(skeleton)
    reached = {
        name: site
        for name, site in around.items()
        if any(stage.touches(name, site) for stage in recipe)
    }
    inside = {f"{path}.{site.path}": site for path, code in codes.items() for site in code.sites}
    shapes = {
        f"{path}.{site.path}": _shape(skeleton, path, site)
        for path, code in codes.items()
        for site in code.sites
    }
    return Sites(
        codes=codes,
        sites=inside | reached,
        shapes=shapes | {name: _shape(skeleton, "", site) for name, site in reached.items()},
        around=around,
        unread={
            _named(path, leaf): why
            for path, code in codes.items()
            for leaf, why in code.unread.items()
        },
        beside=_beside_sites(skeleton, codes),
    )


def trace_all(skeleton: Skeleton, data: Data | None) -> dict[str, Code]:
    """Every block's program, traced on inputs of the form that calibration will have; refuses
    windows of lengths that it is not for."""
    load_outside(skeleton, with_head=False)
    batches = in_batches(data)
    _, (calls,) = record(skeleton, batches[:1])
    drop_outside(skeleton)
    codes = {path: skeleton.programs.code(path, call) for path, call in calls.items()}
    first, *others = dict.fromkeys(batch["input_ids"].shape[1] for batch in batches)
    for path, code in codes.items():
        if others and not _any_length(code, calls[path], batches[0]["input_ids"].shape):
            raise QlabError(
                f"{path} runs other operations on windows of another length, and there are "
                f"windows of {first} and of {others[0]} tokens; give windows of one length"
            )
    return codes


def _any_length(code: Code, call: Call, windows: torch.Size) -> bool:
    """Whether a program is for hidden states of as many tokens as there may be. windows: (how many,
    tokens in each), of the call."""
    hidden = call.entering[0]
    length = windows_axis(hidden, windows) + 1
    tensors = tensors_of(*call.inputs(call.entering))
    return next(sizes[length] is None for t, sizes in zip(tensors, code.inputs) if t is hidden)


def _beside_sites(skeleton: Skeleton, codes: Mapping[str, Code]) -> tuple[str, ...]:
    """The matrices in blocks that no site multiplies by: filters of each channel, factors."""
    found: list[str] = []
    for path, code in codes.items():
        held = {name for site in code.sites for name in (site.weight, site.bias)}
        found += [
            _named(path, name)
            for name, p in skeleton.blocks[path].named_parameters()
            if name not in held and is_matrix(p.shape)
        ]
    return tuple(found)


def _shape(skeleton: Skeleton, path: str, site: Site) -> torch.Size:
    assert site.weight is not None
    shape = skeleton.model.get_parameter(f"{path}.{site.weight}" if path else site.weight).shape
    return torch.Size([*shape[:-2], shape[-1], shape[-2]]) if site.layout.endswith("k o") else shape


def _named(path: str, leaf: str) -> str:
    """The full name of a block's weight, as sites and patterns spell it."""
    return f"{path}.{leaf}".removesuffix(".weight")
