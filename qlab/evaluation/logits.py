"""The logits of a model, or of what a recipe makes of one, with one block in memory at a time."""

import torch
from torch import Tensor

from qlab.data.calibration import from_ids
from qlab.driver.apply import Quantized
from qlab.evaluation.perplexity import Reading, read
from qlab.files.checkpoint import Checkpoint
from qlab.model.running import head
from qlab.process.surroundings import undisturbed


@undisturbed
@torch.no_grad()
def logits(model: Checkpoint | Quantized | Reading, ids: Tensor, device: str = "cpu") -> Tensor:
    """The logits of every token, in float32, with one block in memory at a time.

    Args:
        model: a model, its path, what a recipe makes of it (`apply`), or what it was read as before
            on the same ids.
        ids: token ids [n, l] of n windows, as a tensor, a numpy array or lists.
        device: where the blocks run, such as "cpu" or "cuda".

    Returns:
        A tensor [n, l, vocabulary] on the CPU: entry [i, j] predicts the token behind ids[i, j].

    Raises:
        QlabError: ids of another shape or outside the vocabulary, windows longer than the model's
            positions.

    Example:
        >>> import qlab
        >>> ids = [[5, 6, 7], [8, 9, 10]]
        >>> qlab.logits("demo", ids).shape
        torch.Size([2, 3, 128])
        >>> quantized = qlab.apply(qlab.open("demo"), qlab.rtn("int3-g32"), None)
        >>> bool((qlab.logits(quantized, ids) != qlab.logits("demo", ids)).any())
        True
    """
    reading = model if isinstance(model, Reading) else _read(model, ids, device)
    rows = [
        head(reading.skeleton, ids[i : i + 1], reading.hidden.narrow(reading.windows, i, 1))
        for i in range(len(ids))
    ]
    return torch.cat([row.float().cpu() for row in rows])


def _read(model: Checkpoint | Quantized, ids: Tensor, device: str) -> Reading:
    checkpoint = model.model if isinstance(model, Quantized) else model
    return read(model, from_ids(checkpoint, ids), device=device)
