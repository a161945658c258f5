"""Results as people see them: a few lines where they are printed, a table in a notebook. Fields and
`json()` of a result hold everything."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from html import escape

from qlab.errors import printable

LONGEST = 300  # characters of a representation: one line in a console


class Shown(ABC):
    """A result that is shown by its `summary()`: names of a few facts -> the facts in words."""

    @abstractmethod
    def summary(self) -> Mapping[str, str]:
        """The facts, the most important first."""

    def __str__(self) -> str:
        facts = self.summary()
        width = max(map(len, facts))
        lines = [f"  {name:<{width}}  {printable(fact)}" for name, fact in facts.items()]
        return "\n".join([type(self).__name__, *lines])

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
    """The first `count` names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def family(name: str) -> str:
    """A name with a star in the place of each number between dots."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def by_family(names: Sequence[str]) -> list[str]:
    """The names in order, those of one family as one entry with their count."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(family(name), []).append(name)
    return [
        members[0] if len(members) == 1 else f"{name} ({len(members)})"
        for name, members in families.items()
    ]


def size(count: int) -> str:
    """A number of bytes in words, in the largest unit of which there is at least one."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def interval(value: float, bounds: Sequence[float]) -> str:
    """A value with its 95 % interval."""
    return f"{value:.4f} ({bounds[0]:.4f} to {bounds[1]:.4f})"
