"""R1: the residual stream of the whole model in another basis (Ashkboos et al. 2024).

f'(h R) = f(h) R in every segment, embedding and head among them, where weights that read the stream
take the gain of the norm before them and R, and weights and tables that add to it take R from
behind. All segments are turned by the same R, so that what leaves one is what enters the next.
"""

import torch
from torch import Tensor

from qlab.algebra.frame import frame
from qlab.algebra.random import generator
from qlab.algebra.residual import Orthogonal
from qlab.algebra.transform import Transform
from qlab.methods.hadamard import largest_order, random_hadamard
from qlab.methods.rotate import Draw


def rotate_residual(seed: int = 0, draw: Draw = random_hadamard) -> Transform:
    """R1: the hidden states between all blocks times an orthogonal R, undone in the weights around
    them.

    The function stays. Embedding, blocks, final norm and head are written in the other basis, gains
    of norms become 1 (those that read them take them), and a head that was tied to the embedding
    has a weight of its own; every format holds the result. Where norms subtract a mean (layer
    norms), R keeps the vector of ones.

    Args:
        seed: of the random signs.
        draw: a function of (size, torch.Generator) that gives an orthogonal matrix; the default is
            a Hadamard matrix of random signs.

    Returns:
        A transform of one stage.

    Raises:
        QlabError: before any work, a model whose stream is more than added to, normed by the size
            of its rows and multiplied by weights (norms behind weights, projectors of images), with
            the operation.

    Source:
        Ashkboos et al. 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.rotate_residual()
        >>> stage.name, stage.detail
        ('rotate_residual', 'seed 0')
    """

    def choose(group: Orthogonal) -> Tensor:
        n = largest_order(group.size)
        R_nn = draw(n, generator(seed, "residual stream"))
        return torch.block_diag(*[R_nn] * (group.size // n))

    return frame("rotate_residual", choose, f"seed {seed}")
