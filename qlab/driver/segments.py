"""One block at a time, as each of several jobs solves it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from qlab.algebra.frame import framing
from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.qtensor import dense
from qlab.algebra.running import apply
from qlab.algebra.transform import Stage, Transform
from qlab.codecs import CODECS
from qlab.driver.batches import Batches, push
from qlab.driver.divided import Divided
from qlab.driver.effects import refuse_left
from qlab.driver.job import Job
from qlab.driver.learning import BlockSamples, split
from qlab.driver.lossless import refuse_changed
from qlab.driver.observe import (
    Division,
    Observe,
    Reference,
    observe,
    remembering,
    with_samples,
)
from qlab.driver.parts import Parts, collected, write_states
from qlab.driver.ranks import Ranks
from qlab.driver.sharded import Sharded, laid, with_held
from qlab.driver.sharing import see_reference
from qlab.driver.shelved import Shelved
from qlab.driver.solve import Check, solve, solve_beside, solve_in_order, unchecked
from qlab.driver.states import flat
from qlab.driver.turned import reference_of, turned_first
from qlab.files.carry import Carry
from qlab.files.tensors import refuse_overflow
from qlab.model.calls import Call, State
from qlab.model.loading import load_block
from qlab.model.skeleton import Skeleton


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A job while its blocks are solved. ranks: those that solve them together. experts_at_once,
    is_sharded: as of its plan. checked: the programs of which the claims of the job's stages were
    checked on a block. later: stages behind the job's, for whom targets are kept."""

    job: Job
    ranks: Ranks
    experts_at_once: int | None = None
    is_sharded: bool = False
    later: Transform = ()
    checked: set[Code] = field(default_factory=set)

    def check(self, code: Code, call: Call, batches: Batches) -> Check:
        """What checks the claims of the job's stages on a block of this program, with the first
        batch: on the first block of every program, and on no other. Rank 0 has that batch."""
        if code in self.checked or not self.ranks.is_first:
            return unchecked
        self.checked.add(code)

        def check(stage: Stage, before: ModuleGraph, after: ModuleGraph) -> None:
            refuse_changed(stage, before, after, call, batches)
            if self.job.codec is not None:
                refuse_left(self.job.recipe, stage, after, CODECS[self.job.codec])

        return check


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A block before and after the stages of a job. index: of the block, from 0. by: the job's
    number among those that share the pass. after: with the turns into its basis and back at its
    ends, where it has one."""

    index: int
    by: int
    before: ModuleGraph
    after: ModuleGraph


def solved_by_each(
    skeleton: Skeleton,
    solvers: Sequence[Solver],
    call: Call,
    index: int,
    tokens: Sequence[int],
    streams: Sequence[Batches],
    after: Iterable[Carry],
    shelved: Shelved | None = None,
    ready: Callable[[], None] = lambda: None,
) -> Iterator[Solved]:
    """A block as each job solves it; behind the last one, the hidden states that leave it are
    written, by rank 0.

    Nothing of the block outlives the iteration.

    Args:
        skeleton: The model.
        solvers: Their jobs differ in their recipes alone.
        call: A call of the block, of the form that all of them have.
        index: Number of the block, from 0.
        tokens: Of each batch, of all ranks.
        streams: The batches that enter the block: first in the model that is calibrated, then in
            the unquantized one, where that runs beside it.
        after: Stream by stream, where the states that leave go; empty where nobody needs them.
            It is asked when the block is solved.
        shelved: The statistics of the unquantized model that are kept.
        ready: Makes the batches that enter the block, where they are not there yet.
    """
    batches, first = streams[0], solvers[0].job
    path = list(skeleton.blocks)[index]
    graph = solved = _loaded(skeleton, path, call, solvers)
    if any(solver.job.observed is not None for solver in solvers):
        _refuse_overflow(skeleton, graph)
    reference = Reference(graph, streams[1]) if streams[1:] else None
    division = _division(solvers, graph, tokens, skeleton.device, ready)
    everywhere = first.calibrate_all_experts
    observing = partial(
        observe, batches=batches, calibrate_all_experts=everywhere, division=division
    )
    look: Observe = partial(observing, reference=reference)
    if shelved is not None:
        look = shelved.observing(graph, look, division)
    if len(solvers) > 1:
        look = remembering(graph, look)
    leaving: list[Iterator[State]] = []
    for number, solver in enumerate(solvers):
        solved = graph  # lets go of the job before
        check = solver.check(graph.code, call, batches)
        start = _start(solver, graph, check)
        beside, seen = reference, look
        begun = solver.job.begun
        if reference is not None and ("enter" in start.inserts or begun is not None):
            # it is compared channel by channel
            begun_by = () if begun is None else begun.recipe
            beside = replace(reference, graph=reference_of(begun_by, graph, start))
            seen = partial(observing, reference=beside)
        solved, leaving = _solved(solver, (graph, start), streams, beside, seen, check, division)
        del start, beside, seen
        yield Solved(index=index, by=number, before=graph, after=solved)
    passed = [solved if first.inputs == "quantized" else graph, graph][: len(streams)]
    del graph, solved, look  # one version of the block per stream is enough from here on
    if not leaving:
        leaving = [push(version, enter()) for version, enter in zip(passed, streams)]
    ranks = solvers[0].ranks
    for carry, states in zip(after, leaving):
        write_states(
            carry, flat(collected(states, Parts(len(tokens)), ranks), skeleton.dtype), ranks
        )
    ranks.told(None)  # the others read what rank 0 has written


def _loaded(skeleton: Skeleton, path: str, call: Call, solvers: Sequence[Solver]) -> ModuleGraph:
    """The block as the files hold it, of which each rank has some rows where it is sharded."""
    first = solvers[0]
    if not first.is_sharded:
        return load_block(skeleton, path, call, decoded=True)
    shards = laid(skeleton.programs.code(path, call), first.job.recipe, path, first.ranks)
    return with_held(load_block(skeleton, path, call, decoded=True, laid=shards))


def _division(
    solvers: Sequence[Solver],
    graph: ModuleGraph,
    tokens: Sequence[int],
    device: torch.device,
    ready: Callable[[], None],
) -> Division:
    """How the block is observed and solved. tokens: of each batch. ready: makes those that enter
    it. Statistics on a GPU are not in the memory of the host, and stay there."""
    ranks = solvers[0].ranks
    offload = solvers[0].job.offload if device.type == "cpu" else None
    if ranks.world == 1:
        return Division(Parts(len(tokens)).size, offload)
    stages = tuple(stage for solver in solvers for stage in solver.job.recipe)
    one_by_one = all(solver.job.in_order(graph.code) for solver in solvers)
    is_sharded = solvers[0].is_sharded
    return Divided(ranks, stages, graph, tokens, one_by_one, offload, is_sharded, ready)


def _start(solver: Solver, graph: ModuleGraph, check: Check) -> ModuleGraph:
    """The block that the stages are applied to: as the stages before a bind left it, or as it was
    loaded, in the basis that the recipe begins with."""
    begun = solver.job.begun
    if begun is not None:
        device = next(t.device for t in graph.params.values() if isinstance(t, Tensor))
        graph = replace(begun.block(graph.path, device), code=graph.code)
    for stage in framing(solver.job.recipe)[0]:
        before = graph
        graph, _ = apply(stage, graph, {})
        check(stage, before, graph)
    return graph


def _solved(
    solver: Solver,
    loaded_and_start: tuple[ModuleGraph, ModuleGraph],
    streams: Sequence[Batches],
    reference: Reference | None,
    look: Observe,
    check: Check,
    division: Division,
) -> tuple[ModuleGraph, list[Iterator[State]]]:
    """The block after all stages behind those that choose its basis, and what leaves it, stream by
    stream, where that is known.

    loaded_and_start: the unquantized block, and the one that the stages are applied to.
    """
    graph, start = loaded_and_start
    _, behind = framing(solver.job.recipe)
    site_by_site, learning = split(behind)
    samples = BlockSamples(graph, streams) if learning else None
    later = (*learning, *solver.later)
    leaving: list[Iterator[State]] = []
    if not site_by_site and learning:
        solved = start
    elif solver.job.in_order(graph.code):
        turning, in_turn = turned_first(site_by_site, graph.code)
        if turning:
            assert reference is not None  # a step behind them compares with it
            start, beside = solve_beside(
                start, reference.graph, turning, look, check, (*in_turn, *later), division
            )
            reference = replace(reference, graph=beside)
        solved, leaving = solve_in_order(
            start, in_turn, streams[0], solver.experts_at_once, reference, check, later, division
        )
    else:
        solved, _ = solve(start, site_by_site, look, check, later, division)
    if samples:
        with_them = with_samples(look, samples)
        solved, _ = solve(solved, learning, with_them, check, solver.later, division)
        if solver.is_sharded:  # also where no step saw the block
            see_reference(samples, solver.ranks)
        beside_it = samples.reference_leaving(division.batches(samples.count))
        # What left the block before it learned is of no use any more.
        leaving = [push(solved, streams[0]()), beside_it] if streams[1:] else []
    return solved, leaving


def _refuse_overflow(skeleton: Skeleton, graph: ModuleGraph) -> None:
    """Refuse leaves with numbers that the dtype in which they run does not have."""
    for name, dtype in graph.held.items():
        where = f"{skeleton.checkpoint.path}: {graph.path}.{name}"
        leaf = graph.params[name]
        for part in leaf.matrices() if isinstance(leaf, Sharded) else (dense(leaf),):
            refuse_overflow(where, part, dtype)
