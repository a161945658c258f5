"""One part of the model at a time, solved and written for every run: what surrounds
the blocks, and each block."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from qlab.algebra.graph import ModuleGraph, refuse_overflow
from qlab.algebra.qtensor import dense
from qlab.driver.batches import Batches, push
from qlab.driver.observe import Observe, Reference, observe, remembering
from qlab.driver.outside import carried, outside_leaves
from qlab.driver.report import site_rows
from qlab.driver.run import Run
from qlab.driver.shared import shared
from qlab.driver.solve import solve, solve_in_order
from qlab.driver.states import flat
from qlab.driver.writing import (
    as_stored,
    certificates,
    changed,
    encode,
    hashes,
    online_at,
    originals,
    refuse_unwritten,
    unused,
)
from qlab.files.carry import Carry
from qlab.files.readback import Mark, mark, refuse_misread
from qlab.model.calls import Call, State
from qlab.model.loading import load_block
from qlab.model.skeleton import Skeleton


def write_outside(skeleton: Skeleton, run: Run) -> None:
    """Write what lies outside the blocks, one leaf at a time."""
    notes: dict[str, dict[str, Any]] = {"sites": {}, "certificates": {}, "changed": {}}
    taken_by_nobody = carried(skeleton)
    marks: dict[str, Mark] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for written in outside_leaves(skeleton, run.job.recipe):
            notes["sites"].update(written.rows)
            notes["certificates"].update(written.certificates)
            marks[written.name] = mark(written.leaf)
            if written.name in taken_by_nobody and isinstance(written.leaf, Tensor):
                yield written.name, written.leaf  # whatever numbers it holds
            else:
                yield from encode({written.name: written.leaf}, run.codec, {}).items()

    run.writer.write_shard(0, tensors())
    refuse_misread(run.writer.shard(0), marks, run.codec)
    run.writer.write_notes(0, notes)


def write_block(
    skeleton: Skeleton,
    runs: Sequence[Run],
    call: Call,
    index: int,
    streams: Sequence[Batches],
    after: Sequence[Carry],
) -> None:
    """Solve a block and write it for every run, and write the hidden states that leave it.

    Nothing of the block outlives the call.

    Args:
        skeleton: The model.
        runs: The runs, whose jobs differ in their recipes alone.
        call: A call of the block, of the form that all of them have.
        index: Number of the block, from 0.
        streams: The batches that enter the block: first in the model that is calibrated, then in
            the unquantized one, where that runs beside it.
        after: Stream by stream, where the states that leave go; empty where nobody needs them.
    """
    batches = streams[0]
    graph = solved = load_block(skeleton, list(skeleton.blocks)[index], call, decoded=True)
    if any(run.job.observed is not None for run in runs):
        for name, dtype in graph.held.items():
            refuse_overflow(
                f"{skeleton.checkpoint.path}: {graph.path}.{name}", dense(graph.params[name]), dtype
            )
    reference = Reference(graph, streams[1]) if streams[1:] else None

    look: Observe = partial(
        observe,
        batches=batches,
        calibrate_all_experts=runs[0].job.calibrate_all_experts,
        reference=reference,
    )
    if len(runs) > 1:
        look = remembering(graph, look)
    leaving: list[Iterator[State]] = []
    for run in runs:
        solved = graph  # lets go of the run before
        check = run.check(graph.code, call, batches)
        if run.job.in_order(graph.code):
            solved, leaving = solve_in_order(
                graph, run.job.recipe, batches, run.plan.experts_at_once, reference, check
            )
        else:
            solved, _ = solve(graph, run.job.recipe, look, check)
        _write_solved(skeleton, run, index, call, (graph, solved))
    passed = [solved if runs[0].job.inputs == "quantized" else graph, graph][: len(streams)]
    del graph, solved, look  # one version of the block per stream is enough from here on
    if not leaving:
        leaving = [push(version, enter()) for version, enter in zip(passed, streams)]
    for carry, states in zip(after, leaving):
        carry.write(flat(states, skeleton.dtype))


def _write_solved(
    skeleton: Skeleton,
    run: Run,
    index: int,
    call: Call,
    versions: tuple[ModuleGraph, ModuleGraph],
) -> None:
    """Write the shard and the notes of a block, and read the shard back. versions: the block before
    any stage, and after all of them."""
    graph, solved = versions
    refuse_unwritten(skeleton, graph, solved)
    leaves = as_stored(skeleton, solved)
    changed_names = changed(skeleton, graph, solved)
    online = online_at(skeleton, solved, run.codec)
    run.writer.write_shard(index + 1, encode(leaves, run.codec, online).items())
    refuse_misread(run.writer.shard(index + 1), leaves, run.codec, online)
    notes: dict[str, Mapping[str, Any]] = {
        "sites": site_rows(solved),
        "certificates": certificates(skeleton, leaves, originals(skeleton, graph)),
        "changed": hashes(leaves, changed_names),
        **unused(skeleton, graph),
        **shared(skeleton, solved, changed_names),
        **run.probes(solved, call),
    }
    run.writer.write_notes(index + 1, notes)
