"""All cases, by name."""

from collections.abc import Mapping

from faults import Case, dropped, killed, planted, served, surroundings, worked
from faults.fuzz import CASES as FUZZED

OF_SYSTEM = (*killed.CASES, *worked.CASES, *served.CASES, *planted.CASES, *surroundings.CASES)
CASES: Mapping[str, Case] = {case.name: case for case in (*OF_SYSTEM, *FUZZED, *dropped.CASES)}
