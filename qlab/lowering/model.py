"""A quantized model directory as an ordinary Hugging Face model that runs fast."""

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Spec
from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.lowering.around.attended import Attended, attend, attended_in
from qlab.lowering.around.coded_head import code_head, untie
from qlab.lowering.around.inputs import RoundedInput
from qlab.lowering.around.rotated import attach, rotations
from qlab.lowering.assembling import (
    finish,
    owner_of,
    put_weights,
    quantized_weights,
    warn_slow,
)
from qlab.lowering.devices import DTYPES, device_named
from qlab.lowering.share import Share
from qlab.lowering.solved import Place, SolvedModel, put_buffers, put_solved
from qlab.lowering.weights.modules import QuantizedWeight
from qlab.lowering.weights.setting import Activations, checked_activations
from qlab.model.loading import load_leaf, load_outside
from qlab.model.skeleton import Skeleton
from qlab.model.whole import generation_config_of
from qlab.process.surroundings import undisturbed


@undisturbed
def lower(
    model: Checkpoint | SolvedModel | str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    dense_cache: bool = False,
    activations: Activations | None = None,
    head: Spec | None = None,
) -> PreTrainedModel:
    """A quantized directory as a Hugging Face model that runs fast.

    A `QLinear` stands in the place of every quantized linear, and a `QExperts` in that of every
    fused weight of experts. Their codes are packed for `device` while they are loaded, one tensor
    at a time; the directory stays as it is. The first kernel of a table that takes a weight
    multiplies it; `repr` shows which, as the layout, and why a faster one does not. Where none
    takes the codes, the module holds them as bit streams and dequantizes them for every call.
    Embeddings (even with codes) and norms are dense, and so is an unquantized head without `head`.
    What the directory rotates or rounds at run time is rotated or rounded: inputs, and the queries,
    keys and values that attention reads, also where no weight has codes. A cache of these holds
    numbers of `dtype`, not codes: it is as large as without a scheme, and every step rounds what it
    reads of it. The value of `qlab.apply` is lowered while it is solved, without a directory.

    `generate()` works, and so does `torch.compile`, with `options=inductor_options()` for the fused
    kernels; the model can be exported. Warns of what is slower than it could be: weights without a
    kernel, or a dtype of activations without one.

    Args:
        model: a quantized directory, an open one, or what a recipe makes of a model (`apply`).
        device: 'cpu', 'cuda' or 'cuda:N', where the model is placed.
        dtype: of the activations and of everything that is not quantized: bfloat16, float16 or
            float32.
        dense_cache: keep a dense copy of each weight for products of many tokens;
            `resident_bytes` says what that costs.
        activations: "int8" lets kernels that can round activations to 8-bit integers, where the
            directory leaves them as they are: faster, and not quite the directory's function. None
            rounds nothing that the directory does not.
        head: a spec such as 'int8-g32', to which the weight of an unquantized head is rounded
            while it is loaded: faster for few tokens, and not quite the directory's function. None
            leaves the head dense.

    Returns:
        The model in evaluation mode. Its weights cannot be saved, because they are packed for one
        device.

    Raises:
        QlabError: a directory that is not quantized, a device or dtype without kernels, activations
            that no kernel rounds to, a tensor that the model needs and the files lack.

    Example:
        >>> import qlab, torch
        >>> model = qlab.lower("demo-int4")
        >>> model.model.layers[0].mlp.up_proj
        QLinear(in_features=64, out_features=128, spec=int4-g64, layout=int4pack-...)
        >>> model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape
        torch.Size([1, 5])
    """
    place = Place(dtype, device_named(device), dense_cache, checked_activations(activations))
    lowered = put_together(model, place)
    if head is not None:
        code_head(lowered, head, dtype, place.activations)
    if not dense_cache:
        cure = "; dense_cache=True dequantizes once"
        warn_slow(lowered, dtype, place.device, cure, activations=place.activations)
    return lowered


def put_together(
    model: Checkpoint | SolvedModel | str | os.PathLike[str], place: Place
) -> PreTrainedModel:
    """The lowered model, of which nothing is said that is slow."""
    solved = model if isinstance(model, SolvedModel) else None
    checkpoint = solved.model if solved else opened(model)
    checkpoint.warn_unapplied()
    refuse_dtype(place.dtype)
    if not solved and not checkpoint.quantized and not checkpoint.extras:
        raise QlabError(
            f"{checkpoint.path} is not quantized, so there is nothing to lower; load it with "
            "transformers"
        )
    return assembled(Skeleton(checkpoint, place.dtype, place.device), place, solved)


def assembled(
    skeleton: Skeleton,
    place: Place,
    solved: SolvedModel | None = None,
    share: Share | None = None,
) -> PreTrainedModel:
    """The model of a skeleton, with its weights, or with a rank's share of them."""
    checkpoint, own = skeleton.checkpoint, frozenset[str]()
    if solved:
        own, attended = _fill_solved(skeleton, solved, place)
    else:
        attended = _fill(skeleton, place, share)
    _tie(skeleton, own)
    if share:
        share.cut_outside()
    said = generation_config_of(checkpoint)
    if said is not None:
        skeleton.model.generation_config = said
    finish(skeleton.model, place.device)
    attend(skeleton.model, attended, place.device)
    skeleton.model.save_pretrained = _refuse_saving  # type: ignore[method-assign]
    return skeleton.model.eval()


def refuse_dtype(dtype: torch.dtype) -> None:
    """Refuse a dtype of activations that no kernel takes."""
    if dtype not in DTYPES:
        raise QlabError(
            f"no kernel takes {dtype} activations; lower to {', '.join(str(d) for d in DTYPES)}"
        )


def opened(model: Any) -> Checkpoint:
    """A directory, opened if it is not."""
    return model if isinstance(model, Checkpoint) else open_checkpoint(model)


def _fill(skeleton: Skeleton, place: Place, share: Share | None) -> Attended:
    """Put what a directory holds into its model. Gives what happens to what attention reads."""
    matrices, attended = rotations(skeleton), attended_in(skeleton)
    weights = quantized_weights(skeleton)
    put_weights(
        skeleton.model,
        skeleton,
        weights,
        place.dtype,
        place.device,
        place.dense_cache,
        activations=place.activations,
        share=share,
    )
    with torch.no_grad():
        load_outside(skeleton, with_head=True)
        _load_blocks(skeleton, share)
    attach(skeleton.model, matrices, place.device)
    return attended


@torch.no_grad()
def _fill_solved(
    skeleton: Skeleton, solved: SolvedModel, place: Place
) -> tuple[frozenset[str], Attended]:
    """The same of blocks that are solved meanwhile. Gives the names of the weights around the
    blocks that are the recipe's, too."""
    load_outside(skeleton, with_head=True)
    left = put_solved(skeleton, solved, place)
    _load_blocks(skeleton)
    put_buffers(skeleton.model, left.buffers)
    attach(skeleton.model, left.rotations, place.device)
    return left.around, left.attended


def _refuse_saving(*_: object, **__: object) -> None:
    raise QlabError(
        "a lowered model holds weights packed for one device, which no reader takes; copy its "
        "directory, or open that with transformers after `import qlab.hf`, whose save_pretrained "
        "writes what was read"
    )


def _load_blocks(skeleton: Skeleton, share: Share | None = None) -> None:
    """The parameters of the blocks that stayed on meta, and the buffers that the files hold."""
    for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta:
            leaf = dense(load_leaf(skeleton, name), parameter.dtype)
            leaf = leaf if share is None else share.of_parameter(name, leaf)
            value = nn.Parameter(leaf.to(skeleton.device), requires_grad=False)
            owner_of(skeleton.model, name)._parameters[name.rpartition(".")[2]] = value
    for name, buffer in list(skeleton.model.named_buffers()):
        owner, key = owner_of(skeleton.model, name), name.rpartition(".")[2]
        if isinstance(owner, QuantizedWeight | RoundedInput):
            continue  # a tensor of the files may have the name of such a buffer by chance
        stored = skeleton.names.stored_buffer(name)
        if stored:
            owner._buffers[key] = skeleton.checkpoint.tensor(stored).to(buffer)


def _tie(skeleton: Skeleton, own: Collection[str]) -> None:
    """One parameter for all names that it has. What config.json ties and is apart here stays apart,
    also when transformers ties weights again.

    own: the names of weights around the blocks that a recipe made others.
    """
    model, parameters = skeleton.model, dict(skeleton.model.named_parameters())
    tied = {
        name: keeper for name, keeper in skeleton.names.tied.items() if not {name, keeper} & {*own}
    }
    for name, keeper in tied.items():
        if name in parameters and keeper in parameters:
            owner_of(model, name)._parameters[name.rpartition(".")[2]] = parameters[keeper]
    if skeleton.names.apart or len(tied) < len(skeleton.names.tied):
        untie(model, tied)
