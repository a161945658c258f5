"""Results for the eye: a few lines of text where they are printed, a table in a notebook; fields
and `json()` hold everything."""

from collections.abc import Mapping, Sequence
from html import escape

from qlab.errors import printable

LONGEST = 300  # characters of a representation: one line in a console


class Shown:
    """What has a `summary()`: names of a few facts -> each of them in words."""

    def summary(self) -> Mapping[str, str]:
        """The facts, the most important first."""
        raise NotImplementedError

    def __str__(self) -> str:
        facts = self.summary()
        width = max(map(len, facts))
        return "\n".join(
            [
                type(self).__name__,
                *(f"  {name:<{width}}  {printable(fact)}" for name, fact in facts.items()),
            ]
        )

    def __repr__(self) -> str:
        facts = (f"{name}: {printable(fact)}" for name, fact in self.summary().items())
        text = f"{type(self).__name__}({'; '.join(facts)})"
        return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}...)"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(printable(fact))}</td></tr>"
            for name, fact in self.summary().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def some(names: Sequence[str], count: int = 4) -> str:
    """The first few of many names."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def size(count: int) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def interval(value: float, bounds: Sequence[float]) -> str:
    """A value with its 95 % interval."""
    return f"{value:.4f} ({bounds[0]:.4f} to {bounds[1]:.4f})"
