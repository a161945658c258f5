"""What a quantization_config says beside weights and the rounding of their inputs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qlab.algebra.graph import Op


@dataclass(frozen=True)
class Extra:
    """Something that readers of a directory do beside products with weights.

    key: the key of quantization_config that says it, and part: which of its entries, where one
    alone does. says: the same in words, a clause. online: whether it happens at run time; if not,
    the weights hold its result. applied: whether qlab computes it too. attended: whether it happens
    to what attention reads. tensors: the names of its tensors in the files. missing: the tensors
    that the files should hold and do not. fault(tensor): what is wrong with one of its tensors, or
    None.

    ops(path, location, n, tensor): the operations on the "input" or "output" [..., n] of the linear
    module `path`, or on the "query", "key" or "value" of the attention module `path` with n
    channels per head; tensor(name) reads a tensor of the files.
    """

    key: str
    says: str
    online: bool = True
    applied: bool = False
    attended: bool = False
    part: str | None = None
    tensors: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    fault: Callable[[Tensor], str | None] = lambda tensor: None
    ops: Callable[[str, str, int, Callable[[str], Tensor]], tuple[Op, ...]] = (
        lambda path, location, n, tensor: ()
    )
