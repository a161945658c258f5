"""A job that is being done: what it writes, and what is kept of it from block to block."""

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
from qlab.driver.shared import refuse_divided
from qlab.driver.solve import Check, unchecked
from qlab.files.record import input_spec_of, spec_of, written
from qlab.files.writer import Writer
from qlab.model.calls import Call
from qlab.model.linears import by_module
from qlab.model.skeleton import Skeleton
from qlab.model.ties import untied


@dataclass(frozen=True)
class Run:
    job: Job
    writer: Writer
    experts_at_once: int | None
    checked: set[Code] = field(
        default_factory=set
    )  # programs on a block of which the claims of its stages were checked

    @property
    def codec(self) -> Codec:
        """The format that is written."""
        return CODECS[self.job.codec]

    def check(self, code: Code, call: Call, batches: Batches) -> Check:
        """What checks its stages on a block of this program: the first batch, on the first such
        block."""
        if code in self.checked:
            return unchecked
        self.checked.add(code)

        def check(stage: Stage, before: ModuleGraph, after: ModuleGraph) -> None:
            refuse_changed(stage, before, after, call, batches)
            refuse_left(self.job.recipe, stage, after, self.codec)

        return check


def finish(skeleton: Skeleton, run: Run) -> None:
    model, notes = skeleton.checkpoint, run.writer.notes()
    refuse_divided(notes)
    specs: dict[str, Spec | None] = {}
    inputs: dict[str, InputSpec | None] = {}
    for name, row in notes["sites"].items():
        specs[name] = spec_of(row)
        inputs |= dict.fromkeys(skeleton.names.modules(name), input_spec_of(row))
    rounding = [inputs] if any(inputs.values()) else []
    together = {*skeleton.names.tied, *skeleton.names.tied.values()}
    around = notes["sites"].keys() & outside_sites(skeleton).keys()
    separated = any(f"{name}.weight" in together for name in around)
    raw = untied(model.raw) if separated or skeleton.names.apart else model.raw
    config = {
        **raw,
        "quantization_config": run.codec.config(by_module(skeleton, specs), *rounding),
    }
    run.writer.finish(written(config, run.writer.hashed_job(), notes), model.path)
