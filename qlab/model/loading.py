"""What the files hold of a model, loaded: one leaf, one block, or what surrounds the blocks."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.algebra.graph import Code, ModuleGraph, Op
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.errors import QlabError
from qlab.model.calls import Call
from qlab.model.online import at_attentions, at_input, at_output
from qlab.model.paper import dtype_in
from qlab.model.pieces import Piece, assemble
from qlab.model.skeleton import Skeleton


def load_leaf(skeleton: Skeleton, name: str) -> Leaf:
    """The leaf of a parameter, put together from the files: codes, or dense in the dtype in which
    the model computes with it."""
    pieces, dtype = skeleton.names.pieces(name), dtype_in(skeleton.model, name)
    return assemble(pieces, (skeleton.checkpoint.leaf(piece.name, dtype) for piece in pieces))


def load_original(skeleton: Skeleton, name: str) -> Tensor:
    """The leaf of a parameter as if it had never been quantized: dequantized, or with the bits of
    the files where they hold it dense."""
    return _original(skeleton, skeleton.names.pieces(name))


def load_matrices(skeleton: Skeleton, name: str) -> Iterator[Tensor]:
    """`load_original` of a weight, which is one matrix, or the matrix of one expert after the
    other. Where the files hold experts apart, one is in memory at a time."""
    pieces = skeleton.names.pieces(name)
    if pieces[0].expert is None:
        whole = _original(skeleton, pieces)
        yield from whole if whole.ndim > 2 else (whole,)
        return
    for _, of_expert in itertools.groupby(pieces, lambda piece: piece.expert):
        yield _original(skeleton, [replace(piece, expert=0) for piece in of_expert])[0]


def original_dtype(skeleton: Skeleton, pieces: Sequence[Piece]) -> torch.dtype:
    """The dtype of a leaf of these pieces, as `load_original` gives it."""
    checkpoint = skeleton.checkpoint
    dtypes = [
        skeleton.dtype
        if checkpoint.is_coded(piece.name)
        else checkpoint.shape_and_dtype(piece.name)[1]
        for piece in pieces
    ]
    return functools.reduce(torch.promote_types, dtypes)


def _original(skeleton: Skeleton, pieces: Sequence[Piece]) -> Tensor:
    """The leaf of which these are the pieces, as `load_original` gives it."""
    checkpoint, wide = skeleton.checkpoint, original_dtype(skeleton, pieces)

    def part(piece: Piece) -> Tensor:
        leaf = checkpoint.leaf(piece.name)
        return dense(leaf, skeleton.dtype if isinstance(leaf, QTensor) else None).to(wide)

    whole = assemble(pieces, map(part, pieces))
    assert isinstance(whole, Tensor)
    return whole


def load_block(
    skeleton: Skeleton,
    path: str,
    call: Call,
    decoded: bool = False,
    laid: Mapping[str, Callable[[Iterator[Tensor]], Any]] = MappingProxyType({}),
) -> ModuleGraph:
    """The block as a value, with its leaves loaded from the files onto the skeleton's device.

    decoded: as if it had never been quantized. All leaves are dense, with the bits of the files,
    and nothing is rounded at run time. laid: leaf -> what makes it of its matrices
    (`load_matrices`), for those that are no plain tensors here.
    """
    code = skeleton.programs.code(path, call)
    _refuse_rounded_inputs(skeleton, path, code)
    leaves = _leaves(skeleton, path, code, decoded, laid)
    online: dict[str, tuple[Op, ...]] = {}
    online_outputs: dict[str, tuple[Op, ...]] = {}
    for site in () if decoded else code.sites:
        before = at_input(skeleton, f"{path}.{site.path}")
        behind = at_output(skeleton, f"{path}.{site.path}")
        online |= {site.path: before} if before else {}
        online_outputs |= {site.path: behind} if behind else {}
    dtypes = {name: leaf.dtype for name, leaf in leaves.items() if not isinstance(leaf, QTensor)}
    computed = {name: dtype_in(skeleton.model, f"{path}.{name}") for name in dtypes}
    common = skeleton.checkpoint.dtype  # in which leaves are written that were codes
    dequantized = _quantized(skeleton, path)
    return ModuleGraph(
        code,
        leaves,
        path,
        dtype=common,
        online=online,
        online_outputs=online_outputs,
        online_values={} if decoded else at_attentions(skeleton, path, code),
        stored={
            name: dtype
            for name, dtype in dtypes.items()
            if name not in dequantized and dtype != common
        },
        held={name: dtype for name, dtype in computed.items() if dtype != dtypes[name]},
    )


def _leaves(
    skeleton: Skeleton,
    path: str,
    code: Code,
    decoded: bool,
    laid: Mapping[str, Callable[[Iterator[Tensor]], Any]],
) -> dict[str, Any]:
    """The leaves of a block's parameters and buffers, on the skeleton's device."""
    pieces = skeleton.names.block_names(path)
    checkpoint = skeleton.checkpoint
    in_file_order = sorted(pieces, key=lambda name: checkpoint.place(pieces[name][0].name))
    loaded: dict[str, Any] = {}
    for name in in_file_order:  # so that the files are hashed as they are read
        if name in laid:
            matrices = load_matrices(skeleton, f"{path}.{name}")
            loaded[name] = laid[name](t.to(skeleton.device) for t in matrices)
            continue
        load = load_original if decoded or name in code.unread else load_leaf
        leaf = load(skeleton, f"{path}.{name}")
        loaded[name] = pytree.tree_map_only(Tensor, lambda t: t.to(skeleton.device), leaf)
    leaves = {name: loaded[name] for name in pieces}
    for name, buffer in skeleton.blocks[path].named_buffers():
        leaves.setdefault(name, buffer.to(skeleton.device))
    return leaves


def _quantized(skeleton: Skeleton, path: str) -> set[str]:
    """The leaves of a block of which the files hold codes."""
    quantized = skeleton.checkpoint.quantized
    return {
        name
        for name, pieces in skeleton.names.block_names(path).items()
        if any(piece.module in quantized for piece in pieces)
    }


def _refuse_rounded_inputs(skeleton: Skeleton, path: str, code: Code) -> None:
    """Refuse inputs and outputs that are rounded at run time where the program does not show
    them."""
    for leaf, why in code.unread.items():
        module = f"{path}.{leaf}".removesuffix(".weight")
        if at_input(skeleton, module) or at_output(skeleton, module):
            raise QlabError(
                f"{module} has inputs or outputs that are rounded or rotated at run time, and "
                f"{leaf} {why}; qlab cannot run it, only convert and inspect it"
            )


def load_outside(skeleton: Skeleton, with_head: bool) -> None:
    """Fill in the parameters that no block holds: embeddings, final norm and, on demand, the
    head."""
    model, names = skeleton.model, skeleton.names
    head = model.get_output_embeddings()
    head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
    inside = tuple(f"{path}." for path in skeleton.blocks)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        left_out = id(parameter) in head_parameters and not with_head
        if name.startswith(inside) or not parameter.is_meta or left_out:
            continue
        module = name.rpartition(".")[0]
        if at_input(skeleton, module) or at_output(skeleton, module):
            raise QlabError(
                f"{name} has inputs or outputs that are rounded or rotated at run time, which "
                "qlab does inside blocks only"
            )
        # a parameter that is another one's too may be left out of the files
        source = name if names.is_spelled(name) else names.tied.get(name, name)
        leaf = skeleton.checkpoint.leaf(names.file_name(source), parameter.dtype)
        put(model, name, dense(leaf, parameter.dtype).to(skeleton.device))
    _load_buffers(skeleton, inside)


def _load_buffers(skeleton: Skeleton, inside: tuple[str, ...]) -> None:
    """What the files hold of the buffers around the blocks, and every buffer on the skeleton's
    device."""
    for name, buffer in list(skeleton.model.named_buffers(remove_duplicate=False)):
        owner, _, key = name.rpartition(".")
        stored = None if name.startswith(inside) else skeleton.names.stored_buffer(name)
        value = skeleton.checkpoint.tensor(stored).to(buffer.dtype) if stored else buffer
        if stored or not buffer.is_meta:
            skeleton.model.get_submodule(owner)._buffers[key] = value.to(skeleton.device)


def drop_outside(skeleton: Skeleton) -> None:
    """Let go of what load_outside filled in."""
    for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            put(skeleton.model, name, parameter.to("meta"))


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, and of no other that was tied to it."""
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = nn.Parameter(value, requires_grad=False)


@contextlib.contextmanager
def placed(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Tensors, which may require gradients, in the places of parameters of these names for now."""
    before: dict[str, Any] = {}
    for name, value in tensors.items():
        before[name] = _put(model, name, value)
    try:
        yield
    finally:
        for name, parameter in before.items():
            _put(model, name, parameter)


def _put(model: nn.Module, name: str, value: Any) -> Any:
    """Put a value in the place of a parameter, and return what was there."""
    owner, _, key = name.rpartition(".")
    parameters: dict[str, Any] = model.get_submodule(owner)._parameters
    before = parameters[key]
    parameters[key] = value
    return before
