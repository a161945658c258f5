"""`sparse-24-bitmask`, read only: two of every four weights, and a bit for each weight that says
whether it is kept.

    compressed  [o, k/2] in the dtype of the weight: the kept numbers in row order
    bitmask     uint8 [o, ceil(k/8)], bit j % 8 of byte j // 8 is set where weight j is kept
    shape       int64 [2]

Source: compressed-tensors 0.12.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlab.algebra.spec import Spec
from qlab.codecs.checks import take
from qlab.codecs.compressed_tensors.tensors import WIDE
from qlab.errors import QlabError


def others(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The module's tensors that do not belong to this format."""
    sparse_names = {f"{path}.{name}" for name in ("compressed", "bitmask", "shape")}
    return {name: tensor for name, tensor in tensors.items() if name not in sparse_names}


def decode(path: str, tensors: Mapping[str, Tensor], spec: Spec | None) -> Tensor:
    """The weight [o, k], or the codes [o, k] of a spec, with zeros where the mask has none; refuses
    a mask that does not keep two of every four."""
    sizes = tensors.get(f"{path}.shape")
    # Some writers store the shape as [2, 1].
    flat = {} if sizes is None else {f"{path}.shape": sizes.flatten()}
    o, k = take(path, flat, "shape", (2,), torch.int64).tolist()
    if o < 1 or k < 4 or k % 4:
        raise QlabError(f"{path}.shape ({o}, {k}) has no rows of whole fours; the file is damaged")
    dtypes = (spec.code_dtype,) if spec else WIDE
    values = take(path, tensors, "compressed", (o, k // 2), *dtypes)
    mask = take(path, tensors, "bitmask", (o, -(-k // 8)), torch.uint8)
    bits = (mask[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    kept = bits.flatten(1)[:, :k].bool()
    if not (kept.view(o, k // 4, 4).sum(-1) == 2).all():
        raise QlabError(
            f"{path}.bitmask does not keep two of every four weights; the file is damaged"
        )
    whole = values.new_zeros(o, k)
    whole[kept] = values.flatten()
    return whole
