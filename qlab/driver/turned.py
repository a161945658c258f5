"""Which steps turn a whole block before its inputs are solved one after the other.

A rotation of heads, or one at run time, needs all inputs of a block at once, so that a recipe that
holds one is solved at once as a whole: every statistic is of the block before any of its weights
moved. For a target that compares with the reference that is wrong. Each weight would make up for
the same drift, o_proj and down_proj both for all that the residual stream lacks, and the sum of
their steps overshoots by as much as there was to make up for, block after block. So what turns
comes first, on the block and on the reference beside it, and the rest goes input by input.
"""

from itertools import takewhile

from qlab.algebra.stats import COMPARING, name_of
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Folded, Gauged


def turned_first(recipe: Transform) -> tuple[Transform, Transform]:
    """The steps that turn the whole block first, and those behind them; none of the first where no
    later one compares with the reference, or where none turns several inputs at once."""
    first = tuple(takewhile(_turns, recipe))
    behind = recipe[len(first) :]
    compares = any(name_of(need) in COMPARING for stage in behind for need in stage.needs)
    at_once = any(isinstance(s.view, Gauged) and not s.view.site_by_site for s in first)
    return (first, behind) if compares and at_once else ((), recipe)


def _turns(stage: Stage) -> bool:
    """Whether a step keeps the function of a block and reads no data, so that the reference takes
    the same one."""
    return isinstance(stage.view, Gauged | Folded) and not stage.needs
