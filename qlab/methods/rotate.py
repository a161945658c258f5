"""Rotations: outliers of inputs and weights are spread over all channels (Ashkboos et al. 2024).

x W^T = (x R) (W R)^T for an orthogonal R, and a number of x R is a mixture of all of x. R2 turns
the values of every head: it is in the weights on both sides of attention, and costs nothing. R4
turns what enters a block's other projections into the residual stream (behind an activation), at
run time. Random orthogonal matrices at every input are QuIP's incoherence (Chee et al. 2023).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qlab.algebra.gauge import Element, Turn, gauge
from qlab.algebra.groups import General, groups
from qlab.algebra.random import generator
from qlab.algebra.transform import Transform, chain
from qlab.algebra.wires import full_name
from qlab.methods.hadamard import largest_order, random_hadamard, random_orthogonal

# size and random numbers -> an orthogonal matrix
Draw = Callable[[int, torch.Generator], Tensor]


def rotate_heads(seed: int = 0, draw: Draw = random_hadamard) -> Transform:
    """R2: the values of every head times an orthogonal R, and the projection behind attention times
    its inverse.

    Both are in the weights, so nothing is left to do at run time and every format holds the result.
    Inputs that take no matrix per head stay as they are.

    Args:
        seed: of the random signs, which also depend on the input's name.
        draw: a function of (size, torch.Generator) that gives an orthogonal matrix; the default is
            a Hadamard matrix of random signs.

    Returns:
        A transform of two stages, rotate_heads and absorb.

    Source:
        Ashkboos et al. 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs; R2 as in Liu et
        al. 2024, SpinQuant: LLM Quantization with Learned Rotations.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.chain(qlab.rotate_heads(), qlab.gptq("int4-g64"))]
        ['rotate_heads', 'absorb', 'gptq']
    """

    def choose(turn: Turn) -> Element | None:
        if not isinstance(turn.group, General):
            return None
        return _drawn(turn, turn.group.size, seed, draw)

    return gauge("rotate_heads", "*:in", choose, detail=f"seed {seed}")


def rotate_online(seed: int = 0, draw: Draw = random_hadamard) -> Transform:
    """R4: what enters the projections into the residual stream that are not behind attention, times
    an orthogonal R at run time, and their weights times its inverse.

    The inputs are read off the program: of a mixture, those of all experts, which share R. A size
    without a Hadamard matrix, or of more than 4096, is turned in blocks of the largest that divides
    it.

    Args:
        seed: see `rotate_heads`.
        draw: see `rotate_heads`.

    Returns:
        A transform of two stages, rotate_online and absorb. R stays at the inputs, and formats
        without a place for it refuse that before any work.

    Source:
        Ashkboos et al. 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.

    Example:
        >>> import qlab
        >>> stage = qlab.rotate_online(seed=1)[0]
        >>> stage.name, stage.detail, len(stage.view.operations)
        ('rotate_online', 'seed 1', 1)
    """

    def choose(turn: Turn) -> Element | None:
        behind_attention = isinstance(groups(turn.graph.code)[turn.sites[0].origin], General)
        if not turn.writes or behind_attention:
            return None
        return _drawn(turn, largest_order(turn.size), seed, draw)

    return gauge("rotate_online", "*:in", choose, online=True, detail=f"seed {seed}")


def quarot(seed: int = 0, draw: Draw = random_hadamard) -> Transform:
    """QuaRot inside the blocks: `rotate_heads` (R2), then `rotate_online` (R4). Chain a rounding
    behind.

    Args:
        seed: see `rotate_heads`.
        draw: see `rotate_heads`.

    Returns:
        A transform of four stages.

    Source:
        Ashkboos et al. 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.quarot()]
        ['rotate_heads', 'absorb', 'rotate_online', 'absorb']
    """
    return chain(rotate_heads(seed, draw), rotate_online(seed, draw))


def incoherence(seed: int = 0, draw: Draw = random_orthogonal) -> Transform:
    """QuIP's incoherence at inputs: every input times a random orthogonal matrix at run time, and
    the weights that it meets times the inverse.

    Inputs of heads fold into what produces their values where the matrix is one per head, which
    `rotate_heads` does; here the matrix mixes all channels.

    Args:
        seed: see `rotate_heads`.
        draw: see `rotate_heads`; the default draws evenly from all orthogonal matrices.

    Returns:
        A transform of two stages, incoherence and absorb. The matrices stay at the inputs.

    Source:
        Chee et al. 2023, QuIP: 2-Bit Quantization of Large Language Models With Guarantees.

    Example:
        >>> import qlab
        >>> [stage.name for stage in qlab.chain(qlab.incoherence(), qlab.rtn("int2-channel"))]
        ['incoherence', 'absorb', 'rtn']
    """

    def choose(turn: Turn) -> Element:
        return _drawn(turn, largest_order(turn.size), seed, draw)

    return gauge("incoherence", "*:in", choose, online=True, detail=f"seed {seed}")


def _drawn(turn: Turn, size: int, seed: int, draw: Draw) -> Element:
    """An orthogonal matrix [size, size] of the wire's own, with its inverse."""
    wire = min(full_name(turn.graph.path, f"{site.path}:in") for site in turn.sites)
    R = draw(size, generator(seed, wire)).to(turn.graph.weight_ok(turn.sites[0]).device)
    return Element(M=R, M_inv=R.T, notes={"rotated": size})
