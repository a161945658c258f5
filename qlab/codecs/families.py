"""Families of modules: paths that differ in numbers only, such as one linear of every layer."""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar("Value")


def pattern(path: str) -> str:
    """A regular expression for the family of a path, without anchors."""
    parts = path.split(".")
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts)


def by_family(values: Mapping[str, Value]) -> dict[str, list[Value]]:
    """Pattern of a family -> the values of its members among `values` (path -> value)."""
    families: dict[str, list[Value]] = defaultdict(list)
    for path, value in values.items():
        families[pattern(path)].append(value)
    return families
