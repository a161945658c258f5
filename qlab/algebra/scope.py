"""Which sites a stage may touch, by patterns over their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qlab.errors import QlabError


@dataclass(frozen=True)
class Scope:
    """The sites that match every pattern of `include` and none of `exclude` (see `matches`).

    outside: of the linears around the blocks; otherwise of the sites in blocks.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    outside: bool = False

    def __contains__(self, name: str) -> bool:
        excluded = any(matches(pattern, name) for pattern in self.exclude)
        return not excluded and all(matches(pattern, name) for pattern in self.include)

    def __str__(self) -> str:
        conditions = [*self.include, *(f"not {pattern}" for pattern in self.exclude)]
        text = " and ".join(conditions) or "every site"
        return f"{text} around the blocks" if self.outside else text


def scope_named(text: str) -> Scope:
    """The scope of which this is the str."""
    conditions = text.removesuffix(" around the blocks")
    parts = [] if conditions == "every site" else conditions.split(" and ")
    include = tuple(part for part in parts if not part.startswith("not "))
    exclude = tuple(part.removeprefix("not ") for part in parts if part.startswith("not "))
    return Scope(include, exclude, outside=conditions != text)


def matches(pattern: str, name: str) -> bool:
    """Whether a site's full name matches a glob ("*.mlp.*"), or as a whole the regular expression
    behind "re:"."""
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return bool(re.fullmatch(pattern[3:], name))
    except re.error as error:
        raise QlabError(
            f"the pattern {pattern!r} is no regular expression ({error}); mend it, or write a glob"
        ) from error


def pattern_of(names: Sequence[str]) -> str:
    """A pattern that matches these full names and no others: names that differ in their first
    number alone are one part of it."""
    numbers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        head, number, tail = re.split(r"(\d+|$)", name, maxsplit=1)
        numbers.setdefault((head, tail), []).append(number)
    parts = [
        f"{re.escape(head)}({'|'.join(of_name)}){re.escape(tail)}"
        for (head, tail), of_name in numbers.items()
    ]
    return f"re:{'|'.join(parts)}"
