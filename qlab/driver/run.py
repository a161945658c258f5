"""A job while it is done: its plan, its writer, and its end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.spec import InputSpec, Spec
from qlab.algebra.transform import Stage
from qlab.codecs import CODECS, Codec
from qlab.driver.batches import Batches
from qlab.driver.effects import refuse_left
from qlab.driver.ending import SECTION, as_held, probe, refuse_unreadable
from qlab.driver.job import Job
from qlab.driver.lossless import refuse_changed
from qlab.driver.outside import outside_sites
from qlab.driver.plan import Plan
from qlab.driver.shared import refuse_divided
from qlab.driver.solve import Check, unchecked
from qlab.files.record import input_spec_of, spec_of, written
from qlab.files.writer import Writer
from qlab.model.calls import Call
from qlab.model.linears import by_module
from qlab.model.skeleton import Skeleton
from qlab.model.ties import untied


@dataclass(frozen=True, kw_only=True)
class Run:
    """A job while it is done. checked: the programs of which the claims of the job's stages were
    checked on a block. probed: those of which a block was run for the check at the end."""

    job: Job
    plan: Plan
    writer: Writer
    checked: set[Code] = field(default_factory=set)
    probed: set[Code] = field(default_factory=set)

    @property
    def codec(self) -> Codec:
        """The format that is written."""
        return CODECS[self.job.codec]

    def check(self, code: Code, call: Call, batches: Batches) -> Check:
        """What checks the claims of the job's stages on a block of this program, with the first
        batch: on the first block of every program, and on no other."""
        if code in self.checked:
            return unchecked
        self.checked.add(code)

        def check(stage: Stage, before: ModuleGraph, after: ModuleGraph) -> None:
            refuse_changed(stage, before, after, call, batches)
            refuse_left(self.job.recipe, stage, after, self.codec)

        return check

    def probes(self, solved: ModuleGraph, call: Call) -> dict[str, dict[str, list[list[float]]]]:
        """The probe of a solved block, as a section of its notes: of the first block of every
        program, and of no other."""
        if solved.code in self.probed:
            return {}
        self.probed.add(solved.code)
        return {SECTION: {solved.path: probe(as_held(solved), call)}}


def finish(skeleton: Skeleton, run: Run, calls: Mapping[str, Call]) -> None:
    """Write config.json and qlab.json of a run whose segments are all written, open the whole as
    its readers do, and put it in place.

    calls: path of a block -> what it is called with.
    """
    model, notes = skeleton.checkpoint, run.writer.notes()
    probes = notes.pop(SECTION, {})
    refuse_divided(notes)
    specs: dict[str, Spec | None] = {}
    inputs: dict[str, InputSpec | None] = {}
    for name, row in notes["sites"].items():
        specs[name] = spec_of(row)
        inputs |= dict.fromkeys(skeleton.names.modules(name), input_spec_of(row))
    rounding = [inputs] if any(inputs.values()) else []
    tied_names = {*skeleton.names.tied, *skeleton.names.tied.values()}
    outside = notes["sites"].keys() & outside_sites(skeleton).keys()
    separated = any(f"{name}.weight" in tied_names for name in outside)
    raw = untied(model.raw) if separated or skeleton.names.apart else model.raw
    grids = by_module(skeleton, specs)
    config = {**raw, "quantization_config": run.codec.config(grids, *rounding)}
    check = partial(
        refuse_unreadable,
        skeleton=skeleton,
        specs=grids,
        inputs=inputs,
        probes=probes,
        calls=calls,
    )
    run.writer.finish(written(config, run.writer.hashed_job(), notes), model.path, check)
