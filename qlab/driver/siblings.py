"""Global scales of weights that are rounded one by one: engines fuse some of a module's children,
and nothing here says which."""

from collections.abc import Callable, Mapping

from torch import Tensor

from qlab.algebra.qtensor import shared_outer
from qlab.algebra.spec import Spec


class Siblings:
    """specs: module -> what its weight is rounded to. read: module -> W [o, k] in fp32, called once
    for each child of a parent whose spec has a global scale (NVFP4), one at a time."""

    def __init__(self, specs: Mapping[str, Spec], read: Callable[[str], Tensor]):
        self._read = read
        self._specs = specs
        self._families: dict[tuple[str, Spec], list[str]] = {}
        for module, spec in specs.items():
            self._families.setdefault((module.rpartition(".")[0], spec), []).append(module)
        self._outers: dict[tuple[str, Spec], Tensor | None] = {}

    def __contains__(self, module: str) -> bool:
        return module in self._specs

    def outer(self, module: str) -> Tensor | None:
        """The global scale that a weight shares with its parent's others of the same spec; None
        where the spec has none.

        Among them are q, k and v, and gate and up, of each of which engines make one weight with
        one global scale.
        """
        spec = self._specs[module]
        family = (module.rpartition(".")[0], spec)
        if spec.outer and family not in self._outers:
            self._outers[family] = shared_outer(map(self._read, self._families[family]), spec)
        return self._outers.get(family)
