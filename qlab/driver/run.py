"""A job while it is done: its plan, its writer, and its end."""

from dataclasses import dataclass, field

from qlab.algebra.graph import Code, ModuleGraph
from qlab.algebra.spec import InputSpec, Spec
from qlab.algebra.transform import Stage
from qlab.codecs import CODECS, Codec
from qlab.driver.batches import Batches
from qlab.driver.effects import refuse_left
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
    checked on a block."""

    job: Job
    plan: Plan
    writer: Writer
    checked: set[Code] = field(default_factory=set)

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


def finish(skeleton: Skeleton, run: Run) -> None:
    """Write config.json and qlab.json of a run whose segments are all written, and put its output
    in place."""
    model, notes = skeleton.checkpoint, run.writer.notes()
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
    config = {
        **raw,
        "quantization_config": run.codec.config(by_module(skeleton, specs), *rounding),
    }
    run.writer.finish(written(config, run.writer.hashed_job(), notes), model.path)
