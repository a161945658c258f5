"""What a finished job returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlab.driver.observe import Inputs
from qlab.driver.planned import Plan
from qlab.files.record import bits_per_weight
from qlab.process.shown import Shown, size, some


@dataclass(frozen=True, repr=False, kw_only=True)
class Written(Shown):
    """A directory that was written, which stands wherever a path does.

    path: the directory. sites: name of a weight -> its row in the directory's report.
    """

    path: Path
    sites: Mapping[str, Mapping[str, Any]]

    def __fspath__(self) -> str:
        """The directory."""
        return str(self.path)

    @property
    def bits_per_weight(self) -> float:
        """Over all sites."""
        return bits_per_weight(self.sites)


@dataclass(frozen=True, repr=False, kw_only=True)
class Result(Written):
    """A finished job: its directory, the rows of its report, and what the run cost.

    seconds_of_binds: what each step took that measures the whole model (`kl_tune`, `allocate`).
    ranks: how many processes made it together. sent_bytes_per_block: what they sent each other for
    each block, all of them together.
    """

    plan: Plan
    inputs: Inputs
    seconds: float
    peak_rss_bytes: int
    seconds_of_binds: Mapping[str, float] = field(default_factory=dict)
    ranks: int = 1
    sent_bytes_per_block: int = 0

    @property
    def experts_with_few_tokens(self) -> Mapping[str, Sequence[int]]:
        """Site -> its experts that saw fewer tokens than they have input channels, so that their
        second moment is singular; one that saw none is rounded to nearest on the method's grid,
        every direction weighing the same."""
        few = {name: row.get("experts_with_few_tokens") for name, row in self.sites.items()}
        return {name: experts for name, experts in few.items() if experts}

    @property
    def bytes(self) -> int:
        """Of all safetensors files, or of the file that was made of them."""
        files = [self.path] if self.path.is_file() else self.path.glob("*.safetensors")
        return sum(file.stat().st_size for file in files)

    def summary(self) -> dict[str, str]:
        """The facts in words, without the sites and the plan."""
        errors = {
            name: row["weight_error"]
            for name, row in self.sites.items()
            if row.get("weight_error") is not None
        }
        worst = max(errors, key=lambda name: errors[name], default=None)
        quantized = sum(row["spec"] is not None for row in self.sites.values())
        facts = {
            "directory": str(self.path),
            "weights": (
                f"{quantized} of {len(self.sites)} quantized, {self.bits_per_weight:.3f} bits per "
                "weight"
            ),
            "size": size(self.bytes),
            "cost": f"{self.seconds:.1f} s, peak {size(self.peak_rss_bytes)}, {self.inputs} inputs",
        }
        if self.ranks > 1:
            facts["ranks"] = f"{self.ranks}, which sent {size(self.sent_bytes_per_block)} a block"
        if self.seconds_of_binds:
            each = [f"{name} {seconds:.1f} s" for name, seconds in self.seconds_of_binds.items()]
            facts["measured"] = ", ".join(each)
        if worst is not None:
            facts["largest weight error"] = f"{errors[worst]:.3e} of the norm, {worst}"
        few = self.experts_with_few_tokens
        if few:
            facts["experts with few tokens"] = some(list(few))
        return facts

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "path": str(self.path),
            "inputs": self.inputs,
            "seconds": self.seconds,
            "peak_rss_bytes": self.peak_rss_bytes,
            "ranks": self.ranks,
            "sent_bytes_per_block": self.sent_bytes_per_block,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.bytes,
            "sites": dict(self.sites),
        }
