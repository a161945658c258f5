"""One rank's part of a directory's model, which runs together with those of the other ranks."""

from typing import Any

import torch
from transformers import PreTrainedModel

from qlab.algebra.spec import Spec
from qlab.files.checkpoint import Checkpoint
from qlab.lowering.around.attended import attentions
from qlab.lowering.around.coded_head import code_head
from qlab.lowering.around.divided import Ranks
from qlab.lowering.around.ranks import connect
from qlab.lowering.devices import device_named
from qlab.lowering.model import assembled, refuse_dtype
from qlab.lowering.share import shared
from qlab.lowering.solved import Place
from qlab.lowering.weights.setting import Activations, checked_activations
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import undisturbed


@undisturbed
def lower_part(
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    ranks: Ranks,
    activations: Activations | None = None,
    head: Spec | None = None,
    rounds: bool = False,
) -> PreTrainedModel:
    """A directory as `qlab.lower` makes a model of it, quantized or dense, of which this rank holds
    its part. All ranks run each forward pass together, and each gets all logits.

    Args:
        checkpoint: the directory.
        device, dtype, activations, head: as `qlab.lower` takes them.
        ranks: which of how many this is, and how passes are shared.
        rounds: whether more will be rounded at run time than the directory says, such as a cache.

    Raises:
        QlabError: a model that transformers has no plan for, or a number of ranks that its heads or
            its groups do not allow, with those that they do, before a weight is loaded.
    """
    refuse_dtype(dtype)
    place = Place(dtype, device_named(device), False, checked_activations(activations))
    checkpoint.warn_unapplied()
    skeleton = Skeleton(checkpoint, place.dtype, place.device)
    share = shared(skeleton, ranks.rank, ranks.world, rounds)
    for name in filter(share.divides, attentions(skeleton.model)):
        attention: Any = skeleton.model.get_submodule(name)
        attention.ranks = ranks
    model = assembled(skeleton, place, share=share)
    if head is not None:
        code_head(model, head, dtype, place.activations)
    connect(model, share, ranks.passes)
    return model
