"""`sparse-24-bitmask`, read only: two of every four weights, and a bit for each that says which.

compressed [o, k/2] in the weight's dtype, its numbers in row order; bitmask uint8 [o, ceil(k/8)],
bit j % 8 of byte j // 8 set where weight j is kept; shape int64 [2]. Source: compressed-tensors
0.12.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.spec import Spec
from qlab.codecs.compressed_tensors.tensors import WIDE, take
from qlab.errors import QlabError


def others(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's tensors that do not belong to this format."""
    own = {f"{path}.{name}" for name in ("compressed", "bitmask", "shape")}
    return {name: tensor for name, tensor in tensors.items() if name not in own}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec | None) -> Tensor:
    """The dense weight [o, k], or the dense codes of a spec; refuses a mask that keeps other than
    two of every four."""
    flat = (
        {f"{path}.shape": tensors[f"{path}.shape"].flatten()} if f"{path}.shape" in tensors else {}
    )  # some write [2, 1]
    o, k = take(path, flat, "shape", (2,), torch.int64).tolist()
    if o < 1 or k < 4 or k % 4:
        raise QlabError(f"{path}.shape ({o}, {k}) has no rows of whole fours; the file is damaged")
    values = take(path, tensors, "compressed", (o, k // 2), *([spec.code_dtype] if spec else WIDE))
    mask = take(path, tensors, "bitmask", (o, -(-k // 8)), torch.uint8)
    kept = ((mask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)[:, :k].bool()
    if not (kept.view(o, k // 4, 4).sum(-1) == 2).all():
        raise QlabError(
            f"{path}.bitmask does not keep two of every four weights; the file is damaged"
        )
    whole = values.new_zeros(o, k)
    whole[kept] = values.flatten()
    return whole
