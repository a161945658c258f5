"""What happens at run time at modules beside the rounding of a linear's input, as formats hold it.

It is told by places: the "input" and the "output" of a linear, and the "query", "key" and "value"
of an attention.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qlab.algebra.graph import Op

SECTION = "around"  # of qlab.json: the rows of all blocks
Places = Mapping[str, tuple[Op, ...]]  # place -> what happens there, in order
# module -> place -> what a format says of each operation there, as plain data; "tensor" and
# "sha256" are the name and the hash of what the files hold of it
Rows = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]


def hash_of_numbers(tensor: Tensor) -> str:
    """sha256 over the numbers of a tensor, in whatever dtype they are stored."""
    return hashlib.sha256(tensor.detach().cpu().double().contiguous().numpy().tobytes()).hexdigest()


def hashes(rows: Rows) -> dict[str, str]:
    """Name in the files of every tensor of the rows -> the hash of its numbers."""
    steps = [step for places in rows.values() for steps in places.values() for step in steps]
    return {step["tensor"]: step["sha256"] for step in steps if "tensor" in step}


@dataclass(frozen=True)
class Around:
    """Of one format. Law: what `Extra.ops` read of `encode` and `config` are the operations.

    refusal(places): why the format cannot hold what happens at one module, or None.
    encode(modules): module -> its places, of one block -> the tensors in the files, and the rows.
    config(rows, attentions): what quantization_config says of the rows of all blocks; attentions
        are all modules of the model in which one runs. Refuses what it cannot say of all of them.
    """

    refusal: Callable[[Places], str | None]
    encode: Callable[[Mapping[str, Places]], tuple[dict[str, Tensor], Rows]]
    config: Callable[[Rows, Collection[str]], dict[str, Any]]
