"""All cases, by name."""

from collections.abc import Mapping

from faults import Case, killed

CASES: Mapping[str, Case] = {case.name: case for case in (*killed.CASES,)}
