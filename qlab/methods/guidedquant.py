"""GuidedQuant: tokens weigh in the second moment by the gradient of the loss at a weight's outputs.

    s_ng = mean over c in group g of (dL / dz_nc)^2       H_g = sum_n s_ng x_n^T x_n / sum_n s_ng

To second order the loss rises by the squared errors of outputs, each weighed by its own gradient
squared (the Fisher information). That would be a matrix for each output channel c. The mean over a
few groups of neighbouring channels keeps few matrices, on each of which the rows of its group are
solved (`qlab.methods.stages`). One pass backward measures s, with one segment in memory at a time.

Legend: x_nk inputs, z_nc outputs of a weight, n tokens of all windows, g groups of its rows.
Source: Kim et al. 2025 (arXiv:2505.07004).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.bind import Foreseen, Outline, bind
from qlab.algebra.graph import ModuleGraph, Site
from qlab.algebra.scope import pattern_of
from qlab.algebra.spec import Spec
from qlab.algebra.statistic import Observation, Stat
from qlab.algebra.stats import gram
from qlab.algebra.transform import Transform, at, chain
from qlab.errors import QlabError
from qlab.methods.gptq import WORKSPACE
from qlab.methods.obs import check_damp
from qlab.methods.stages import Metric, row_groups, solver

NAME = "guidedquant"
# segment -> weight of it -> s_ng, fp32, of mean 1 in every group
Saliency = Mapping[str, Mapping[str, Tensor]]


class Weighted(NamedTuple):
    """sum over tokens of s x^T x, fp32 [g, k, k], and the number of tokens."""

    sum_gkk: Tensor
    tokens: int

    @property
    def mean_gkk(self) -> Tensor:
        """The mean over tokens; without any every direction counts the same."""
        if not self.tokens:
            return torch.eye(self.sum_gkk.shape[-1], dtype=torch.float32).expand_as(self.sum_gkk)
        return self.sum_gkk / self.tokens


def guidedquant(spec: Spec, groups: int = 4, damp: float = 0.01) -> Transform:
    """GuidedQuant: the staged solver, with tokens weighed by the gradient of the loss.

    The gradients are those of the negative log likelihood in the model that the steps in front
    make, by one pass forward and one backward over the calibration windows (a `qlab.bind`). Every
    group of rows of a weight is solved on its own second moment. On the demo model at int4-g64 with
    one group it lost 13 to 20 % more on held-out tokens, in the MLP, than the plain second moment:
    the few tokens with large gradients leave few that count.

    Args:
        spec: the number grid to round to, or its name such as "int4-g64".
        groups: into how many groups of neighbouring rows a weight is taken apart, of which each
            takes a matrix [k, k]. Rows that share scales stay together.
        damp: fraction of mean(diag H) that is added to the diagonal of every H, from 0 to 1.

    Returns:
        A transform of one stage, a bind. It needs calibration data. The report of every weight
        holds J in its own metric after every stage: none is above the one before.

    Raises:
        QlabError: groups is below 1, damp is not from 0 to 1; before any work, routed experts among
            its weights, whose tokens differ between the model and what is quantized so far.

    Source:
        Kim et al. 2025, GuidedQuant: Large Language Model Quantization via Exploiting End Loss
        Guidance.

    Example:
        >>> import qlab
        >>> data = qlab.tokens("demo", "my.jsonl", samples=2, length=16)
        >>> qlab.apply("demo", qlab.guidedquant("int4-g64", groups=2), data).bits_per_weight
        4.25
    """
    check_damp(damp)
    if groups < 1:
        raise QlabError(f"groups is {groups}; give at least 1")

    def measure(model: Any) -> Saliency:
        return saliency(model, spec, groups)

    def then(found: Saliency) -> Transform:
        return chain(*_solvers(spec, damp, found))

    detail = f"{groups} {'group' if groups == 1 else 'groups'}, damp {damp:g}"
    foresee = partial(foreseen, groups)
    (stage,) = bind(NAME, measure, then, detail, foresee, spec, divided=True)
    return (replace(stage, workspace=WORKSPACE),)


def foreseen(groups: int, outline: Outline) -> Foreseen:
    """One pass backward of all windows. Refuses routed experts, and no windows."""
    if not outline.windows:
        raise QlabError(f"{NAME} measures on calibration text and none was given; give data")
    for graph in outline.segments:
        _sites(graph)
    # the second moment of a group takes about as long as running its weight on all tokens
    windows = outline.windows
    return Foreseen(
        forward=groups * windows,
        backward=windows,
        at_once=windows,
        in_a_pass=windows,
        moments=groups,
    )


# ------------------------------------------------------------------ what is measured
def saliency(model: Any, spec: Spec, groups: int) -> Saliency:
    """s of every selected weight of a `qlab.Model` and every token, one pass backward."""
    squares: dict[str, dict[str, list[Tensor]]] = {}

    def watched(path: str, graph: ModuleGraph) -> ModuleGraph:
        squares[path] = {site.path: [] for site in _sites(graph)}
        for site in _sites(graph):
            rows = row_groups(_shape(graph, site), spec, groups)
            watch = _Watch(rows, squares[path][site.path])
            graph = graph.inserting(f"{site.path}:out", watch)
        return graph

    model.vjp(model.nll, changed=watched)
    return {
        path: {site: relative(torch.cat(model.of_all_windows(s))) for site, s in of_segment.items()}
        for path, of_segment in squares.items()
    }


def _shape(graph: ModuleGraph, site: Site) -> torch.Size:
    """[o, k] of a weight."""
    shape = graph.params[site.weight or ""].shape
    return torch.Size(reversed(shape)) if site.layout == "k o" else shape


def relative(s_ng: Tensor) -> Tensor:
    """s over its mean in every group. Where no token has a gradient all count the same."""
    mean_g = s_ng.double().mean(0)
    return torch.where(mean_g > 0, s_ng / mean_g, 1.0).float()


class _Watch:
    """x -> x, which notes the mean square of its gradient in every group of channels: one tensor
    [n, g] for each window that goes backward."""

    def __init__(self, groups: Sequence[slice], of_windows: list[Tensor]):
        self.groups, self.of_windows = groups, of_windows
        self.last: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        # an output that several read passes here for each of them, with the gradient of all
        if torch.is_grad_enabled() and x is not self.last:
            self.last = x
            s_ng = torch.zeros(x[..., 0].numel(), len(self.groups), dtype=torch.float32)
            self.of_windows.append(s_ng)
            if x.requires_grad:
                x.register_hook(lambda grad: self._note(grad, s_ng))
        return x

    def _note(self, grad: Tensor, s_ng: Tensor) -> None:
        squares_nc = grad.detach().float().flatten(0, -2).square()
        for g, rows in enumerate(self.groups):
            s_ng[:, g] = squares_nc[:, rows].mean(1)


def _sites(graph: ModuleGraph) -> list[Site]:
    """The weights that are solved. Refuses routed experts."""
    sites = [site for site in graph.sites if not site.router]
    routed = [graph.where(site) for site in sites if site.route]
    if routed:
        raise QlabError(
            f"{NAME} weighs tokens that go the same way in the model and in what is quantized so "
            f"far, and {routed[0]} is of routed experts; give them another method, with qlab.rules"
        )
    return sites


# ------------------------------------------------------------------ what is solved
def _solvers(spec: Spec, damp: float, found: Saliency) -> Iterator[Transform]:
    """A solver for every weight of a block, which all blocks alike share."""
    names: dict[str, list[str]] = {}
    for segment, of_segment in found.items():
        for path in of_segment:
            names.setdefault(path, []).append(f"{segment}.{path}")
    for path, of_path in names.items():
        metric = by_gradient(path, found)
        yield at(pattern_of(of_path), solver(spec, damp=damp, metric=metric))


def by_gradient(path: str, found: Saliency) -> Metric:
    """The metric of one weight of a block. path: its name there."""

    def lift(o: Observation) -> Weighted:
        s_ng = found[o.segment][path][o.keys.cpu()].to(o.x_nk.device)
        return weighted(o.x_nk, s_ng)

    groups = max(of_segment[path].shape[1] for of_segment in found.values() if path in of_segment)
    nothing = lambda k: Weighted(torch.zeros(groups, k, k, dtype=torch.float32), 0)
    name = f"{NAME} of {path}"  # weights of one input each have their own, which ranks tell apart
    stat = Stat(lift, added, nothing=nothing, name=name)
    return Metric(NAME, frozenset({stat}), lambda stats: stats[name].mean_gkk)


def added(a: Weighted, b: Weighted) -> Weighted:
    """The sums over the tokens of both."""
    return Weighted(a.sum_gkk + b.sum_gkk, a.tokens + b.tokens)


def weighted(x_nk: Tensor, s_ng: Tensor) -> Weighted:
    """sum_n s_ng x_n^T x_n of every group g."""
    sums = [gram(x_nk.float() * s_n.sqrt()[:, None]) for s_n in s_ng.unbind(1)]
    return Weighted(torch.stack(sums), len(x_nk))
