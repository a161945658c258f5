"""What happens to the input of a linear at run time: a rotation, then rounding, as the files' configuration says."""

from typing import TYPE_CHECKING

from torch import nn

from qlab.errors import QlabError
from qlab.graph import Op

if TYPE_CHECKING:
    from qlab.model.skeleton import Skeleton


def at_input(skeleton: "Skeleton", site: str) -> tuple[Op, ...]:
    """The operations on a site's input. Fused experts have one input, which all of them must round alike."""
    checkpoint, experts = skeleton.checkpoint, skeleton.fused(site)
    modules = [m for m in skeleton.modules(site) if m in checkpoint.inputs]
    specs = {checkpoint.inputs[m] for m in modules}
    if experts and (len(specs) > 1 or any(s.static for s in specs)):
        raise QlabError(f"{site}: its experts round their inputs in ways of their own ({', '.join(map(str, specs))}); qlab reads "
                        "experts whose inputs are rounded with one dynamic spec")
    return _rotations(skeleton, site, experts) + (checkpoint.rounding(modules[-1]) if modules else ())


def _rotations(skeleton: "Skeleton", site: str, experts: bool) -> tuple[Op, ...]:
    """What the input is multiplied with before it is rounded; the configuration may name the linear in either spelling."""
    if not experts and not isinstance(skeleton.model.get_submodule(site), nn.Linear):
        return ()
    k = skeleton.model.get_parameter(site if experts else f"{site}.weight").shape[-1]
    found = [ops for name in dict.fromkeys(skeleton.modules(site)) if (ops := skeleton.checkpoint.rotations(name, k))]
    if experts and found:
        raise QlabError(f"{site} has inputs that are rotated at run time, which qlab does not do to experts")
    return found[0] if found else ()
