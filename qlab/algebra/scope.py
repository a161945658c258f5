"""Which sites a stage may touch, by patterns over their names."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from qlab.errors import QlabError


@dataclass(frozen=True)
class Scope:
    """Which sites a stage may touch: those that match every `include` and no `exclude` (globs over
    full names).

    outside: they are linears around the blocks, else sites of blocks.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    outside: bool = False

    def __contains__(self, name: str) -> bool:
        return all(matches(p, name) for p in self.include) and not any(
            matches(p, name) for p in self.exclude
        )

    def __str__(self) -> str:
        named = " and ".join([*self.include, *(f"not {p}" for p in self.exclude)]) or "every site"
        return f"{named} around the blocks" if self.outside else named


def scope_named(text: str) -> Scope:
    """The scope that has this name: the inverse of str."""
    named = text.removesuffix(" around the blocks")
    parts = [] if named == "every site" else named.split(" and ")
    include = tuple(part for part in parts if not part.startswith("not "))
    exclude = tuple(part.removeprefix("not ") for part in parts if part.startswith("not "))
    return Scope(include, exclude, outside=named != text)


def matches(pattern: str, name: str) -> bool:
    """A glob over full site names ('*.mlp.*'), or an anchored regular expression after 're:'."""
    if not pattern.startswith("re:"):
        return fnmatchcase(name, pattern)
    try:
        return bool(re.fullmatch(pattern[3:], name))
    except re.error as error:
        raise QlabError(
            f"the pattern {pattern!r} is no regular expression ({error}); mend it, or write a glob"
        ) from error
