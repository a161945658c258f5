"""What a run costs on devices that are not here: operations, bytes read and bytes between ranks,
stage by stage, and the hours that they take at given rates.

    seconds of a stage = operations of the slowest rank / rate + its calls * seconds of a call
                         + bytes that a rank reads or writes / rate + bytes it receives / rate

Hours are the sum over all stages: nothing overlaps. A forward pass takes 2 operations for each
weight that a token meets, and 2 l (d_q + d_v) for the scores and values of an attention over
windows of l tokens; a second moment takes 2 k^2 for each row; what a step takes it declares
(`Operations`), and the calls of its loop over columns are those of `duration.WORK`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from qlab.algebra.graph import Code, ModuleGraph, Site, aten, by_source
from qlab.algebra.transform import Stage
from qlab.algebra.views import EachWeight
from qlab.data.calibration import Data
from qlab.driver.batches import batch_tokens
from qlab.driver.duration import PASSES_OVER_FILES, SQUARED, effort_of
from qlab.driver.job import Job
from qlab.driver.owners import Owners, experts_of, is_divided, owners_of
from qlab.driver.parts import Parts, most_of
from qlab.driver.sites import Sites
from qlab.driver.traffic import Traffic
from qlab.errors import QlabError

SHARE_OF_FLOAT32 = 1 / 8  # of a device's rate of products, where none is given for float32
CALL = 5e-6  # seconds that a small operation takes on a device, where none is given


@dataclass(frozen=True, kw_only=True)
class Devices:
    """The figures of one device of each rank.

    Args:
        flops: Operations a second of products in the model's dtype, as they are reached.
        float32: The same of products in float32, of which statistics and solvers are.
        read: Bytes a second from the files, and into them.
        link: Bytes a second that reach a rank from the others.
        call: Seconds of one small operation.
    """

    flops: float
    float32: float
    read: float
    link: float
    call: float = CALL

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not 0 < value < math.inf:
                raise QlabError(
                    f"the device's {each.name} is {value}; give a number above 0, such as 4e14 "
                    "operations a second or 5e9 bytes a second"
                )


@dataclass(frozen=True, kw_only=True)
class Expense:
    """What one stage of a run costs.

    Args:
        stage: Its name.
        operations: Those of all ranks.
        slowest: Those of the rank that has most of them.
        wide: Whether they are in float32.
        calls: Small operations of the slowest rank.
        read: Bytes that a rank reads or writes.
        sent: Bytes that all ranks send.
        received: Bytes that reach the rank that waits for most of them.
    """

    stage: str
    operations: float = 0.0
    slowest: float = 0.0
    wide: bool = False
    calls: float = 0.0
    read: float = 0.0
    sent: float = 0.0
    received: float = 0.0

    def seconds(self, devices: Devices) -> float:
        """On devices of these figures."""
        rate = devices.float32 if self.wide else devices.flops
        return (
            self.slowest / rate
            + self.calls * devices.call
            + self.read / devices.read
            + self.received / devices.link
        )

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def expenses(
    job: Job, sites: Sites, passes: int, learning: int, ranks: int, hidden_bytes: int
) -> tuple[Expense, ...]:
    """The stages of a run on so many ranks.

    passes: forward, over all windows, for statistics and solving. learning: those that steps which
    learn in a block take as much time as. hidden_bytes: of one number between blocks.
    """
    run = _Run(job=job, sites=sites, ranks=ranks)
    made = [_reading(job), *run.forward(passes, learning, hidden_bytes), *run.statistics()]
    made += [run.solving(stage) for stage in job.recipe if _computes(stage)]
    made.append(run.codes())
    return tuple(each for each in made if any((each.operations, each.read, each.sent, each.calls)))


def undeclared(job: Job) -> list[str]:
    """The steps that make weights and declare no operations."""
    return sorted({s.name for s in job.recipe if s.spec is not None and s.operations is None})


def _computes(stage: Stage) -> bool:
    return stage.operations is not None or stage.spec is not None


def _reading(job: Job) -> Expense:
    """The files, of which every rank reads all."""
    stored = sum(tensor.nbytes for tensor in job.model.stored.values())
    return Expense(stage="read", read=float(PASSES_OVER_FILES * stored))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A job among ranks."""

    job: Job
    sites: Sites
    ranks: int

    @property
    def share(self) -> float:
        """The share of the windows that the rank with most of them has."""
        return share_of(batches_of(self.job), self.ranks)

    def forward(self, passes: int, learning: int, hidden_bytes: int) -> Iterator[Expense]:
        """Passes through the blocks, and what leaves them on its way to rank 0, which writes it."""
        data = self.job.observed
        if data is None:
            return
        per_pass, states, last = 0.0, 0.0, list(self.sites.codes)[-1]
        for path, code in self.sites.codes.items():
            if not code.sites:
                continue
            met = sum(self._met(path, site) for site in code.sites)
            per_pass += data.count * (2 * met + _attention(code) * data.longest)
            if path != last:  # nobody needs what leaves that one
                states += data.count * self._shape(path, code.sites[0])[-1] * hidden_bytes
        streams = 1 + self.job.runs_reference
        moved = states * streams * (1 - self.share if self.ranks > 1 else 0)
        yield Expense(
            stage="forward",
            operations=passes * per_pass,
            slowest=passes * per_pass * self.share,
            sent=moved,
            received=moved,
        )
        if learning:
            yield Expense(
                stage="learning",
                operations=learning * per_pass,
                slowest=learning * per_pass * self.share,
            )

    def statistics(self) -> Iterator[Expense]:
        """Second moments of every input, and their sums on the way to their owners."""
        data = self.job.observed
        squared = sum(name in SQUARED for name in self.job.statistics)
        if data is None or not squared:
            return
        operations = 0.0
        for path, code in self.sites.codes.items():
            for first, *_ in by_source(code.sites).values():
                k = self._shape(path, first)[-1]
                rows = data.count * self._visits(path, first)
                operations += squared * 2.0 * rows * k**2
        moved = [traffic.statistics() for traffic in self.traffic]
        yield Expense(
            stage="statistics",
            operations=operations,
            slowest=operations * self.share,
            wide=True,
            sent=sum(one.sent for one in moved),
            received=sum(one.received for one in moved),
        )

    def solving(self, stage: Stage) -> Expense:
        """A step on all weights that it touches, each on the rank that owns it."""
        total = slowest = calls = 0.0
        columns = effort_of(stage).columns
        for path, code in self.sites.codes.items():
            for group in self._at_once(path, code):
                loads, called = [0.0] * self.ranks, [0.0] * self.ranks
                owner = self._at_owners(path, code, stage)
                for site in group:
                    if not stage.touches(f"{path}.{site.path}", site):
                        continue
                    *_, o, k = self._shape(path, site)
                    one = stage.operations.of(o, k) if stage.operations else 0.0
                    for rank, count in self._divided(path, site, owner[site.path], stage):
                        loads[rank] += count * one
                        called[rank] += count * k * columns
                total, slowest = total + sum(loads), slowest + max(loads)
                calls += max(called)
        return Expense(stage=stage.name, operations=total, slowest=slowest, wide=True, calls=calls)

    def codes(self) -> Expense:
        """Codes, told to all ranks, and written by rank 0."""
        numbers = sum(
            float(self.sites.shapes[f"{path}.{site.path}"].numel())
            for path, code in self.sites.codes.items()
            for site in code.sites
            if not site.router
        )
        if not any(stage.spec is not None for stage in self.job.recipe):
            numbers = 0.0
        bits = {s.spec.bits for s in self.job.recipe if s.spec is not None}
        moved = [traffic.codes() for traffic in self.traffic]
        return Expense(
            stage="codes",
            read=numbers * max(bits, default=0) / 8,
            sent=sum(one.sent for one in moved),
            received=sum(one.received for one in moved),
        )

    @cached_property
    def traffic(self) -> list[Traffic]:
        """The blocks among ranks; none for one process."""
        if self.ranks == 1:
            return []
        return [
            Traffic(
                graph=ModuleGraph(code, {}, path),
                shapes={site: self._shape(path, site) for site in code.sites},
                owner=self._owners(path, code),
                stages=self.job.recipe,
                parts=Parts(batches_of(self.job)),
                ranks=self.ranks,
                dtype=self.job.model.dtype,
            )
            for path, code in self.sites.codes.items()
        ]

    def _at_once(self, path: str, code: Code) -> Sequence[Sequence[Site]]:
        """The sites of a block that are solved at one time: of one input, or all."""
        groups = list(by_source(code.sites).values())
        return groups if self.job.in_order(code) else [code.sites]

    def _at_owners(self, path: str, code: Code, stage: Stage) -> Mapping[str, int]:
        """Site path -> the rank that runs a step there."""
        owner = self._owners(path, code)
        if not is_divided(stage):
            return dict.fromkeys(owner.solves, 0)
        return owner.solves if isinstance(stage.view, EachWeight) else owner.turns

    def _owners(self, path: str, code: Code) -> Owners:
        shapes = {site: self._shape(path, site) for site in code.sites}
        outer = any(s.spec is not None and s.spec.outer for s in self.job.recipe)
        return owners_of(code, shapes, self.ranks, self.job.in_order(code), outer)

    def _divided(
        self, path: str, site: Site, owner: int, stage: Stage
    ) -> Iterator[tuple[int, int]]:
        """Rank -> how many weights of a site it solves: experts go round the ranks."""
        experts = self._experts(path, site)
        if not site.route or not stage.needs or not isinstance(stage.view, EachWeight):
            yield owner, experts
            return
        for rank in range(min(self.ranks, experts)):
            yield rank, experts_of(rank, experts, self.ranks)

    def _shape(self, path: str, site: Site) -> Sequence[int]:
        return self.sites.shapes[f"{path}.{site.path}"]

    def _experts(self, path: str, site: Site) -> int:
        return math.prod(self._shape(path, site)[:-2])

    def _visits(self, path: str, site: Site) -> int:
        """How many rows of a site's input one token is."""
        if not site.route:
            return 1
        return self._experts(path, site) if self.job.calibrate_all_experts else site.choices

    def _met(self, path: str, site: Site) -> float:
        """The weights of a site that one token meets."""
        *_, o, k = self._shape(path, site)
        return float(o) * k * self._visits(path, site)


def windows_of(data: Data) -> int:
    """The number of samples."""
    return max(1, data.count // data.longest)


def batches_of(job: Job) -> int:
    """The number of batches of a pass."""
    data = job.observed
    return 1 if data is None else len(data.batches(batch_tokens([job.recipe])))


def share_of(batches: int, ranks: int) -> float:
    """The share of the batches that the rank with most of them has."""
    return most_of(batches, ranks) / batches


def _attention(code: Code) -> float:
    """Operations of the attentions in a block, for each token and each token of its window."""
    operations = 0.0
    for node in code.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            query, _, value = (argument.meta["val"].shape for argument in node.args[:3])
            operations += 2.0 * int(query[1]) * (int(query[-1]) + int(value[-1]))
    return operations


def at_rates(expenses: Sequence[Expense], devices: Devices) -> dict[str, float]:
    """Stage -> its seconds."""
    seconds: dict[str, float] = {}
    for each in expenses:
        seconds[each.stage] = seconds.get(each.stage, 0.0) + each.seconds(devices)
    return seconds
