"""In which order the steps of a recipe run, and what each of them sees and asks for.

What lies around the blocks comes first, and then one block after the other. In a block that is
solved input by input, what turns all of it comes first (`qlab.driver.turned`). The steps that see
one input at a time run at each of them in their order, and those that fold when all inputs are
done. A step that measures the whole model ends a scan over all blocks, and the steps behind it are
another.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qlab.algebra.bind import Foreseen
from qlab.algebra.block import BLOCK_IO
from qlab.algebra.frame import framing
from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.running import keys_of, select
from qlab.algebra.scope import Scope
from qlab.algebra.spec import described
from qlab.algebra.stats import STATS, Need, name_of
from qlab.algebra.transform import Stage, Transform
from qlab.algebra.views import Gauged, Uncovered, WholeBlock, WholeModel
from qlab.algebra.wires import open_wires
from qlab.driver.foreseen import Measured
from qlab.driver.job import Job
from qlab.driver.learning import split
from qlab.driver.observe import DRIFT
from qlab.driver.reach import unseen
from qlab.driver.sites import Sites
from qlab.errors import warn
from qlab.process.shown import some

# when a step runs in a block
FIRST, IN_ORDER, TOGETHER = "before other steps", "input by input", "all inputs at once"
INPUTS_DONE, BLOCK_DONE = "when all inputs are done", "when the steps above are done"
# where a step runs that runs in no block
AROUND, MODEL = "around the blocks", "the whole model"
EVERY = str(Scope())


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step of a schedule.

    Args:
        step: Its name.
        spec: The grid that it rounds to, in words; empty where it rounds nothing.
        detail: Its settings in words.
        sees: What its function gets.
        where: Around the blocks, in how many blocks, or over the whole model.
        when: In a block, in which order with other steps; empty elsewhere.
        weights: How many weights it may change.
        wires: On how many wires it puts operations.
        scope: Which ones, as patterns.
        observes: The statistics that it reads.
        passes: How many forward passes through its blocks the statistics take that no step before
            it has observed.
        windows: How many windows it runs forward and backward in every block.
        unseen: The blocks that it leaves as they are, since their programs show no attention.
    """

    step: str
    spec: str
    detail: str
    sees: str
    where: str
    when: str
    weights: int
    wires: int
    scope: str
    observes: Sequence[str]
    passes: int
    windows: int
    unseen: Sequence[str]

    def json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {**vars(self), "observes": list(self.observes), "unseen": list(self.unseen)}

    @property
    def place(self) -> str:
        """Where and when it runs."""
        return ", ".join(filter(None, (self.where, self.when)))

    @property
    def reached(self) -> str:
        """What it works on."""
        counts = ((self.weights, "weight"), (self.wires, "wire"))
        counted = [f"{n:,} {noun}{'' if n == 1 else 's'}" for n, noun in counts if n]
        chosen = [] if self.scope == EVERY else [f"({self.scope})"]
        return " ".join([*counted, *chosen])

    @property
    def asks(self) -> str:
        """What it runs for, in words."""
        forward = {0: "", 1: "1 pass"}.get(self.passes, f"{self.passes} passes")
        learning = f"{self.windows:,} windows, forward and backward" if self.windows else ""
        return "; ".join(filter(None, (forward, learning)))


def schedule(job: Job, sites: Sites, measured: Measured) -> list[Row]:
    """The steps of a job in the order in which they run. measured: what its binds will run."""
    rows: list[Row] = []
    for part in _scans(job.recipe):
        if isinstance(part, Stage):
            place = next(i for i, stage in enumerate(job.recipe) if stage is part)
            rows.append(_of_model(part, measured.get(place)))
            continue
        for stage in part:
            if stage.scope.outside:
                touched = sum(stage.touches(name, site) for name, site in sites.around.items())
                rows.append(_row(stage, where=AROUND, touched=touched))
        scan = replace(job, recipe=tuple(stage for stage in part if not stage.scope.outside))
        for in_order in (True, False):
            for codes in _alike(scan, sites, in_order):
                turned = scan.turned_first(next(iter(codes.values())))
                rows += _of_blocks(scan.recipe, codes, sites, in_order, turned)
    return rows


def _alike(scan: Job, sites: Sites, in_order: bool) -> Iterator[dict[str, Code]]:
    """The blocks that are solved one way, those together that the same stages turn first."""
    alike: dict[int, dict[str, Code]] = {}
    for path, code in sites.codes.items():
        if scan.in_order(code) == in_order:
            turning, _ = scan.turned_first(code)
            alike.setdefault(len(turning), {})[path] = code
    yield from alike.values()


def warn_of_unseen(rows: Sequence[Row]) -> None:
    """Name the blocks that a step on attentions cannot reach."""
    for row in rows:
        if row.unseen:
            warn(
                f"{row.step} leaves {some(row.unseen)} as they are: their programs show no "
                "attention; say which blocks it is for, by at(), where that is meant"
            )


def rounds(rows: Sequence[Row]) -> int:
    """How many passes observe statistics in blocks whose inputs are solved together."""
    return sum(row.passes for row in rows if row.when == TOGETHER)


def _scans(recipe: Transform) -> Iterator[Transform | Stage]:
    """The recipe as scans over all blocks, and the steps between them that see the whole model."""
    scan: Transform = ()
    for stage in recipe:
        if isinstance(stage.view, Uncovered):
            continue
        if not isinstance(stage.view, WholeModel):
            scan = (*scan, stage)
            continue
        if scan:
            yield scan
        yield stage
        scan = ()
    if scan:
        yield scan


def _of_model(stage: Stage, foreseen: Foreseen | None) -> Row:
    """A step that measures the whole model."""
    row = _row(stage, where=MODEL)
    return row if foreseen is None else replace(row, windows=foreseen.backward)


def _of_blocks(
    recipe: Transform,
    codes: Mapping[str, Code],
    sites: Sites,
    in_order: bool,
    turned: tuple[Transform, Transform],
) -> Iterator[Row]:
    """The steps on those blocks that are solved one way."""
    graphs = [ModuleGraph(code, {}, path) for path, code in codes.items()]
    first, behind_basis = framing(recipe)
    site_by_site, learning = split(behind_basis)
    turning, in_turn = turned
    alone = [stage for stage in in_turn if stage.view.site_by_site]
    behind = [stage for stage in in_turn if not stage.view.site_by_site]
    if in_order:
        parts = [
            (turning, TOGETHER),
            (alone, IN_ORDER),
            (behind, INPUTS_DONE),
            (learning, BLOCK_DONE),
        ]
    else:
        parts = [(site_by_site, TOGETHER), (learning, BLOCK_DONE)]
    parts = [(first, FIRST), *parts]
    for stages, when in parts:
        seen = [_Seen(at_once=when == IN_ORDER) for _ in graphs]
        for stage in stages:
            reached = [(graph, s) for graph, s in zip(graphs, seen) if _touched(stage, graph)]
            if not reached:
                continue
            yield _row(
                stage,
                where=_blocks(len(reached), len(sites.codes)),
                when=when,
                touched=sum(_touched(stage, graph) for graph, _ in reached),
                passes=max([s.passes(stage, graph) for graph, s in reached]),
                unseen=unseen(stage, sites),
            )


def _touched(stage: Stage, graph: ModuleGraph) -> int:
    """On how many weights of a block, or wires, the step works."""
    chosen = select(stage, graph)
    return len(chosen.sites) if stage.view.wires is None else len(list(open_wires(chosen)))


class _Seen:
    """The statistics of one block that steps have observed so far.

    at_once: whether all steps read what one pass observes, since it waits at every input.
    """

    def __init__(self, at_once: bool):
        self.at_once = at_once
        self.keys: set[tuple[str, Need]] = set()

    def passes(self, stage: Stage, graph: ModuleGraph) -> int:
        """How many passes a step takes that comes next."""
        keys = {key for key in keys_of(stage, graph) if key[1] != BLOCK_IO}
        missing = keys - self.keys
        before, self.keys = self.keys, self.keys | keys
        if self.at_once:
            return int(bool(missing) and not before)
        # what compares with the reference is observed before any step, by itself
        compared = {key for key in missing if key[1] in DRIFT}
        other = missing - compared
        first = not any(key[1] in DRIFT for key in before)
        if isinstance(stage.view, Gauged) and stage.view.left:
            sources = {site.source for site in select(stage, graph).sites}
            self.keys = {key for key in self.keys if key[0] not in sources or _turns(key[1])}
        return int(bool(compared) and first) + int(bool(other))


def _turns(need: Need) -> bool:
    """Whether a statistic of inputs x @ M is known from that of x. One of a recipe's own is taken
    for one that is not."""
    if not isinstance(need, str):
        return False
    stat = STATS[need]
    return stat.transport(stat.nothing(2), torch.eye(2, dtype=torch.float32)) is not None


def _row(
    stage: Stage,
    where: str,
    when: str = "",
    touched: int = 0,
    passes: int = 0,
    unseen: Sequence[str] = (),
) -> Row:
    return Row(
        step=stage.name,
        spec=described(stage.spec) if stage.spec else "",
        detail=stage.detail,
        sees=stage.view.sees,
        where=where,
        when=when,
        weights=touched if stage.view.wires is None else 0,
        wires=0 if stage.view.wires is None else touched,
        scope=str(stage.scope),
        observes=sorted(map(name_of, stage.needs)),
        passes=passes,
        windows=stage.view.windows if isinstance(stage.view, WholeBlock) else 0,
        unseen=unseen,
    )


def _blocks(count: int, blocks: int) -> str:
    of_all = f" of {blocks}" if count < blocks else ""
    return f"{count}{of_all} {'block' if blocks == 1 else 'blocks'}"
