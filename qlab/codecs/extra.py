"""What a quantization_config says beside weights and the rounding of their inputs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from qlab.algebra.graph import Op


@dataclass(frozen=True)
class Extra:
    """Something that a directory's readers do beside products with weights.

    key: where quantization_config says it. says: a clause in words. online: whether it happens at
    run time; else it is done and the weights hold it. applied: whether qlab computes it too.
    tensors: what the files hold for it, by name; missing: what they should hold and do not.
    fault(tensor): what is wrong with one of its tensors, or None. ops(path, location, n, tensor):
    what becomes of the "input" or "output" [..., n] of the linear module `path`, with tensor(name)
    to read the files.
    """

    key: str
    says: str
    online: bool = True
    applied: bool = False
    tensors: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    fault: Callable[[Tensor], str | None] = lambda tensor: None
    ops: Callable[[str, str, int, Callable[[str], Tensor]], tuple[Op, ...]] = (
        lambda path, location, n, tensor: ()
    )
