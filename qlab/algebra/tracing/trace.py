"""From a module to a value: torch.export of one segment, and the sites that its program shows."""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qlab.algebra.experts import EXPERT_OPS
from qlab.algebra.graph import (
    LAYOUT,
    RESHAPES,
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    Left,
    ModuleGraph,
    Site,
    aten,
    behind_casts,
    is_matrix,
    open_symbols,
    tensors_of,
)
from qlab.algebra.qtensor import Leaf
from qlab.algebra.tracing.as_it_is import (
    AsItIs,
    Finder,
    UntracedModules,
    gather_untraced,
    stood_in,
)
from qlab.algebra.tracing.on_tensors import OnTensors, without_values
from qlab.algebra.tracing.routers import is_router
from qlab.algebra.tracing.stretches import Stretch, Stretched, gather_stretches
from qlab.algebra.tracing.survey import Survey, survey
from qlab.algebra.tracing.unrolled import deciding_sizes
from qlab.errors import QlabError, first_line
from qlab.process.surroundings import foreign

TRANSPOSES = (
    aten.numpy_T.default,
    aten.t.default,
    aten.mT.default,
    aten.transpose.int,
    aten.permute.default,
)


def trace(
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    path: str = "",
    untraced: UntracedModules | None = None,
) -> ModuleGraph:
    """torch.export (non-strict) of one segment with weights lifted to inputs and input dimensions
    dynamic.

    `args` and `kwargs` are example inputs; tensor dimensions of size 1 are fixed to 1, and those
    that decide which operations run to their size; the others stay symbolic.
    A weight that an operation uses in a way qlab cannot read is no site, and `Code.unread` says
    why. The smallest modules that export cannot follow, at most the whole segment, run as they are:
    each is one operation, and none of its weights is a site. untraced: such modules, where they are
    known beforehand. Refuses by name a segment that does not run.
    """
    where = path or type(module).__name__
    exported = _followed(module, args, kwargs, where, untraced or {})
    graph, tensors = exported.program.graph, tensors_of(args, kwargs)
    if exported.stretched and exported.surveyed is not None:
        on_tensors = OnTensors(exported.segment, args, kwargs)
        gather_stretches(graph, on_tensors, exported.surveyed, len(tensors))
    gather_untraced(graph, module, exported.untraced)
    _unpin(graph)
    _name_linears(graph)
    code = _code(exported)
    return ModuleGraph(
        code=code, params=_leaves(module, code.params.values()), path=path, dtype=_dtype(module)
    )


@dataclass(frozen=True, kw_only=True)
class _Exported:
    """A segment as torch.export gives it. segment: what was exported, with stand-ins in the places
    of the untraced modules. left: what it makes of its arguments. stretched: whether its long
    stretches are cut out."""

    program: Any
    segment: nn.Module
    left: Left | None
    surveyed: Survey | None
    stretched: bool
    untraced: UntracedModules


def _followed(
    module: nn.Module, args: tuple, kwargs: dict[str, Any], where: str, untraced: UntracedModules
) -> _Exported:
    """Export a segment. Modules that export does not follow are found, and it is exported again
    with these as they are."""
    refused: Exception | None = None
    while True:
        finder = Finder(module, untraced)
        try:
            with foreign, _unremembered():
                exported = _exported(finder, args, kwargs, refused)
            if finder.modules == untraced:
                return exported
        except Exception as error:
            if finder.modules == untraced and refused is not None:
                raise QlabError(
                    f"{where} ({type(module).__name__}) cannot be traced by torch.export: "
                    f"{first_line(refused)}"
                ) from error
            refused = error
        if finder.modules != untraced:
            untraced, refused = finder.modules, None


def _unremembered() -> AbstractContextManager[None]:
    """Within it, torch does not remember what operations make of which forms. That is a third of a
    trace: where sizes are symbols, few operations come twice."""
    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


def _exported(
    finder: Finder, args: tuple, kwargs: dict[str, Any], refused: Exception | None
) -> _Exported:
    """Export a segment under a finder, with each of its long stretches as one operation where that
    can be."""
    untraced = finder.modules
    segment, tensors = stood_in(finder.segment, untraced), tensors_of(args, kwargs)
    surveyed = survey(segment, args, kwargs)
    fixed = {1, *deciding_sizes(segment, args, kwargs, surveyed is not None)}
    auto = tuple(
        {axis: torch.export.Dim.AUTO for axis, n in enumerate(t.shape) if n not in fixed}
        for t in tensors
    )

    def export(follow: Callable[..., OnTensors], *beside: Survey) -> _Exported:
        copied, fakes = without_values(segment, tensors)
        finder.watch(copied, refused)
        on_tensors = follow(copied, args, kwargs, *beside)
        program = torch.export.export(on_tensors, fakes, dynamic_shapes=(auto,), strict=False)
        return _Exported(
            program=program,
            segment=segment,
            left=on_tensors.after.left,
            surveyed=surveyed,
            stretched=bool(beside),
            untraced=untraced,
        )

    if surveyed is not None and surveyed.stretches:
        try:
            return export(Stretched, surveyed)
        except Exception:  # whatever cannot be cut out; the whole may still be traced
            if finder.modules != untraced:
                raise
    return export(OnTensors)


def _code(exported: _Exported) -> Code:
    """The program as a value, with the sites that it shows."""
    graph, signature = exported.program.graph, exported.program.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    params = {name: target.removeprefix("segment.") for name, target in lifted.items()}
    constants = {
        name: exported.program.constants[key]
        for name, key in signature.inputs_to_lifted_tensor_constants.items()
    }
    out_spec = exported.program.call_spec.out_spec
    assert out_spec is not None  # an exported program always has one
    entering = [
        node
        for node in graph.nodes
        if node.op == "placeholder" and node.name not in {**params, **constants}
    ]
    sites, explained = _sites(graph, params)
    parameters = {name: params[name] for name in signature.inputs_to_parameters}
    unread = _unread(graph, parameters, explained, entering)
    return Code(
        graph=graph,
        params=params,
        constants=constants,
        inputs=tuple(_sizes(node.meta["val"]) for node in entering),
        outputs=tuple(
            x.meta["val"] if isinstance(x, fx.Node) else x for x in graph.output_node().args[0]
        ),
        out_spec=out_spec.child(0),
        left=exported.left,
        sites=tuple(site for site in sites if site.weight not in unread),
        unread=unread,
        kept=exported.surveyed.kept if exported.surveyed is not None else (),
    )


def _leaves(module: nn.Module, used: Collection[str]) -> dict[str, Leaf]:
    """The module's parameters, and the buffers that its program uses."""
    leaves: dict[str, Leaf] = {
        name: t.detach() for name, t in module.named_parameters(remove_duplicate=False)
    }
    return leaves | {
        name: t for name, t in module.named_buffers(remove_duplicate=False) if name in used
    }


def _dtype(module: nn.Module) -> torch.dtype:
    """Of the first parameter or buffer."""
    return next((t.dtype for t in (*module.parameters(), *module.buffers())), torch.float32)


def _unpin(graph: fx.Graph) -> None:
    """Drop what holds on the device and in the dtype of the trace alone: checks of both, and views,
    which need the strides that an operation happens to give there."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default


def _name_linears(graph: fx.Graph) -> None:
    """x @ W.T is linear(x, W), and W @ x the same with both sides turned: one name for one product,
    as which sites, absorb and lower know it."""
    for node in list(graph.nodes):
        if node.target is aten.matmul.default and _stores_matrix(node.args[0]):
            _turn_product(graph, node)
            continue
        if node.target not in (aten.matmul.default, aten.mm.default):
            continue
        left, right = node.args
        if _turns_matrix(right):
            node.target, node.args = aten.linear.default, (left, right.args[0])
            if not right.users:
                graph.erase_node(right)


def _stores_matrix(node: fx.Node) -> bool:
    """Whether this is a stored matrix, behind casts or not."""
    return behind_casts(node).op == "placeholder" and node.meta["val"].ndim == 2


def _turn_product(graph: fx.Graph, node: fx.Node) -> None:
    """W @ x becomes linear(x.mT, W).mT."""
    weight, x = node.args
    if x.meta["val"].ndim < 2 or _stores_matrix(x):
        return
    with graph.inserting_before(node):
        turned = graph.call_function(aten.transpose.int, (x, -2, -1))
        product = graph.call_function(aten.linear.default, (turned, weight))
        back = graph.call_function(aten.transpose.int, (product, -2, -1))
    turned.meta["val"], product.meta["val"], back.meta["val"] = (
        x.meta["val"].mT,
        node.meta["val"].mT,
        node.meta["val"],
    )
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _turns_matrix(node: fx.Node) -> bool:
    """Whether this is the transpose of a stored matrix, in any of its spellings."""
    if (
        node.target not in TRANSPOSES
        or node.meta["val"].ndim != 2
        or behind_casts(node.args[0]).op != "placeholder"
    ):
        return False
    axes = (node.args[1] if node.target is aten.permute.default else node.args[1:]) or (1, 0)
    return axes[0] % 2 != axes[1] % 2


def _sizes(t: Tensor) -> tuple[int | None, ...]:
    return tuple(None if open_symbols(d) else int(d) for d in t.shape)


def root(node: fx.Node) -> fx.Node:
    """The node behind casts, copies and reshapes that keep the channel axis."""
    while node.op == "call_function":
        keeps = (
            node.target in RESHAPES
            and node.meta["val"].shape[-1] == node.args[0].meta["val"].shape[-1]
        )
        if node.target not in SAME_VALUES and not keeps:
            break
        node = node.args[0]
    return node


def _sites(graph: fx.Graph, params: Mapping[str, str]) -> tuple[tuple[Site, ...], set[tuple]]:
    """The sites, and the uses (user, node) of parameters that they account for."""
    sites, explained = [], set()
    for node in graph.nodes:
        if node.target not in WEIGHT_OPS:
            continue
        x_at, w_at, b_at, layout = WEIGHT_OPS[node.target]
        chain = _through_casts(node.args[w_at])
        leaf = chain[-1].name
        if leaf not in params:
            continue  # attention's own products, or a derived weight that _refuse_unknown finds
        bias = node.args[b_at] if b_at is not None and len(node.args) > b_at else None
        bias_path = params.get(bias.name) if bias is not None else None
        x, experts = root(node.args[x_at]), {}
        if node.target in EXPERT_OPS:
            route = node.args[3].args[0]  # ends are one of the results of a route
            experts = {
                "route": route.name,
                "choices": int(route.args[0].meta["val"].shape[-1]),
                "gathered_from": root(x.args[0]).name if x.target is aten.index.Tensor else None,
            }
        sites.append(
            Site(
                path=_module(params[leaf]),
                weight=params[leaf],
                bias=bias_path,
                source=x.name,
                layout=layout,
                router=is_router(node),
                **experts,
            )
        )
        explained |= set(zip((node, *chain), chain))
        explained |= {(node, bias)}
    return tuple(sites), explained


def _module(path: str) -> str:
    """The module of a leaf called `weight`; fused experts hold several weights and are called by
    the leaf's own path."""
    return path.removesuffix("weight").rstrip(".") or path


def _through_casts(node: fx.Node) -> list[fx.Node]:
    chain = [node]
    while behind_casts(chain[-1]) is not chain[-1]:
        chain.append(chain[-1].args[0])
    return chain


def _unread(
    graph: fx.Graph, params: Mapping[str, str], explained: set, entering: list[fx.Node]
) -> dict[str, str]:
    """The matrices among the parameters that are no site's weight, each with the reason. A matrix
    whose numbers are used one by one is none of them: as factors (a state-space model's A), or as a
    filter of each channel. Nor are buffers (masks, tables of positions)."""
    computed = set(entering)  # what depends on the segment's inputs, beyond their sizes
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor | list | tuple) and not computed.isdisjoint(
            node.all_input_nodes
        ):
            computed.add(node)
    unread: dict[str, str] = {}
    for node in graph.nodes:
        if (
            node.op != "placeholder"
            or node.name not in params
            or not is_matrix(node.meta["val"].shape)
        ):
            continue
        shape = tuple(node.meta["val"].shape)
        products = [user for user in node.users if (user, node) in explained]
        others = [
            user
            for user in node.users
            if user not in products and (products or not _number_by_number(user, node, computed))
        ]
        if others:
            unread[params[node.name]] = f"{shape} {_use(others[0], node)}"
        elif len(products) > 1:
            unread[params[node.name]] = (
                f"{shape} is used by two operations, {products[0]} and {products[1]}"
            )
    return unread


def _use(node: fx.Node, weight: fx.Node) -> str:
    """How an operation uses a weight in which no weight is read; of a stretch, one inside it."""
    if isinstance(node.target, AsItIs):
        return node.target.known.why
    inside = isinstance(node.target, Stretch)
    operation = node.meta["unread"].get(weight, "a loop") if inside else node.target
    return f"is used by {operation}, in which qlab reads no weight"


def _number_by_number(node: fx.Node, weight: fx.Node, computed: set[fx.Node]) -> bool:
    """Whether an operation, and those on what it makes without the input, sum over no channels of
    the weight and the input."""
    if isinstance(node.target, Stretch):
        return weight not in node.meta["unread"]
    # The weight is [o, k, w]; where k is 1, each channel has a filter of its own.
    if node.target is aten.conv1d.default:
        return node.args[1] is weight and weight.meta["val"].shape[1] == 1
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    if not pointwise and node.target not in LAYOUT | SAME_VALUES:
        return False
    return node in computed or all(_number_by_number(user, node, computed) for user in node.users)
