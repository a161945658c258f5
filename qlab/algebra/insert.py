"""An operation at run time on the wires of a program, made for each of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from qlab.algebra.called import called
from qlab.algebra.graph import ModuleGraph, Op
from qlab.algebra.rounding import Copies
from qlab.algebra.stats import Need, Stats, name_of, named
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import OnWires
from qlab.algebra.wires import Wire, open_wires
from qlab.errors import QlabError

Make = Callable[[Wire, Mapping[str, Any]], Op]  # a wire and its statistics by name -> an operation


def insert(
    name: str,
    wires: str,
    make: Make,
    needs: Iterable[Need] = (),
    online: tuple[Op, ...] = (),
    detail: str = "",
) -> Transform:
    """Put an operation on every wire that a pattern matches: a rounding, a scale, a rotation.

    It comes behind what is on the wire already, and sees the value as rows [..., k]: of queries,
    keys and values the channels of all heads side by side. The traced program stays as it is.
    Routers are left alone.

    Args:
        name: The stage's name in plans, reports and errors.
        wires: A pattern over the names of wires, or over those in the model (see `at`): `*:in`,
            `*.self_attn:key`, `re:.*:(key|value)`, `*:enter`, `*.mlp.act_fn:out`.
        make: Gets the wire and its statistics by name, as copies, and returns the operation x -> x,
            which keeps the shape and writes to nothing. Its result is cast to the dtype of x.
        needs: The statistics, names or qlab.Stat values of your own. They are those of the value
            that comes from what was quantized before, without this operation.
        online: What `make` returns, as a codec is asked about it before any work.
        detail: Settings in words, for plans and reports.

    Returns:
        A transform of one stage. Blocks without such a wire stay as they are.

    Raises:
        QlabError: `make` returns no function; a statistic of one's own has no name.

    Example:
        >>> import qlab
        >>> def halve(wire, stats):
        ...     return lambda x: x / 2
        >>> (stage,) = qlab.insert("halve", "*.self_attn:query", halve)
        >>> stage.name, stage.view.wires
        ('halve', '*.self_attn:query')
    """
    needs = named(needs)

    def run(graph: ModuleGraph, stats: Stats) -> tuple[ModuleGraph, Stats]:
        for wire in open_wires(graph):
            wire = replace(wire, path=graph.path)
            seen = {name_of(need): stats[wire.key, need] for need in needs}
            copies = Copies(seen, f"{wire.where}: ")
            op = called(f"{wire.where}: what {name} makes of it", make, wire, copies)
            if not callable(op):
                raise QlabError(
                    f"the stage {name!r} made a {type(op).__name__} for "
                    f"{graph.path}.{wire.name}; return a function x -> x"
                )
            graph = graph.inserting(wire.name, op)
        return graph, stats

    return (Stage(name, needs, run, OnWires(wires, online), detail=detail),)
