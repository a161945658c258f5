"""What the leaves of a solved block become in files, and what is certified of them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph, Op
from qlab.algebra.leaf import Fetched
from qlab.algebra.online import matrix_of
from qlab.algebra.qtensor import Leaf, QTensor
from qlab.algebra.transform import Transform
from qlab.algebra.wires import full_name
from qlab.codecs import Codec
from qlab.driver.report import known_distances
from qlab.errors import QlabError
from qlab.files.certificate import distances, fingerprint, hash_of, off_grid
from qlab.model.calls import Call
from qlab.model.paper import dtype_in
from qlab.model.pieces import Piece
from qlab.model.skeleton import Skeleton
from qlab.process.later import Later


def as_stored(skeleton: Skeleton, graph: ModuleGraph) -> dict[str, Leaf]:
    """A block's leaves by their names in the files, each unquantized one in its own stored dtype;
    experts one by one.

    One that no step changed still has the bits of the files, as the block was loaded.
    """
    leaves: dict[str, Leaf] = {}
    for name, leaf in graph.params.items():
        if not skeleton.writes(f"{graph.path}.{name}"):
            continue
        for piece in written_as(skeleton, graph, name):
            part = piece.of(leaf)
            if not isinstance(part, QTensor):
                part = part.to(skeleton.names.stored_dtype(piece))
            leaves[piece.name] = part
    return leaves


def as_read(skeleton: Skeleton, call: Call, before: ModuleGraph, after: ModuleGraph) -> ModuleGraph:
    """A solved block as a model of another dtype holds it that was read from files of it.

    Unquantized leaves have the dtype in which they are stored; a leaf that no file holds is as it
    is, or the model's own where no step changed it.

    Args:
        skeleton: The model, in the dtype in which it will run.
        call: A call of the block there.
        before: The block before any step.
        after: The block as it was solved.
    """
    path = after.path
    names, block = skeleton.names.block_names(path), skeleton.blocks[path]
    buffers = dict(block.named_buffers())
    leaves: dict[str, Leaf] = {}
    for name, leaf in after.params.items():
        if name not in names and same(leaf, before.params.get(name)):
            leaf = buffers[name]
        elif name in names and isinstance(leaf, Tensor):
            leaf = leaf.to(skeleton.names.stored_dtype(names[name][0]))
        leaves[name] = pytree.tree_map_only(Tensor, lambda t: t.to(skeleton.device), leaf)
    dtypes = {name: leaf.dtype for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    running = {name: dtype_in(skeleton.model, f"{path}.{name}") for name in dtypes}
    return replace(
        after,
        code=skeleton.programs.code(path, call),
        params=leaves,
        stored={name: dtype for name, dtype in dtypes.items() if dtype != after.dtype},
        held={name: dtype for name, dtype in running.items() if dtype != dtypes[name]},
    )


def changed(skeleton: Skeleton, loaded: ModuleGraph, solved: ModuleGraph) -> set[str]:
    """The names in the files of what steps made another, and did not quantize."""
    others = [
        name for name, leaf in solved.params.items() if not same(leaf, loaded.params.get(name))
    ]
    return {piece.name for name in others for piece in written_as(skeleton, solved, name)}


def same(leaf: Leaf, other: Leaf | None) -> bool:
    """Whether two leaves are one, or tensors of the same numbers."""
    if leaf is other or not isinstance(leaf, Tensor) or not isinstance(other, Tensor):
        return leaf is other
    return leaf.dtype == other.dtype and torch.equal(leaf, other)


def written_as(skeleton: Skeleton, graph: ModuleGraph, name: str) -> Sequence[Piece]:
    """The tensors as which a leaf is written: as it was stored, but quantized experts by the names
    that engines expect."""
    leaf, path = graph.params[name], f"{graph.path}.{name}"
    if isinstance(leaf, QTensor) and len(leaf.shape) == 3:
        return skeleton.names.expert_pieces(path)
    return skeleton.names.block_names(graph.path).get(name, ())  # a buffer has none


def refuse_unwritten(skeleton: Skeleton, before: ModuleGraph, graph: ModuleGraph) -> None:
    """Refuse what a recipe did to a block that no tensor of the files holds, by name."""
    outputs = [path for path, ops in graph.online_outputs.items() if ops]
    if outputs:
        raise QlabError(
            f"{graph.path}.{outputs[0]} still needs an operation on its output at run time, for "
            "which no format has a place; fold it into the weights, or leave the method out"
        )
    values = [wire for wire in graph.inserts if wire in graph.online_values]
    if values:
        raise QlabError(
            f"{full_name(graph.path, values[0])} still needs an operation at run time, for which "
            "the format has no place; evaluate the recipe with qlab.apply, or leave the method out"
        )
    for name, leaf in graph.params.items():
        if not isinstance(leaf, Tensor | QTensor):
            raise QlabError(
                f"the recipe made {graph.path}.{name} a {type(leaf).__name__}, which no format "
                "holds; make it a tensor or codes before it is written"
            )
        if leaf is not before.params[name] and not written_as(skeleton, graph, name):
            raise QlabError(
                f"the recipe changed {graph.path}.{name}, a buffer that the files do not hold; "
                "leave it as it is"
            )


def online_at(skeleton: Skeleton, graph: ModuleGraph, codec: Codec) -> dict[str, tuple[Op, ...]]:
    """What still happens to inputs at run time, by the leaves' names in the files; refused where
    the format has no place for it."""
    online: dict[str, tuple[Op, ...]] = {}
    for site in graph.code.sites:
        ops = graph.online.get(site.path, ())
        if not ops:
            continue
        leaf = graph.params[site.weight or ""]
        if isinstance(leaf, QTensor):
            reason = codec.refusal(leaf.spec, ops)
        elif codec.around and all(matrix_of(op) is not None for op in ops):
            continue  # matrices stand by themselves
        else:
            reason = "its weight is not quantized"
        if reason:
            raise QlabError(f"{graph.where(site)} still needs an operation at run time: {reason}")
        online |= {piece.name: ops for piece in written_as(skeleton, graph, site.weight or "")}
    return online


def encode(
    leaves: Mapping[str, Leaf], codec: Codec, online: Mapping[str, tuple[Op, ...]]
) -> dict[str, Tensor]:
    """The tensors of these leaves: codes packed by the codec, everything else as it is; refuses NaN
    and Inf in that."""
    tensors: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, QTensor):
            tensors[name] = _finite(name, leaf)
            continue
        fault = off_grid(leaf)
        if fault:
            raise QlabError(f"{name}: {fault}; round to the grid of its spec")
        ops = [online[name]] if name in online else []
        tensors |= codec.encode(name.rpartition(".")[0], leaf, *ops)
    return tensors


def _finite(name: str, leaf: Tensor) -> Tensor:
    is_number = leaf.is_floating_point() and leaf.itemsize > 1  # 8 bits are codes
    # the sum is the cheaper question
    if is_number and not leaf.sum().isfinite() and not torch.isfinite(leaf).all():
        raise QlabError(f"{name} holds NaN or Inf; repair the checkpoint")
    return leaf


def originals(skeleton: Skeleton, graph: ModuleGraph) -> dict[str, Tensor]:
    """The weights [o, k] of a block before any step, by their names in the files. Weights that the
    files hold as codes are left out: they were dequantized to another dtype than a certificate is
    computed in. So are those of which this process has some rows."""
    weights: dict[str, Tensor] = {}
    for name, pieces in skeleton.names.block_names(graph.path).items():
        leaf = graph.params[name]
        for piece in pieces if not isinstance(leaf, Fetched) else ():
            part = piece.of(leaf)
            if isinstance(part, Tensor) and piece.module not in skeleton.checkpoint.quantized:
                weights[piece.name] = part
    return weights


def certificates(
    skeleton: Skeleton,
    leaves: Mapping[str, Leaf],
    originals: Mapping[str, Tensor],
    known: Mapping[str, Mapping[str, float]],
) -> dict[str, dict[str, Any]]:
    """Module -> the certificate of its quantized weight, for every one among the leaves of a block.

    Args:
        skeleton: The model.
        leaves: What is written, by its names in the files.
        originals: What was read, as of `originals`. What is not there is read again; what the files
            hold by no such name is certified by its hash alone.
        known: Distances that a step measured, by names in the files.
    """
    certified: dict[str, Mapping[str, Any]] = {}
    digests: dict[str, Later[str]] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, QTensor):
            continue
        module = name.rpartition(".")[0]
        original: Leaf | None = None
        if name in skeleton.checkpoint.stored:
            original = originals[name] if name in originals else skeleton.checkpoint.leaf(name)
        if isinstance(original, Tensor) and module in skeleton.names.transposed:
            original = original.mT
        digests[module] = Later(fingerprint, leaf)
        if name in known and name in originals:
            certified[module] = known[name]
            continue
        certified[module] = {} if original is None else distances(leaf, original)
    return {module: {"hash": digests[module].result(), **row} for module, row in certified.items()}


def measured(
    skeleton: Skeleton, recipe: Transform, graph: ModuleGraph
) -> Mapping[str, Mapping[str, float]]:
    """The distances of a solved block's weights that a step measured (`known_distances`), by their
    names in the files."""
    known = {}
    for site in graph.code.sites:
        pieces = written_as(skeleton, graph, site.weight or "")
        row = known_distances(recipe, graph, site) if len(pieces) == 1 else None
        if row is not None:
            known[pieces[0].name] = row
    return known


def hashes(leaves: Mapping[str, Leaf], names: Collection[str]) -> dict[str, str]:
    """The hash of every dense leaf of these names."""
    return {
        name: hash_of(leaf)
        for name, leaf in leaves.items()
        if name in names and isinstance(leaf, Tensor)
    }


def unused(skeleton: Skeleton, graph: ModuleGraph) -> dict[str, dict[str, Any]]:
    """The linears that a block holds and its program never runs, for which no recipe is: of a list
    that several blocks hold each may run its own part. Empty where there is none."""
    shown = {site.weight for site in graph.code.sites} | graph.code.unread.keys()
    held = [name for name in skeleton.names.linears() if name.startswith(f"{graph.path}.")]
    shapes = {
        name: skeleton.model.get_submodule(name).get_parameter("weight").shape for name in held
    }
    idle = {
        name: {"shape": list(shape)}
        for name, shape in shapes.items()
        if f"{name}.weight".removeprefix(f"{graph.path}.") not in shown
    }
    return {"unused": idle} if idle else {}
