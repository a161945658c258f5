"""Wanda: the weights that matter least to the outputs become 0 (Sun et al. 2023).

Legend: s_ij = |W_ij| sqrt(E x_j^2), the score of a weight; x the input.
"""

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.leaf import dense
from qlab.algebra.operations import Operations
from qlab.algebra.transform import Transform, costing, each_cell
from qlab.methods.pattern import Pattern, checked, narrowed, parse_pattern


def wanda(pattern: str | float | Pattern) -> Transform:
    """Set the weights with the smallest `|W_ij| |x_j|` to 0: of every M neighbours, or of each row.

    The weights that are kept stay as they are. Chain a rounding behind: it keeps the zeros.

    Args:
        pattern: "2:4", of which 2 of every 4 neighbouring input channels are kept, "4:8", or a
            share of zeros such as 0.5, which is one of every row.

    Returns:
        A transform of one stage, which rounds nothing. It needs calibration data.

    Raises:
        QlabError: the pattern is none, or (when it runs) M does not divide the input channels.

    Source:
        Sun et al. 2023, A Simple and Effective Pruning Approach for Large Language Models.

    Example:
        >>> import qlab
        >>> (stage,) = qlab.wanda(0.5)
        >>> stage.name, stage.detail, sorted(stage.needs)
        ('wanda', 'pattern 0.5', ['second_moment'])
    """
    kind = parse_pattern(pattern)

    def fn(weight: Weight) -> Cell:
        cell, size_k = weight.cell, weight.stats["second_moment"].mean_square_k.sqrt()
        kept = kind.kept(dense(cell.leaf).float().abs() * size_k)
        return narrowed(cell, kept)

    stages = each_cell("wanda", fn, {"second_moment"}, detail=f"pattern {kind}")
    return checked(costing(stages, Operations(rows=4)), kind)
