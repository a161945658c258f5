"""Magnitude pruning: the smallest weights of a layer become 0 (Han et al. 2015)."""

from qlab.algebra.cell import Cell, Weight
from qlab.algebra.leaf import dense
from qlab.algebra.transform import Transform, each_cell
from qlab.methods.pattern import Pattern, checked, narrowed, parse_pattern


def magnitude(pattern: str | float | Pattern) -> Transform:
    """Set the smallest `|W|` to 0: of every M neighbours, or of a whole layer. It needs no data.

    The weights that are kept stay as they are. Chain a rounding behind: it keeps the zeros.

    Args:
        pattern: "2:4", of which 2 of every 4 neighbouring input channels are kept, "4:8", or a
            share of zeros such as 0.5, which is one of the whole weight.

    Returns:
        A transform of one stage, which rounds nothing. The report holds the share of zeros.

    Raises:
        QlabError: the pattern is none, or (when it runs) M does not divide the input channels.

    Source:
        Han et al. 2015, Learning both Weights and Connections for Efficient Neural Networks.

    Example:
        >>> import qlab
        >>> recipe = qlab.chain(qlab.magnitude("2:4"), qlab.gptq("int4-g64"))
        >>> [(stage.name, stage.detail) for stage in recipe][0]
        ('magnitude', 'pattern 2:4')
    """
    kind = parse_pattern(pattern)

    def fn(weight: Weight) -> Cell:
        cell = weight.cell
        kept = kind.kept_overall(dense(cell.leaf).float().abs())
        return narrowed(cell, kept)

    return checked(each_cell("magnitude", fn, detail=f"pattern {kind}"), kind)
