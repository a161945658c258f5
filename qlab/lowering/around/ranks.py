"""What ranks tell each other inside a forward pass of a model that is divided between them.

by inputs: y = sum over r of y_r       gathered: y = [y_0, y_1, ...]
a table of embeddings: each rank looks up the ids that it has, the others are 0 there
an input that is turned over channels of all ranks: [x_0, x_1, ...] @ M, of which each has a part
where inputs are rounded at run time: y_r = [0, x @ W_r.T, 0] with x = [x_0, x_1, ...]
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlab.lowering.share import Share


def connect(model: PreTrainedModel, share: Share, group: Any) -> None:
    """Let the modules of a model do it.

    Args:
        model: assembled with the share.
        group: torch's process group of all ranks.
    """
    for name, style in share.styles.items():
        if style.axis == "k" or style.whole:
            _connect_inputs(model, name, share, group)
        if share.skeleton.names.fused(name):
            continue  # the module of all experts has a style of its own
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding) and style.axis == "o":
            _look_up(module, *share.spans(name)[0])
        if style.behind == "sum":
            module.register_forward_hook(_sum(group))
        elif style.behind == "gather":
            widths = [share.width(name, rank) for rank in range(share.world)]
            module.register_forward_hook(_gather(group, widths))
        if type(module) is nn.Linear:
            module.out_features, module.in_features = module.weight.shape


def _connect_inputs(model: PreTrainedModel, name: str, share: Share, group: Any) -> None:
    """What comes before the product of a weight that the plan cuts by inputs, and what makes its
    output a summand. Rotations are at the module already, between what is put around them here."""
    owner, _, key = name.rpartition(".")
    module, style = getattr(model.get_submodule(owner), key), share.styles[name]
    if name in share.mixed or (style.whole and not style.splits):
        module.register_forward_pre_hook(_whole(group, share.world), prepend=True)
    if style.whole:
        module.register_forward_hook(_place(share, name), prepend=True)
    elif name in share.mixed or style.splits:
        module.register_forward_pre_hook(_split(*share.spans(name)[0]))
    if hasattr(module, "order"):
        module.register_forward_pre_hook(_put_in_order)


def _sum(group: Any) -> Any:
    def summed(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        y = y.contiguous()
        dist.all_reduce(y, group=group)
        return y

    return summed


def _gather(group: Any, widths: list[int]) -> Any:
    """The outputs of all ranks, whose last axis is as wide as it is there."""

    def gathered(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return of_all(y, group, widths)

    return gathered


def _whole(group: Any, world: int) -> Any:
    """The inputs of all ranks, which have equally many channels."""

    def whole(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return of_all(args[0], group, [args[0].shape[-1]] * world), *args[1:]

    return whole


def _place(share: Share, name: str) -> Any:
    """The outputs that a rank has among all, which are 0 here."""
    (start, stop), size = share.spans(name)[0], share.sizes[name][0]

    def placed(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return F.pad(y, (start, size - stop))

    return placed


def of_all(x: Tensor, group: Any, widths: list[int]) -> Tensor:
    """The last axis of all ranks [x_0, x_1, ...]. widths: how wide it is on each."""
    own = F.pad(x, (0, max(widths) - x.shape[-1])).contiguous()
    parts = [torch.empty_like(own) for _ in widths]
    dist.all_gather(parts, own, group=group)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths)], -1)


def _put_in_order(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0][..., module.order], *args[1:]


def _split(start: int, stop: int) -> Any:
    def split(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return args[0][..., start:stop], *args[1:]

    return split


def _look_up(table: nn.Embedding, start: int, stop: int) -> None:
    """Let a table of the rows start:stop take ids of all rows."""
    whole = table.forward
    table.num_embeddings, table.padding_idx = stop - start, None

    def forward(ids: Tensor) -> Tensor:
        is_here = (ids >= start) & (ids < stop)
        found = whole((ids - start).where(is_here, 0))
        return found.masked_fill(~is_here[..., None], 0)

    vars(table)["forward"] = forward
