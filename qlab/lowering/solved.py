"""A model whose blocks are solved in memory, as a fast module: no directory lies between."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlab.algebra.graph import ModuleGraph, Op, Site
from qlab.algebra.leaf import dense
from qlab.algebra.online import MatMul, QuantizeInput
from qlab.algebra.qtensor import QTensor
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.lowering.around.attended import Attended, attended_of
from qlab.lowering.around.rotated import Rotations
from qlab.lowering.assembling import owner_of, plain, set_module
from qlab.lowering.weights.modules import QExperts, QLinear
from qlab.lowering.weights.setting import Activations
from qlab.model.skeleton import Skeleton


class SolvedBlock(Protocol):
    """A block before and after it was solved."""

    @property
    def before(self) -> ModuleGraph: ...

    @property
    def after(self) -> ModuleGraph: ...


@runtime_checkable
class SolvedModel(Protocol):
    """A model that is solved while it is asked for, one block in memory at a time.

    model: where its leaves come from. solved(): its blocks. around(): the weights outside the
    blocks that are no longer the model's, by their names in it.
    """

    @property
    def model(self) -> Checkpoint: ...

    def solved(self) -> Iterator[SolvedBlock]: ...

    def around(self) -> Iterator[tuple[str, Any]]: ...


@dataclass(frozen=True)
class Place:
    """Where and how weights are held: arguments of `qlab.lower`."""

    dtype: torch.dtype
    device: torch.device
    dense_cache: bool
    activations: Activations | None = None


@dataclass(frozen=True)
class Left:
    """What is put into the model when every weight is there: matrices at the linears, buffers that
    steps changed, and operations on what attention reads. around: the names of the weights around
    the blocks that steps changed."""

    rotations: Rotations
    buffers: dict[str, Tensor]
    around: frozenset[str]
    attended: Attended


def put_solved(skeleton: Skeleton, solved: SolvedModel, place: Place) -> Left:
    """Put every solved leaf into the model, block by block; codes in packed modules."""
    around = set()
    for name, leaf in solved.around():
        _put(skeleton.model, name, leaf, place)
        around.add(name)
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    buffers: dict[str, Tensor] = {}
    attended: dict[str, Any] = {}
    for block in solved.solved():
        attended |= attended_of(skeleton.model, block.after)
        pairs |= _put_block(skeleton.model, block.after, place)
        buffers |= _changed_buffers(skeleton.model, block)
        del block  # lets go of it before the next one is solved
    return Left(rotations=pairs, buffers=buffers, around=frozenset(around), attended=attended)


def put_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Put tensors in the places of buffers, in the dtype of each."""
    for name, value in buffers.items():
        owner, key = owner_of(model, name), name.rpartition(".")[2]
        owner._buffers[key] = value.to(owner._buffers[key])


def _put_block(model: PreTrainedModel, graph: ModuleGraph, place: Place) -> dict[str, Any]:
    """Put the leaves of a block into the model, biases first, since packed linears take them; the
    matrices at its linears."""
    sites = {site.weight: site for site in graph.code.sites}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    pairs: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for name in sorted(graph.params, key=lambda name: name in sites):
        full, leaf = f"{graph.path}.{name}", graph.params[name]
        if full not in parameters:
            continue  # a buffer
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaf = leaf.to(graph.stored_dtype(name))
        inputs = None
        if name in sites:
            inputs, pair = _online(graph, sites[name])
            module = full.removesuffix(".weight")
            pairs |= {module: pair} if pair != (None, None) else {}
        _put(model, full, leaf, place, inputs)
    return pairs


def _put(
    model: PreTrainedModel, name: str, leaf: Any, place: Place, inputs: QuantizeInput | None = None
) -> None:
    """Put a leaf in the place of a parameter: codes of a linear and of experts in packed modules,
    any other leaf dense."""
    owner, parameter = owner_of(model, name), model.get_parameter(name)
    how = (place.dtype, place.device, place.dense_cache)
    rounding: Any = {"inputs": inputs, "activations": place.activations}
    module = name.removesuffix(".weight")
    if isinstance(leaf, QTensor) and leaf.codes.ndim == 3:
        set_module(model, name, QExperts(name, leaf, *how, **rounding))
    elif isinstance(leaf, QTensor):
        set_module(model, module, QLinear(module, leaf, _bias(owner), *how, **rounding))
    elif isinstance(leaf, Tensor):
        value = leaf.to(place.device, parameter.dtype)
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(value, requires_grad=False)
    elif len(leaf.shape) == 2:
        weight = dense(leaf, parameter.dtype)
        set_module(model, module, plain(weight, _bias(owner), parameter.dtype, place.device))
    else:
        raise QlabError(
            f"{name} holds its experts as a {type(leaf).__name__}, which no lowered module does; "
            "evaluate the value of qlab.apply, or make tensors or codes of it"
        )


def _bias(linear: nn.Module) -> Tensor | None:
    """The bias of a linear, which was put there before its weight."""
    return linear._parameters.get("bias")


def _online(
    graph: ModuleGraph, site: Site
) -> tuple[QuantizeInput | None, tuple[Tensor | None, Tensor | None]]:
    """How the inputs of a site are rounded, and the matrices at its input and output. Refuses what
    no lowered module does at run time."""
    before = list(graph.online.get(site.path, ()))
    behind = list(graph.online_outputs.get(site.path, ()))
    is_coded = isinstance(graph.params[site.weight or ""], QTensor)
    last = before[-1] if before else None
    rounding = last if is_coded and isinstance(last, QuantizeInput) else None
    if rounding is not None:
        before.pop()
    matrices = [*before, *behind]
    is_linear = site.route is None and len(before) <= 1 and len(behind) <= 1
    if matrices and not (is_linear and all(isinstance(op, MatMul) for op in matrices)):
        kinds = ", ".join(sorted({type(op).__name__ for op in matrices}))
        raise QlabError(
            f"{graph.where(site)} still needs {kinds} at run time, which lowered modules do not "
            "do there; evaluate the value of qlab.apply instead"
        )
    return rounding, (_matrix(before), _matrix(behind))


def _matrix(ops: Sequence[Op]) -> Tensor | None:
    """That of the one product among operations, if there is one."""
    return next((op.M_nn for op in ops if isinstance(op, MatMul)), None)


def _changed_buffers(model: PreTrainedModel, block: SolvedBlock) -> dict[str, Tensor]:
    """The buffers of a block that steps changed, by their names in the model."""
    names = dict(model.get_submodule(block.after.path).named_buffers())
    buffers: dict[str, Tensor] = {}
    for name in names.keys() & block.after.params.keys():
        new, old = block.after.params[name], block.before.params[name]
        if new is not old and not torch.equal(dense(new), dense(old)):
            buffers[f"{block.after.path}.{name}"] = dense(new)
    return buffers
