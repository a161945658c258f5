"""A job while it is written: what lies around the blocks, each solved block, and its end."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.frame import in_frame
from qlab.algebra.graph import Code, ModuleGraph, Op
from qlab.algebra.qtensor import Leaf
from qlab.algebra.spec import InputSpec, Spec
from qlab.codecs import Codec, quantization_of
from qlab.codecs.around import SECTION as AROUND
from qlab.data.overlap import sketch
from qlab.driver.around import encoded, held, told
from qlab.driver.ending import SECTION, as_held, probe, probe_outside, refuse_unreadable
from qlab.driver.job import Job
from qlab.driver.outside import (
    carried,
    outside_leaves,
    outside_sites,
    parted,
    rounded_outside,
)
from qlab.driver.planned import Plan
from qlab.driver.ranks import Ranks
from qlab.driver.report import site_rows
from qlab.driver.scan import Scan, solved_blocks
from qlab.driver.segments import Solved, Solver
from qlab.driver.shared import refuse_divided, shared
from qlab.driver.writing import (
    as_stored,
    certificates,
    changed,
    encode,
    hashes,
    measured,
    online_at,
    originals,
    refuse_unwritten,
    unused,
)
from qlab.files.explained import KEY
from qlab.files.readback import Mark, mark, refuse_misread
from qlab.files.record import input_spec_of, spec_of, written
from qlab.files.writer import Writer
from qlab.model.calls import Call
from qlab.model.linears import by_module
from qlab.model.skeleton import Skeleton
from qlab.model.ties import untied
from qlab.process.ahead import Ahead
from qlab.process.surroundings import undisturbed


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job while it is written. ranks: those that make it together. own_writer: of rank 0, which
    alone writes; None on others. probed: the programs of which a block was run for the check at the
    end."""

    job: Job
    plan: Plan
    ranks: Ranks
    own_writer: Writer | None
    codec: Codec
    probed: set[Code] = field(default_factory=set)

    @property
    def solver(self) -> Solver:
        """What solves its blocks."""
        return Solver(
            job=self.job.remaining,
            ranks=self.ranks,
            experts_at_once=self.plan.experts_at_once,
            is_sharded=self.plan.is_sharded,
        )

    @property
    def writer(self) -> Writer:
        """What writes it, on rank 0."""
        assert self.own_writer is not None
        return self.own_writer

    def probes(self, solved: ModuleGraph, call: Call) -> dict[str, dict[str, list[list[float]]]]:
        """The probe of a solved block, as a section of its notes: of the first block of every
        program, and of no other."""
        if solved.code in self.probed:
            return {}
        self.probed.add(solved.code)
        return {SECTION: {solved.path: probe(as_held(solved), call)}}


def write_outside(skeleton: Skeleton, run: Run) -> None:
    """Write what lies outside the blocks, one leaf at a time."""
    notes: dict[str, dict[str, Any]] = {"sites": {}, "certificates": {}, "changed": {}}
    taken_by_nobody = carried(skeleton)
    marks: dict[str, Mark] = {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for part in outside_leaves(skeleton, run.job.recipe):
            notes["sites"].update(part.rows)
            notes["certificates"].update(part.certificates)
            notes["changed"].update(part.changed)
            marks[part.name] = mark(part.leaf)
            if part.name in taken_by_nobody and isinstance(part.leaf, Tensor):
                yield part.name, part.leaf  # whatever numbers it holds
            else:
                yield from encode({part.name: part.leaf}, run.codec, {}).items()

    run.writer.write_shard(0, tensors())
    refuse_misread(run.writer.shard(0), marks, run.codec)
    run.writer.write_notes(0, notes)


def write_blocks(scan: Scan, runs: Sequence[Run]) -> Iterator[None]:
    """Solve every block of a pass and write it; steps behind each of a job.

    Without data no block waits for what is made of another, and one is written while the next one
    is read and solved. With data it is written before its hidden states go.

    runs: those of the pass, in its order.
    """
    if scan.data is None and runs[0].ranks.world == 1:
        yield from _overlapped(scan, runs)
        return
    for block in solved_blocks(scan):
        if runs[block.by].ranks.is_first:
            call = scan.calls[0][block.after.path]
            write_solved(scan.skeleton, runs[block.by], block, call)
        del block  # lets go of it before the next one is solved
        yield


def _overlapped(scan: Scan, runs: Sequence[Run]) -> Iterator[None]:
    """The same, where a thread writes a block while this one solves the next."""
    with Ahead() as ahead:
        written: Future[None] = ahead.begin(lambda: None)
        try:
            for block in solved_blocks(scan):
                call = scan.calls[0][block.after.path]
                ready = _ready(scan.skeleton, runs[block.by], block, call)
                written.result()  # of the block before
                written = ahead.begin(_write, runs[block.by], ready)
                del block, ready  # lets go of them before the next one is solved
                yield
        finally:
            written.result()  # what is done stays, also where the next block cannot be read


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A solved block, ready to be written. It holds nothing of the unquantized one.

    number: of its segment. leaves: by their names in the files. online: what still happens to
    their inputs. around: the tensors beside them. notes: all but the probe. after: the block, and
    call what it is called with, for that.
    """

    number: int
    leaves: Mapping[str, Leaf]
    online: Mapping[str, tuple[Op, ...]]
    around: Mapping[str, Tensor]
    notes: Mapping[str, Mapping[str, Any]]
    after: ModuleGraph
    call: Call


def write_solved(skeleton: Skeleton, run: Run, block: Solved, call: Call) -> None:
    """Write the shard and the notes of a block, and read the shard back."""
    _write(run, _ready(skeleton, run, block, call))


def _ready(skeleton: Skeleton, run: Run, block: Solved, call: Call) -> _Ready:
    """What is written of a block. Refuses what the files have no place for."""
    before, after = block.before, in_frame(block.after)
    around, left = held(after, run.codec)
    refuse_unwritten(skeleton, before, left)
    leaves = as_stored(skeleton, after)
    changed_names = changed(skeleton, before, after)
    online = online_at(skeleton, after, run.codec)
    tensors, rows = encoded(skeleton, around, run.codec)
    known = measured(skeleton, run.job.recipe, after)
    notes: dict[str, Mapping[str, Any]] = {
        "sites": site_rows(after),
        "certificates": certificates(skeleton, leaves, originals(skeleton, before), known),
        "changed": hashes(leaves, changed_names),
        **rows,
        **unused(skeleton, before),
        **shared(skeleton, after, changed_names),
    }
    return _Ready(
        number=block.index + 1,
        leaves=leaves,
        online=online,
        around=tensors,
        notes=notes,
        after=after,
        call=call,
    )


@undisturbed
@torch.no_grad()
def _write(run: Run, solved: _Ready) -> None:
    """Write the shard and the notes of a block, and read the shard back."""
    from qlab_kernels.buffers import reused

    with reused():
        tensors = {**encode(solved.leaves, run.codec, solved.online), **solved.around}
        run.writer.write_shard(solved.number, tensors.items())
        del tensors
        refuse_misread(run.writer.shard(solved.number), solved.leaves, run.codec, solved.online)
    notes = {**solved.notes, **run.probes(solved.after, solved.call)}
    run.writer.write_notes(solved.number, notes)


def finish(skeleton: Skeleton, run: Run, calls: Mapping[str, Call], tokens: Sequence[int]) -> None:
    """Write config.json and qlab.json of a run whose segments are all written, open the whole as
    its readers do, and put it in place.

    calls: path of a block -> what it is called with. tokens: (windows, tokens in each), of which
    that was made.
    """
    model, notes = skeleton.checkpoint, run.writer.notes()
    probes = notes.pop(SECTION, {})
    if run.job.observed is not None:
        notes["calibration"] = sketch(run.job.observed)
    refuse_divided(notes)
    specs: dict[str, Spec | None] = {}
    inputs: dict[str, InputSpec | None] = {}
    for name, row in notes["sites"].items():
        specs[name] = spec_of(row)
        inputs |= dict.fromkeys(skeleton.names.modules(name), input_spec_of(row))
    rounding = [inputs] if any(inputs.values()) else []
    outside = notes["sites"].keys() & outside_sites(skeleton).keys()
    separated = parted(skeleton, run.job.recipe, outside)
    raw = untied(model.raw) if separated or skeleton.names.apart else model.raw
    grids = by_module(skeleton, specs)
    codes = {path: skeleton.programs.code(path, call) for path, call in calls.items()}
    around = told(skeleton, notes.get(AROUND, {}), codes, run.codec)
    quantization = quantization_of(run.codec, grids, *rounding, around=around)
    config = {key: value for key, value in raw.items() if key != KEY}
    config |= {} if quantization is None else {KEY: quantization}
    rounded = rounded_outside(skeleton, run.job.recipe)
    check = partial(
        refuse_unreadable,
        skeleton=skeleton,
        specs=grids,
        inputs=inputs,
        around=notes.get(AROUND, {}),
        codec=run.codec,
        probes=probes,
        calls=calls,
        tokens=tokens,
        outside=probe_outside(skeleton, rounded, calls[list(skeleton.blocks)[-1]], tokens),
    )
    run.writer.finish(written(config, run.writer.hashed_job(), notes), model.path, check)
