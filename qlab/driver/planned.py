"""A plan as a value: what a job will do and cost, in words, as a table and as plain data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from qlab.driver.duration import SPREAD, Work, said
from qlab.driver.expense import Devices, Expense, at_rates
from qlab.driver.schedule import Row
from qlab.errors import QlabError
from qlab.files.record import bits_per_weight
from qlab.process.shown import Shown, by_family, size, some

MiB = 1 << 20


@dataclass(frozen=True, repr=False, kw_only=True)
class Plan(Shown):
    """What a job would do, and what it would cost.

    Args:
        stages: The recipe in words.
        schedule: Its steps in the order in which they run, with what each sees and asks for.
        sites: Site -> its spec, shape, bits per weight and number of experts.
        unquantized: The weights that stay.
        passes: Forward passes over the calibration data, those of the unquantized model included.
        tokens: The number of calibration tokens.
        statistics: The names of the statistics that are observed.
        memory: What takes memory -> the predicted bytes; of several ranks those of the one that
            needs most.
        experts_at_once: The number of experts whose statistics are held at a time; None for all.
        is_sharded: Whether each of several ranks has some rows of a block's weights alone, since it
            has no room for the whole block.
        work: The operations of the run, from which `seconds` estimates a time; None on a GPU.
        ranks: The processes that share the run.
        expenses: What each stage of the run costs on any device, in the order of a block.
        blocks: Their number.
        undeclared: The steps whose operations nobody has said; they count as none.
    """

    stages: Sequence[Mapping[str, str]]
    schedule: Sequence[Row]
    sites: Mapping[str, Mapping[str, Any]]
    unquantized: Sequence[str]
    passes: int
    tokens: int
    statistics: Sequence[str]
    memory: Mapping[str, int]
    experts_at_once: int | None = None
    is_sharded: bool = False
    work: Work | None = None
    ranks: int = 1
    expenses: Sequence[Expense] = ()
    blocks: int = 1
    undeclared: Sequence[str] = ()

    @property
    def traffic(self) -> dict[str, float]:
        """Stage -> the bytes that all ranks send each other in a block, on average."""
        return {e.stage: e.sent / self.blocks for e in self.expenses if e.sent}

    @property
    def seconds(self) -> tuple[float, float] | None:
        """Between which times the run is expected to end, on this machine when nothing else runs on
        it, without the start of the process and the reading of texts. Probes of some milliseconds
        measure its rates when this is first asked for: qlab.driver.duration."""
        if self.work is None:
            return None
        estimate = self.work.seconds()
        return estimate * SPREAD[0], estimate * SPREAD[1]

    @property
    def _time(self) -> str:
        if self.seconds is None:
            return "none is estimated for a GPU"
        threads = torch.get_num_threads()
        with_them = (
            f"{threads} threads of this processor"
            if threads > 1
            else "one thread of this processor"
        )
        return (
            f"{said(self.seconds[0])} to {said(self.seconds[1])} with {with_them}, if nothing "
            "else runs on it"
        )

    @property
    def bits_per_weight(self) -> float:
        """Over all sites; those that stay unquantized count in full."""
        return bits_per_weight(self.sites)

    @property
    def peak_bytes(self) -> int:
        """The predicted peak of the process."""
        return sum(self.memory.values())

    def check(self, memory: int | None) -> None:
        """Refuse a plan that needs more than `memory` bytes."""
        if memory is not None and self.peak_bytes > memory:
            largest = max(self.memory, key=lambda k: self.memory[k])
            raise QlabError(
                f"the plan needs {self.peak_bytes / MiB:.0f} MiB{self._each} and the budget is "
                f"{memory / MiB:.0f} MiB (most of it: {largest}); give more memory, or fewer or "
                "shorter samples"
            )

    @property
    def _each(self) -> str:
        return f" on each of {self.ranks} ranks" if self.ranks > 1 else ""

    def summary(self) -> dict[str, str]:
        """Without the sites."""
        stages = [
            " ".join(filter(None, (s["stage"], s["spec"], f"({s['scope']})"))) for s in self.stages
        ]
        quantized = sum(row["spec"] is not None for row in self.sites.values())
        return {
            "stages": "; ".join(stages),
            "weights": f"{quantized} quantized, {self.bits_per_weight:.3f} bits per weight",
            "stays unquantized": some(by_family(self.unquantized)) or "nothing",
            "passes": (
                f"{self.passes} over {self.tokens:,} tokens; statistics: "
                f"{', '.join(self.statistics) or 'none'}"
            ),
            "predicted peak memory": size(self.peak_bytes),
            "estimated time": self._time,
        }

    def json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {
            "stages": list(self.stages),
            "schedule": [row.json() for row in self.schedule],
            "sites": dict(self.sites),
            "unquantized": list(self.unquantized),
            "passes": self.passes,
            "tokens": self.tokens,
            "statistics": list(self.statistics),
            "memory": dict(self.memory),
            "experts_at_once": self.experts_at_once,
            "is_sharded": self.is_sharded,
            "ranks": self.ranks,
            "expenses": [expense.json() for expense in self.expenses],
            "traffic_per_block": self.traffic,
            "undeclared": list(self.undeclared),
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds and list(self.seconds),
            "bits_per_weight": self.bits_per_weight,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        heads = ("step", "spec", "settings", "sees", "where", "sites", "observes", "runs")
        table = Table(*heads, title="plan", title_justify="left")
        table.columns[0].no_wrap = True
        for row in self.schedule:
            observes = ", ".join(row.observes)
            table.add_row(
                row.step, row.spec, row.detail, row.sees, row.place, row.reached, observes, row.asks
            )
        yield table
        yield (
            f"{len(self.sites) - sum(r['spec'] is None for r in self.sites.values())} weights "
            f"quantized, {self.bits_per_weight:.3f} bits per weight"
        )
        for row in self.schedule:
            if row.unseen:
                yield f"{row.step} sees no attention in: {', '.join(by_family(row.unseen))}"
        yield f"stays unquantized: {', '.join(by_family(self.unquantized)) or 'nothing'}"
        yield (
            f"{self.passes} passes over {self.tokens:,} tokens; statistics: "
            f"{', '.join(self.statistics) or 'none'}"
        )
        if self.experts_at_once:
            yield f"statistics of {self.experts_at_once} experts at a time"
        if self.is_sharded:
            yield f"the weights of each block are sharded over {self.ranks} ranks"
        parts = ", ".join(f"{name} {size / MiB:.0f}" for name, size in self.memory.items())
        yield f"predicted peak memory: {self.peak_bytes / MiB:.0f} MiB{self._each} ({parts})"
        yield f"estimated time: {self._time}"
        if self.ranks > 1:
            sent = ", ".join(f"{stage} {size(int(n))}" for stage, n in self.traffic.items())
            yield f"traffic per block, of all ranks: {sent or 'none'}"

    def at(self, devices: Devices) -> dict[str, Any]:
        """The times on devices of these figures as plain data."""
        seconds = at_rates(self.expenses, devices)
        return {
            "devices": asdict(devices),
            "seconds_of_stages": seconds,
            "hours": sum(seconds.values()) / 3600,
        }

    def costs(self, devices: Devices | None = None) -> Iterator[Table | str]:
        """What each stage costs, and how long it takes on devices of these figures."""
        heads = ["stage", "operations", "of one rank", "in", "read or written", "sent"]
        table = Table(*heads, title="cost", title_justify="left")
        if devices is not None:
            table.add_column("time")
        for each in self.expenses:
            cells = [
                each.stage,
                f"{each.operations:.2e}",
                f"{each.slowest:.2e}",
                "float32" if each.wide else "model's dtype",
                size(int(each.read)),
                size(int(each.sent)),
            ]
            table.add_row(*cells, *([] if devices is None else [said(each.seconds(devices))]))
        yield table
        if self.undeclared:
            yield f"counted as no operations, since nobody has said: {', '.join(self.undeclared)}"
        if devices is not None:
            number = "one such device" if self.ranks == 1 else f"{self.ranks} such devices"
            yield f"{self.at(devices)['hours']:.2f} hours on {number}, if nothing overlaps"
