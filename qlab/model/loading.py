"""What the files hold of a model, loaded: one leaf, one block, or what surrounds the blocks."""

import functools

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.qtensor import Leaf, QTensor, dense
from qlab.errors import QlabError
from qlab.model.calls import Call
from qlab.model.online import at_input, at_output
from qlab.model.paper import dtype_in
from qlab.model.pieces import assemble
from qlab.model.skeleton import Skeleton


def load_leaf(skeleton: Skeleton, name: str) -> Leaf:
    """The leaf of a parameter, put together from the files: codes, or dense in the dtype that
    the model holds it in."""
    pieces = skeleton.names.pieces(name)
    return assemble(
        pieces,
        [skeleton.checkpoint.leaf(piece.name, dtype_in(skeleton.model, name)) for piece in pieces],
    )


def load_original(skeleton: Skeleton, name: str) -> Tensor:
    """The leaf of a parameter as if it had never been quantized: with the bits of the files
    where they hold it dense."""
    pieces = skeleton.names.pieces(name)
    leaves = [skeleton.checkpoint.leaf(piece.name) for piece in pieces]
    parts = [dense(leaf, skeleton.dtype) if isinstance(leaf, QTensor) else leaf for leaf in leaves]
    wide = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    whole = assemble(pieces, [part.to(wide) for part in parts])
    assert isinstance(whole, Tensor)
    return whole


def load_block(skeleton: Skeleton, path: str, call: Call, decoded: bool = False) -> ModuleGraph:
    """The block as a value, with its leaves loaded from the files onto the skeleton's device.

    decoded: as if it had never been quantized, all leaves dense, with the bits of the files,
    and no input rounded at run time.
    """
    code = skeleton.programs.code(path, call)
    _refuse_rounded_inputs(skeleton, path, code)
    leaves: dict[str, Leaf] = {}
    dequantized: set[str] = set()  # written in the checkpoint's own dtype
    names = skeleton.names.block_names(path)
    for name in sorted(names, key=lambda name: skeleton.checkpoint.place(names[name][0].name)):
        pieces = names[name]
        dense_one = decoded or name in code.unread
        leaf = (
            load_original(skeleton, f"{path}.{name}")
            if dense_one
            else load_leaf(skeleton, f"{path}.{name}")
        )
        leaves[name] = pytree.tree_map_only(Tensor, lambda t: t.to(skeleton.device), leaf)
        dequantized |= (
            {name}
            if any(piece.module in skeleton.checkpoint.quantized for piece in pieces)
            else set()
        )
    leaves = {name: leaves[name] for name in names}
    for name, buffer in skeleton.blocks[path].named_buffers():
        leaves.setdefault(name, buffer.to(skeleton.device))
    own = {name: leaf.dtype for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    stored = {name: dtype for name, dtype in own.items() if name not in dequantized}
    held = {name: dtype_in(skeleton.model, f"{path}.{name}") for name in own}
    sites = () if decoded else code.sites
    online = {
        site.path: ops for site in sites if (ops := at_input(skeleton, f"{path}.{site.path}"))
    }
    outputs = {
        site.path: ops for site in sites if (ops := at_output(skeleton, f"{path}.{site.path}"))
    }
    return ModuleGraph(
        code,
        leaves,
        path,
        dtype=skeleton.checkpoint.dtype,
        online=online,
        online_outputs=outputs,
        stored={
            name: dtype for name, dtype in stored.items() if dtype != skeleton.checkpoint.dtype
        },
        held={name: dtype for name, dtype in held.items() if dtype != own[name]},
    )


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
    head = skeleton.model.get_output_embeddings()
    head_parameters = {id(p) for p in head.parameters()} if head is not None else set()
    inside = tuple(f"{path}." for path in skeleton.blocks)
    for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if (
            name.startswith(inside)
            or not parameter.is_meta
            or (id(parameter) in head_parameters and not with_head)
        ):
            continue
        file_name = skeleton.names.file_name(name)
        if not skeleton.names.is_spelled(name):  # left out of the files where it is another's
            file_name = skeleton.names.file_name(skeleton.names.tied.get(name, name))
        if at_input(skeleton, module := name.rpartition(".")[0]) or at_output(skeleton, module):
            raise QlabError(
                f"{name} has inputs or outputs that are rounded or rotated at run time, which "
                "qlab does inside blocks only"
            )
        value = skeleton.checkpoint.leaf(file_name, parameter.dtype)
        _set(skeleton.model, name, dense(value, parameter.dtype).to(skeleton.device))
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
            _set(skeleton.model, name, parameter.to("meta"))


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._parameters[key] = nn.Parameter(value, requires_grad=False)
