"""R3: queries and keys of every head times one orthogonal R (Ashkboos et al. 2024).

(q R) (k R)^T = q k^T, so that attention stays, and what rounds queries or keys behind it (a cache
of keys) sees outliers spread over all channels of a head. Rotary embeddings lie between the weights
and these values, so R is multiplied at run time.
"""

from dataclasses import replace

from qlab.algebra.gauge import Element, Turn, gauge
from qlab.algebra.online import MatMul
from qlab.algebra.random import generator
from qlab.algebra.scores import Scores
from qlab.algebra.transform import Transform
from qlab.algebra.views import Gauged
from qlab.methods.hadamard import hadamard, random_hadamard
from qlab.methods.rotate import Draw

SCORES = "re:.*:(query|key)"  # the wires
# a rotation as codecs are asked about it
FORM = (hadamard(2) / 2**0.5).float()


def rotate_scores(seed: int = 0, draw: Draw = random_hadamard) -> Transform:
    """R3: queries and keys of every attention times an orthogonal R at run time. Chain the rounding
    of keys behind.

    The function stays. All heads of an attention share R. Blocks without an attention that the
    program shows stay as they are.

    Args:
        seed: of the random signs, which also depend on the attention's name.
        draw: a function of (size, torch.Generator) that gives an orthogonal matrix; the default is
            a Hadamard matrix of random signs.

    Returns:
        A transform of one stage. Formats without a place for it refuse it before any work.

    Source:
        Ashkboos et al. 2024, QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.rotate_scores()
        >>> stage.name, stage.view.wires
        ('rotate_scores', 're:.*:(query|key)')
    """

    def choose(turn: Turn) -> Element:
        assert isinstance(turn.group, Scores)
        R = draw(turn.group.size, generator(seed, turn.name.rpartition(":")[0]))
        return Element(M=R, M_inv=R.mT)

    (stage,) = gauge("rotate_scores", SCORES, choose, online=True, detail=f"seed {seed}")
    return (replace(stage, view=Gauged(SCORES, left=(MatMul(FORM),))),)
