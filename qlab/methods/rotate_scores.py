"""R3: queries and keys of every head times one orthogonal R (Ashkboos et al. 2024).

(q R) (k R)^T = q k^T, so that attention stays, and what rounds queries or keys behind it (a cache
of keys) sees outliers spread over all channels of a head. Rotary embeddings lie between the weights
and these values, so R is multiplied at run time.
"""

from torch import Tensor

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.online import MatMul
from qlab.algebra.random import generator
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Gauged
from qlab.algebra.wires import Wire, full_name, open_wires, wires
from qlab.errors import QlabError
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

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        selected = {wire.name for wire in open_wires(graph)}
        for query in wires(graph.code).values():
            key = f"{query.owner}:key"
            if query.kind != "query" or not selected & {query.name, key}:
                continue
            if not selected >= {query.name, key}:
                raise QlabError(
                    f"{full_name(graph.path, query.name)} and {full_name(graph.path, key)} turn "
                    "together, and the rule for rotate_scores splits them; give one to both"
                )
            R = draw(_head_size(graph, query), generator(seed, full_name(graph.path, query.owner)))
            graph = graph.inserting(query.name, MatMul(R)).inserting(key, MatMul(R))
        return graph, {place: s for place, s in stats.items() if place[0] not in selected}

    stage = Stage(
        "rotate_scores",
        frozenset(),
        run,
        Gauged(SCORES, left=(MatMul(FORM),)),
        detail=f"seed {seed}",
    )
    return (stage,)


def _head_size(graph: ModuleGraph, wire: Wire) -> int:
    """Channels of a head of the queries."""
    node = next(node for node in graph.code.graph.nodes if node.name == wire.node)
    value: Tensor = node.meta["val"]
    return int(value.shape[-2 if wire.layout == "h d n" else -1])
