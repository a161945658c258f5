"""Products with a Hadamard matrix as one operator, which GPUs compute by a kernel of O(n log n).

    qlab::hadamard(x [m, n], before, core, behind, scale, doublings) -> x @ M, in x's dtype

    M = scale diag(before) (H_2 (x) ... (x) H_2 (x) core) diag(behind)

before, behind: signs [n], or None where all are 1. core: signs [c, c], or None for a power of two.
"""

from typing import Any

import torch
from torch import Tensor, nn


@torch.library.custom_op("qlab::hadamard", mutates_args=(), device_types="cpu")
def hadamard(
    x: Tensor,
    before: Tensor | None,
    core: Tensor | None,
    behind: Tensor | None,
    scale: float,
    doublings: int,
) -> Tensor:
    """x @ M with sums in fp32, rounded once."""
    from qlab_kernels.hadamard import Factors
    from qlab_kernels.reference import hadamard as reference

    factors = Factors(doublings=doublings, scale=scale, core=core, before=before, behind=behind)
    return reference(x, factors, torch.float32).to(x.dtype)


@hadamard.register_kernel("cuda")
def _hadamard_cuda(x, before, core, behind, scale, doublings):
    return product(x, before, core, behind, scale, doublings)


@hadamard.register_fake
def _hadamard_fake(x, before, core, behind, scale, doublings):
    return x.new_empty(x.shape)


def product(
    x: Tensor,
    before: Tensor | None,
    core: Tensor | None,
    behind: Tensor | None,
    scale: float,
    doublings: int,
) -> Tensor:
    """The kernel, in the configuration that the cache holds for the shape."""
    from qlab_kernels import cache
    from qlab_kernels.hadamard import Factors, problem
    from qlab_kernels.hadamard import hadamard as launch

    if not len(x):
        return x.clone()
    factors = Factors(doublings=doublings, scale=scale, core=core, before=before, behind=behind)
    cc = torch.cuda.get_device_capability(x.device)
    asked = problem(x, factors, cc, torch.cuda.get_device_name(x.device))
    return launch(x.contiguous(), factors, cache.lookup(asked).config)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, before, core, behind, ctx.scale, ctx.doublings = inputs
    ctx.save_for_backward(before, core, behind)


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """g @ M^T: the core transposed, and the signs in the other order."""
    before, core, behind = ctx.saved_tensors
    turned = None if core is None else core.mT.contiguous()
    return hadamard(g, behind, turned, before, ctx.scale, ctx.doublings), *[None] * 5


hadamard.register_autograd(_gradients, setup_context=_save)


def refusal(device: torch.device, dtype: torch.dtype, n: int, core: int) -> str | None:
    """Why a GPU has no kernel for x of a dtype and a matrix of order n, or None."""
    from qlab_kernels.families.hadamard import refusal as reason

    return reason(
        torch.cuda.get_device_capability(device), str(dtype).removeprefix("torch."), n, core
    )


class Butterflies(nn.Module):
    """x -> x @ M for every n neighbouring channels, by the operator.

    Signs are kept in float16 for x of any dtype, and None where all are 1.
    """

    before: Tensor | None
    core: Tensor | None
    behind: Tensor | None

    def __init__(self, before: Tensor, core: Tensor, behind: Tensor, scale: float, doublings: int):
        super().__init__()
        self.n, self.scale, self.doublings = len(before), scale, doublings
        parts = (("before", before), ("core", core), ("behind", behind))
        for name, part in parts:
            kept = None if bool((part == 1).all()) else part.to(torch.float16)
            self.register_buffer(name, kept, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.n)
        y = hadamard(rows, self.before, self.core, self.behind, self.scale, self.doublings)
        return y.reshape(x.shape)

    def extra_repr(self) -> str:
        core = "" if self.core is None else f" x {len(self.core)}"
        return f"{self.n} channels as 2^{self.doublings}{core}"
