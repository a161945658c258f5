"""All cases, by name."""

from collections.abc import Mapping

from faults import Case, dropped, killed
from faults.fuzz import CASES as FUZZED

CASES: Mapping[str, Case] = {case.name: case for case in (*killed.CASES, *FUZZED, *dropped.CASES)}
