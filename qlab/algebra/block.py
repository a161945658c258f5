"""A step that sees one block as a whole: what enters it, what should leave it, and how far a
version of it is from that. Learning is such a step.

Legend: W_ok a weight of o output and k input channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.called import called
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.measured import errors_in_notes, errors_of, noted_by_step, warn_of_divergence
from qlab.algebra.qtensor import QTensor
from qlab.algebra.rounding import Copies
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Need, Stats, name_of, named
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import WholeBlock
from qlab.algebra.windows import Schedule
from qlab.errors import QlabError

BLOCK_IO = "block_io"  # a step that needs it sees the samples of a whole block
SAMPLES = (BLOCK_IO, BLOCK_IO)  # where they lie among the statistics


class Samples(Protocol):
    """What goes through one block, window by window.

    entering(i): the hidden states that enter it in the model that is calibrated. wanted(i): those
    that leave the unquantized block in the unquantized model. leaving(segment, i): those that leave
    a version of the block, in the calibrated model. generator(name): random numbers of this block
    for one purpose. each(work, block, leaves, indices): what the work yields of windows, in their
    order; where several processes have the block, by all of them.
    """

    @property
    def count(self) -> int: ...

    def entering(self, i: int) -> Tensor: ...

    def wanted(self, i: int) -> Tensor: ...

    def leaving(self, segment: ModuleGraph, i: int) -> Tensor: ...

    def generator(self, name: str) -> torch.Generator: ...

    def each(
        self,
        work: "OfWindows",
        block: "Block",
        leaves: Mapping[str, Any],
        indices: Sequence[int],
    ) -> Iterator[Any]: ...


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block as a step of `qlab.each_block` sees it.

    Args:
        segment: the block as it is now; `segment.sites` are those that the step may change.
        samples: what goes through it, behind the methods of this class.
        stats: site path -> name -> a copy of a statistic that the step needs.

    Example:
        >>> import qlab
        >>> def look(block):
        ...     error = block.loss(block.segment, range(block.count))
        ...     return {}, {"block_error": float(error)}
        >>> [stage.name for stage in qlab.each_block("look", look)]
        ['look']
    """

    segment: ModuleGraph
    samples: Samples
    stats: Mapping[str, Mapping[str, Any]]

    @property
    def count(self) -> int:
        """The number of windows."""
        return self.samples.count

    def rows(self, indices: Iterable[int]) -> list[Tensor]:
        """The hidden states that enter the block in the calibrated model, window by window."""
        return [self.samples.entering(i) for i in indices]

    def targets(self, indices: Iterable[int]) -> list[Tensor]:
        """The hidden states that leave the unquantized block in the unquantized model, window by
        window."""
        return [self.samples.wanted(i).clone() for i in indices]

    def outputs(self, segment: ModuleGraph, indices: Iterable[int]) -> list[Tensor]:
        """The hidden states that leave a version of the block, window by window."""
        return [self.samples.leaving(segment, i) for i in indices]

    def error(self, segment: ModuleGraph, index: int) -> Tensor:
        """The mean squared error, in fp32, of what leaves a version of the block for one window."""
        target = self.samples.wanted(index).float()
        return (self.samples.leaving(segment, index).float() - target).square().mean()

    def loss(self, segment: ModuleGraph, indices: Iterable[int]) -> Tensor:
        """The mean of `error` over windows, differentiable in the leaves of the segment."""
        return torch.stack([self.error(segment, i) for i in indices]).mean()

    def generator(self, name: str) -> torch.Generator:
        """Random numbers for one purpose, the same in every run."""
        return self.samples.generator(name)

    def each(
        self, work: "OfWindows", leaves: Mapping[str, Any], indices: Sequence[int]
    ) -> Iterator[Any]:
        """What work(block, leaves, indices), a function of a module, yields of each window, in
        their order. Processes that have the block together take some windows each."""
        return self.samples.each(work, self, leaves, indices)

    def weight(self, path: str) -> Tensor:
        """A site's weight [..., o, k] in fp32, a copy: of a rounded one the target that the step
        which rounded it had."""
        site = self._site(path)
        is_dense = isinstance(self.segment.params[site.weight or ""], Tensor)
        W_ok = self.segment.weight_ok(site) if is_dense else self.segment.target_ok(site)
        return W_ok.clone()

    def put(self, leaves: Mapping[str, Any]) -> ModuleGraph:
        """The segment with other leaves: site path -> the site's weight as a tensor [..., o, k] or
        as codes, or leaf path -> a tensor of the leaf's shape."""
        return self.segment.update(dict(map(self._placed, leaves.items())))

    def _site(self, path: str) -> Site:
        sites = {site.path: site for site in self.segment.sites}
        if path not in sites:
            raise QlabError(f"{path!r} is none of {', '.join(sites)}; name a site of the segment")
        return sites[path]

    def _placed(self, item: tuple[str, Any]) -> tuple[str, Any]:
        """The path of a leaf, and the leaf as the program holds it."""
        path, leaf = item
        sites = {site.path: site for site in self.segment.sites if site.weight}
        if path in sites:
            site = sites[path]
            return str(site.weight), _turned(leaf, leaf, site)
        if path not in self.segment.params:
            known = list(dict.fromkeys([*sites, *self.segment.params]))
            near = get_close_matches(path, known, 3) or known[:3]
            raise QlabError(
                f"{self.segment.path} has no site and no leaf {path!r}; it has {', '.join(near)}"
            )
        like = self.segment.params[path]
        return path, leaf.to(like.dtype) if isinstance(like, Tensor) else leaf


BlockFn = Callable[[Block], Any]
# the block, other leaves of it and some windows -> something of each of these, in their order
OfWindows = Callable[[Block, Mapping[str, Any], Sequence[int]], Iterator[Any]]


def _turned(x: Any, leaf: Any, site: Site) -> Any:
    """Between [..., o, k] and the layout of the program, in which tensors lie and codes do not."""
    return x.mT if isinstance(leaf, Tensor) and site.layout.endswith("k o") else x


def each_block(
    name: str,
    fn: BlockFn,
    needs: Iterable[Need] = (),
    spec: Spec | None = None,
    detail: str = "",
    visits: int = 0,
    leaves: str = "",
    by_weight: Schedule | None = None,
) -> Transform:
    """A method from a function of one whole block: fn(block) -> leaves, or (leaves, notes).

    It runs when the stages before it are done with the block. Samples enter as the quantized blocks
    before it leave them, and are compared with the unquantized model's.

    Args:
        name: the stage's name in plans, reports and errors.
        fn: gets a `qlab.Block` and returns site path -> the site's new weight: a QTensor, or a
            tensor [..., o, k]; also leaf path -> a tensor, for norms and biases. Leaves that it
            does not name stay. Notes are numbers and texts by name, for the report of every site
            whose weight it names. Gradients are on while it runs.
        needs: statistics of the inputs of sites, as of `qlab.each_weight`.
        spec: the grid that fn rounds to; None where it keeps the grid of each leaf.
        detail: settings in words, for plans and reports.
        visits: how many windows fn runs forward and backward, for the estimate of time.
        leaves: what it puts that is neither a tensor nor codes, as of `qlab.each_cell`: no format
            holds such a leaf, so a plan refuses to write the recipe.
        by_weight: the schedule with which fn calls `qlab.algebra.learn.learn`, where it makes each
            weight of its site alone and of the gradients that are added up there. Several ranks may
            have some sites each then, where no rank has room for the whole block.

    Returns:
        A transform of one stage. It needs calibration data.

    Raises:
        QlabError: when it runs: fn returned a leaf of another shape, with NaN or off its grid, or
            names what is no site and no leaf.

    Example:
        >>> import qlab
        >>> def centre(block):
        ...     paths = [site.path for site in block.segment.sites if not site.router]
        ...     weights = {path: block.weight(path) for path in paths}
        ...     better = {path: W - W.mean(0) / 1000 for path, W in weights.items()}
        ...     before = block.loss(block.segment, range(block.count))
        ...     after = block.loss(block.put(better), range(block.count))
        ...     return better if after < before else {}
        >>> [stage.name for stage in qlab.each_block("centre", centre)]
        ['centre']
    """

    needs = named(needs)

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        sites = [site for site in graph.sites if not site.router]
        if not sites:
            return graph, stats
        _refuse_nonfinite(graph, sites)
        of_sites = {
            site.path: Copies(
                {name_of(need): stats[site.source, need] for need in needs},
                f"{graph.where(site)}: ",
            )
            for site in sites
        }
        block = Block(segment=graph, samples=stats[SAMPLES], stats=of_sites)
        with torch.enable_grad():
            returned, note = _returned(name, called(f"{graph.path}: {name}", fn, block))
        warn_of_divergence(f"{graph.path}: {name}", note)
        placed = dict(map(block._placed, _copies(returned).items()))
        for path, leaf in placed.items():
            _refuse_unfit(f"{name} made {graph.path}.{path}", leaf)
        notes = dict(graph.notes)
        for site in sites:
            leaf = placed.get(site.weight or "")
            if leaf is None:
                continue
            errors = _site_errors(block, site, leaf, needs)
            notes[site.path] = {**notes.get(site.path, {}), **errors, **note}
        return replace(graph.update(placed), notes=notes), stats

    view = WholeBlock(visits, leaves, by_weight)
    return (Stage(name, needs | {BLOCK_IO}, run, view, spec=spec, detail=detail),)


def _refuse_nonfinite(graph: ModuleGraph, sites: list[Site]) -> None:
    """Refuse dense weights with NaN or Inf, of which nothing can be learned."""
    for site in sites:
        leaf = graph.params[site.weight or ""]
        if isinstance(leaf, Tensor) and not torch.isfinite(leaf).all():
            raise QlabError(
                f"{graph.where(site)}.weight holds NaN or Inf; repair the checkpoint or keep() "
                "this site"
            )


def _returned(step: str, returned: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The leaves and notes that a step returned."""
    leaves, note = (
        returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    )
    if not isinstance(leaves, Mapping) or not isinstance(note, Mapping):
        raise QlabError(
            f"{step} returned a {type(returned).__name__}; return a mapping of site paths to "
            "leaves, or (that mapping, notes)"
        )
    return leaves, noted_by_step(step, note)


def _copies(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves that a step may go on to write to, and that need no gradient."""
    return {
        path: pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), leaf)
        for path, leaf in leaves.items()
    }


def _refuse_unfit(made: str, leaf: Any) -> None:
    """Refuse NaN, and codes off the grid. Shapes and specs are checked of every stage."""
    if isinstance(leaf, QTensor):
        codes = leaf.codes.float()
        if not torch.equal(leaf.spec.nearest_(codes.clone()), codes):
            raise QlabError(f"{made} with codes off the grid {leaf.spec}; round and clamp them")
    parts = [t for t in pytree.tree_leaves(leaf) if isinstance(t, Tensor)]
    if not all(torch.isfinite(t.float()).all() for t in parts):
        raise QlabError(f"{made} with NaN or Inf; keep the best leaves that are finite")


def _part(leaf: Any, expert: int) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t[expert], leaf)


def _site_errors(block: Block, site: Site, leaf: Any, needs: frozenset[Need]) -> dict[str, Any]:
    """What the report says of how far a site's leaf is from its weight."""
    W_ok = block.weight(site.path)
    if isinstance(leaf, Tensor):
        leaf = _turned(leaf, leaf, site)
    if leaf.shape != W_ok.shape:
        raise QlabError(
            f"{block.segment.where(site)} became {tuple(leaf.shape)} of {tuple(W_ok.shape)}; keep "
            "its shape"
        )
    moment = block.stats[site.path]["second_moment"] if "second_moment" in needs else None
    if W_ok.ndim == 2:
        return errors_in_notes([errors_of(W_ok, leaf, moment)])
    parts = [
        errors_of(
            W_ok[e],
            _part(leaf, e),
            None if moment is None else moment.states[e],
        )
        for e in range(len(W_ok))
    ]
    return errors_in_notes(parts)
