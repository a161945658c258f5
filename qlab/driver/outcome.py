"""What each weight becomes, as a plan says it: its spec, its bits, and what stands beside its
codes."""

from collections.abc import Mapping
from typing import Any

from qlab.algebra.spec import Spec, with_scale_dtype
from qlab.algebra.views import EachWeight
from qlab.driver.effects import input_specs, online_of
from qlab.driver.job import Job
from qlab.driver.sites import Sites
from qlab.model.linears import unbuilt
from qlab.model.skeleton import Skeleton


def rows_of(job: Job, sites: Sites, specs: Mapping[str, Spec | None]) -> dict[str, dict[str, Any]]:
    """Site -> what it becomes."""
    dtype = job.model.dtype  # of the weights that stay as they are
    rounded_inputs = input_specs(online_of(job.recipe, sites))
    rows: dict[str, dict[str, Any]] = {}
    for name, spec in specs.items():
        shape = sites.shapes[name]
        row = rows[name] = {
            "spec": str(spec) if spec else None,
            "shape": list(shape),
            "bits_per_weight": spec.bits_per_weight(shape, dtype) if spec else 8.0 * dtype.itemsize,
        }
        row["bits_per_weight"] += _beside(job, sites, name, spec)
        if sites.sites[name].route:
            row["experts"] = shape[0]
        if name in rounded_inputs:
            row["inputs"] = rounded_inputs[name]
    return rows


def _beside(job: Job, sites: Sites, name: str, spec: Spec | None) -> float:
    """Bits per weight of what steps put beside the codes of a weight."""
    shape, site = sites.shapes[name], sites.sites[name]
    stored = spec and with_scale_dtype(spec, job.model.dtype)
    bits = [
        stage.view.beside(shape, stored)
        for stage in job.recipe
        if isinstance(stage.view, EachWeight) and stage.view.beside and stage.touches(name, site)
    ]
    return 0.0 if site.router else sum(bits) / shape.numel()


def unquantized(skeleton: Skeleton, sites: Sites, specs: Mapping[str, Spec | None]) -> list[str]:
    """The matrices that stay as they are: linears that the recipe does not reach, matrices without
    a site, and sites that it keeps."""
    unreached = [name for name in skeleton.names.linears() if name not in sites.sites]
    kept = [name for name, spec in specs.items() if spec is None]
    return [*unreached, *sites.beside, *unbuilt(skeleton), *kept]
