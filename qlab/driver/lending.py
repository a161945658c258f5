"""What ranks send each other of blocks that none has room for, from shapes and the recipe alone:
sharded weights wherever they are gathered, and weights that are learned wherever they are lent
(`qlab.driver.sharded`, `qlab.driver.sharing`).

A round is a window on each rank. In a round of a look a learned weight is lent once, forward; in
one of a step twice, forward and on the way back, and then its owner gets a gradient of each window
that another rank runs. A weight that a later step rounds is gathered there instead.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from qlab.algebra.entering import behind, input_dtypes
from qlab.algebra.graph import Site
from qlab.algebra.transform import unchanged
from qlab.algebra.views import Uncovered, WholeBlock
from qlab.algebra.windows import DRAWING, Schedule
from qlab.driver.batches import batch_tokens, in_batches
from qlab.driver.expense import Expense
from qlab.driver.foreseen import FP32
from qlab.driver.job import Job
from qlab.driver.learning import learns, numbers_for
from qlab.driver.parts import Parts, most_of
from qlab.driver.shares import Shares
from qlab.driver.sites import Sites
from qlab.driver.traffic import Moved
from qlab.model.paper import dtype_in
from qlab.model.skeleton import Skeleton


def sharing_expenses(job: Job, skeleton: Skeleton, sites: Sites, ranks: int) -> tuple[Expense, ...]:
    """What sharded blocks add to the stages of a run on so many ranks."""
    data = job.observed
    batches = [] if data is None else in_batches(data, batch_tokens([job.recipe]))
    tokens = [batch["input_ids"].numel() for batch in batches]
    blocks = [
        Lending(shares=Shares(job, skeleton, path, code, ranks), sites=sites, tokens=tokens)
        for path, code in sites.codes.items()
    ]
    gathered, lent = [b.gathered() for b in blocks], [b.lent() for b in blocks]
    return tuple(
        Expense(
            stage=name, sent=sum(m.sent for m in moved), received=sum(m.received for m in moved)
        )
        for name, moved in (("gathered", gathered), ("lent", lent))
        if any(m.sent for m in moved)
    )


@dataclass(frozen=True)
class _Windows:
    """The windows that a step sees, of `count` on so many ranks."""

    schedule: Schedule
    count: int
    ranks: int

    @property
    def looks(self) -> int:
        """How often all of them are looked at."""
        return 1 + len(self.schedule.looks(self.count))

    @property
    def seen(self) -> int:
        """Those of one step."""
        return min(self.schedule.windows, self.count)

    @property
    def forward(self) -> int:
        """Rounds of looks and of steps."""
        return self.looks * -(-self.count // self.ranks) + self.backward

    @property
    def backward(self) -> int:
        """Rounds of steps."""
        return self.schedule.steps * -(-self.seen // self.ranks)

    def of_others(self, rank: int) -> int:
        """Windows of steps that are not run by a rank."""
        return self.schedule.steps * (self.seen - len(range(rank, self.seen, self.ranks)))

    def moved(self, path: str) -> Iterator[int]:
        """The windows of a block, of all rounds, that are at home on another rank than that which
        runs them. A rank without a window in a round runs the first one of them all."""
        numbers, homes = numbers_for(path, DRAWING), Parts(self.count)
        every = [[*range(self.count)]] * self.looks
        for windows in (*every, *self.schedule.drawn(self.count, numbers)):
            for place, window in enumerate(windows):
                if homes.rank_of(window, self.ranks) != place % self.ranks:
                    yield window
            idle = range((len(windows) - 1) % self.ranks + 1, self.ranks)
            yield from [windows[0]] * (len(idle) - (homes.rank_of(windows[0], self.ranks) in idle))


@dataclass(frozen=True)
class _Step:
    """A step of the recipe in a block.

    sites: those that it sees. gathered: those of them whose weight, or its target behind a step
    that rounded or masked it, is sharded. waiting: those whose turn comes behind it. windows: those
    that it learns of; None where it does not.
    """

    sites: Sequence[Site]
    gathered: Sequence[Site]
    waiting: Sequence[Site]
    windows: _Windows | None


@dataclass(frozen=True, kw_only=True)
class Lending:
    """A block whose weights are sharded.

    Args:
        shares: Its weights among the ranks.
        sites: Those of the model.
        tokens: Of each batch; of each window, where a step learns.
    """

    shares: Shares
    sites: Sites
    tokens: Sequence[int]

    def gathered(self) -> Moved:
        """Sharded weights: gathered to be checked, to be solved, to compute what should leave the
        block, and in rounds in which others are learned."""
        sent = {site: self.shares.sent(site) for site in self.shares.sites}
        total = sum(n for site, n in sent.items() if self._is_cast(site))
        if any(map(learns, self.shares.job.recipe)):
            total += most_of(len(self.tokens), self.shares.ranks) * sum(sent.values())
        for step in self._steps:
            total += sum(sent[site] for site in step.gathered)
            if step.windows is None:
                continue
            reached = behind(self.shares.code, {site.weight or "" for site in step.sites})
            for site in step.waiting:
                again = step.windows.backward if site.weight in reached else 0
                total += sent[site] * (step.windows.forward + again)
        return Moved(total, total / self.shares.ranks)

    def lent(self) -> Moved:
        """Weights that are learned, their gradients, and of each window the loss and what should
        leave the block."""
        sent, received, ranks = 0.0, 0.0, self.shares.ranks
        for step in self._steps:
            windows = step.windows
            if windows is None:
                continue
            learners = self.shares.learners({site: self._shape(site) for site in step.sites})
            owned = {rank: sum(map(self._bytes, own)) for rank, own in learners.items()}
            lent = sum(owned.values()) * (windows.forward + windows.backward)
            gradients = sum(n * windows.of_others(rank) for rank, n in owned.items())
            losses = FP32 * windows.looks * windows.count
            targets = sum(map(self._target, windows.moved(self.shares.path)))
            sent += (lent + losses) * (ranks - 1) + gradients + targets
            received += lent + losses + max(owned.values()) * windows.of_others(0)
            received += targets / ranks
        return Moved(sent, received)

    @cached_property
    def _steps(self) -> list[_Step]:
        """Those of the recipe, in their order."""
        steps, rounded, taken = list[_Step](), set[Site](), set[Site]()
        for stage in self.shares.job.recipe:
            if stage.apply is unchanged or isinstance(stage.view, Uncovered):
                continue
            path, every = self.shares.path, self.shares.code.sites
            seen = [s for s in every if not s.router and stage.touches(f"{path}.{s.path}", s)]
            if isinstance(stage.view, WholeBlock) and stage.spec is None:  # it refines codes
                seen = [site for site in seen if site in rounded]
            schedule = stage.view.by_weight if isinstance(stage.view, WholeBlock) else None
            windows = None
            if schedule is not None and seen:
                windows = _Windows(schedule, len(self.tokens), self.shares.ranks)
            steps.append(
                _Step(
                    sites=seen,
                    gathered=[site for site in self.shares.sites if site in seen],
                    waiting=[site for site in self.shares.sites if site not in taken | {*seen}],
                    windows=windows,
                )
            )
            taken |= {*seen}
            rounded |= {*seen} if stage.spec is not None else set()
        return steps

    def _is_cast(self, site: Site) -> bool:
        """Whether the files hold a weight in another dtype than the model computes with, so that
        its numbers are checked where data is run."""
        shares = self.shares
        own = dtype_in(shares.skeleton.model, f"{shares.path}.{site.weight}")
        return shares.job.observed is not None and own != shares.dtype(site)

    def _bytes(self, site: Site) -> int:
        """Those of a weight that is lent, in the dtype of what it multiplies."""
        dtype = input_dtypes(self.shares.code)[site.weight or ""]
        return prod(self._shape(site)) * dtype.itemsize

    def _target(self, window: int) -> int:
        """The bytes that should leave the block of a window."""
        hidden = self._shape(self.shares.code.sites[0])[-1]
        return self.tokens[window] * hidden * self.shares.skeleton.dtype.itemsize

    def _shape(self, site: Site) -> Sequence[int]:
        return self.sites.shapes[f"{self.shares.path}.{site.path}"]
