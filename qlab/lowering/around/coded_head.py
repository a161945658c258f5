"""The weight of the head as codes. Beside blocks of 4 bits, the 16-bit weight of a head is a large
part of what a step of few tokens reads.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import Spec
from qlab.errors import QlabError
from qlab.lowering.assembling import set_module
from qlab.lowering.weights.modules import QLinear
from qlab.lowering.weights.setting import Activations

SLAB = 2**24  # weights that are rounded at a time, as float32


@torch.no_grad()
def code_head(
    model: PreTrainedModel, spec: Spec, dtype: torch.dtype, activations: Activations | None
) -> None:
    """Round the weight of a dense head to nearest, and hold it by the first kernel that takes it.

    A head that has codes keeps them. An embedding that is tied to the head stays as it is, and is
    apart from then on.

    Args:
        model: dense or lowered, where it is to run.
        spec: of the codes; no scale may be shared by rows.
        dtype, activations: as `qlab.lower` takes them.

    Raises:
        QlabError: a model without a head, or with one that is no linear; a spec that shares a scale
            between rows or does not divide them.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise QlabError(f"{type(model).__name__} has no head, so that none can have codes")
    if isinstance(head, QLinear):
        return
    if not isinstance(head, nn.Linear):
        raise QlabError(
            f"the head is a {type(head).__name__}, and a linear can have codes; leave head away"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    bias = None if head.bias is None else head.bias.detach()
    leaf = _rounded(name, head.weight.detach(), spec)
    device = head.weight.device
    set_module(
        model, name, QLinear(name, leaf, bias, dtype, device, False, activations=activations)
    )
    untie(model, {k: v for k, v in _tied(model).items() if f"{name}.weight" not in (k, v)})


def _rounded(name: str, W_nk: Tensor, spec: Spec) -> QTensor:
    """The leaf of a weight, rounded slab by slab."""
    if spec.tile.sizes(W_nk.shape)[0] > 1 or spec.outer:
        raise QlabError(
            f"the codes of {name} cannot be {spec}, which shares a scale between rows; take one "
            "such as int8-channel or int8-g64"
        )
    rows = max(1, SLAB // W_nk.shape[1])
    parts = [encode(minmax, slab.float(), spec) for slab in W_nk.split(rows)]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return QTensor(
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
        spec=parts[0].spec,
    )


def _tied(model: PreTrainedModel) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def untie(model: PreTrainedModel, tied: dict[str, str]) -> None:
    """Let transformers tie no weights again that are apart. tied: those that are not."""
    model.all_tied_weights_keys = tied
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
