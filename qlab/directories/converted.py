"""What a conversion returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qlab.driver.result import Written


@dataclass(frozen=True, repr=False, kw_only=True)
class Converted(Written):
    """A converted directory: per module its spec, and the error of rounding it anew where it was.

    dequantized: tensor of a GGUF file -> the kind of blocks (Q6_K) that it was dequantized from.
    """

    dequantized: Mapping[str, str] = field(default_factory=dict)

    @property
    def requantized(self) -> dict[str, float]:
        """Module -> relative error |W - W'| / |W| against the weights it was rounded anew from."""
        return {
            name: row["requantization_error"]
            for name, row in self.sites.items()
            if "requantization_error" in row
        }

    def summary(self) -> dict[str, str]:
        """The facts that are printed, which leave out the sites."""
        anew, dense = len(self.requantized), len(self.dequantized)
        return {
            "directory": str(self.path),
            "weights": (
                f"{len(self.sites) - anew} with the same codes, {anew} rounded anew, {dense} "
                "dequantized"
            ),
        }

    def json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {
            "path": str(self.path),
            "sites": dict(self.sites),
            "requantized": self.requantized,
            "dequantized": dict(self.dequantized),
        }
