"""Which steps turn a whole block before its inputs are solved one after the other, and the
reference beside it.

A rotation of heads, or one at run time, needs all inputs of a block at once, and in a mixture so
does a scale of what several inputs are made of. A recipe that holds one is solved at once as a
whole: every statistic is of the block before any of its weights moved. For a target that compares
with the reference that is wrong. Each weight would make up for the same drift, o_proj and down_proj
both for all that the residual stream lacks, and the sum of their steps overshoots by as much as
there was to make up for, block after block. So what turns comes first, on the block and on the
reference beside it, and the rest goes input by input.
"""

from collections.abc import Mapping
from itertools import groupby, takewhile

from qlab.algebra.bind import Bind, Bound
from qlab.algebra.frame import framed_like, framing
from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.stats import COMPARING, name_of
from qlab.algebra.transform import Stage, Transform, unchanged
from qlab.algebra.views import Folded, Gauged
from qlab.driver.learning import split
from qlab.driver.observe import observe_nothing
from qlab.driver.solve import in_turn, solve
from qlab.errors import QlabError


def turned_first(recipe: Transform, code: Code) -> tuple[Transform, Transform]:
    """The steps that turn the whole block first, and those behind them; none of the first where no
    later one compares with the reference, or where all turn input by input."""
    turning = tuple(takewhile(_turns, recipe))
    at_once = [i for i, stage in enumerate(turning) if _needs_all_inputs(stage, code, recipe)]
    if not at_once:
        return (), recipe
    last = at_once[-1] + 1
    last += len(list(takewhile(lambda stage: not stage.needs, turning[last:])))
    first, behind = recipe[:last], recipe[last:]
    return (first, behind) if any(map(_compares, behind)) else ((), recipe)


def _turns(stage: Stage) -> bool:
    """Whether a step keeps the function of a block and compares it with nothing, so that the
    reference takes the same one; one that does nothing stands in the way of none."""
    keeps = isinstance(stage.view, Gauged | Folded) or stage.apply is unchanged
    return keeps and not _compares(stage)


def _needs_all_inputs(stage: Stage, code: Code, recipe: Transform) -> bool:
    return isinstance(stage.view, Gauged) and not in_turn(stage, code, recipe)


def _compares(stage: Stage) -> bool:
    return any(name_of(need) in COMPARING for need in stage.needs)


# ------------------------------------------------------------------ the reference
def reference_of(begun_by: Transform, graph: ModuleGraph, start: ModuleGraph) -> ModuleGraph:
    """The unquantized block in the basis in which the steps of a recipe find the block.

    Args:
        begun_by: The steps in front of the last bind, which made what they find; none without one.
        graph: The block as it was loaded.
        start: The block as the steps find it.
    """
    if begun_by and all(map(_keeps, begun_by)):
        return start
    beside = framed_like(graph, start)
    turning = tuple(stage for stage in begun_by if _turns(stage) and not stage.needs)
    beside, _ = solve(beside, turning, observe_nothing)
    return beside


def _keeps(stage: Stage) -> bool:
    """Whether what a block computes is the same behind a step."""
    return stage.view.keeps_function or stage.apply is unchanged


def refuse_lost_turns(recipe: Transform) -> None:
    """Refuse a step that compares with the reference, behind a measurement of blocks that were
    turned by statistics and rounded: nothing says how to turn the reference."""
    for place, stage in enumerate(recipe):
        front, behind = recipe[:place], recipe[place + 1 :]
        if not isinstance(stage, Bind | Bound) or all(map(_keeps, front)):
            continue
        turned = [step for step in front if isinstance(step.view, Gauged) and step.needs]
        comparing = [step for step in behind if _compares(step)]
        if turned and comparing:
            raise QlabError(
                f"{comparing[0].name} compares with the reference behind {stage.name}, and "
                f"{turned[0].name} turned what was rounded in front of that by statistics, which "
                f"the reference does not take; put {stage.name} in front of {turned[0].name}"
            )


def refuse_late_turns(recipe: Transform, codes: Mapping[str, Code]) -> None:
    """Refuse a step that compares with the reference in a block that another step turns as a whole,
    behind a step that does not turn: nothing turns the reference there.

    codes: path of a block -> its program.
    """
    for measured, part in groupby(recipe, lambda stage: isinstance(stage, Bind | Bound)):
        if measured:
            continue
        site_by_site, _ = split(framing(tuple(part))[1])
        for path, code in codes.items():
            _, behind = turned_first(site_by_site, code)
            late = [stage for stage in behind if _turns(stage) and _is_at_once(stage, code, behind)]
            comparing = [stage for stage in behind if _compares(stage)]
            if late and comparing:
                front = next(stage for stage in behind if not _turns(stage))
                raise QlabError(
                    f"{comparing[0].name} compares with the reference, and {late[0].name} turns "
                    f"all inputs of {path} at once behind {front.name}, which the reference does "
                    f"not take; put {late[0].name} in front of {front.name}"
                )


def _is_at_once(stage: Stage, code: Code, recipe: Transform) -> bool:
    """Whether a step works on all inputs of a block at once."""
    return isinstance(stage.view, Gauged | Folded) and not in_turn(stage, code, recipe)
