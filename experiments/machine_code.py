"""Registers, shared memory and instructions per weight of the kernels as one version of Triton
compiles them, beside other versions.

Usage: python experiments/machine_code.py [MINUTES [FAMILY ...]]

No GPU is needed. Run it in an environment of each version: rows that another version left in
results/machine-code.json stay, and what this one has compiled is not compiled again. Of the
variants of one configuration, which differ in the kind of weights alone, one is compiled, as in
tests/kernels/test_static.py. Without MINUTES it prints what is stored.
"""

import json
import sys
import time
from pathlib import Path
from statistics import mean

import triton
from rich import print
from rich.table import Table

from qlab_kernels import TARGETS, heuristic
from qlab_kernels.compilations import COMPILED
from qlab_kernels.modelled import shipped_variants
from qlab_kernels.static import compile_variant, faults

RESULT = Path(__file__).parent / "results" / "machine-code.json"
FIGURES = ("registers", "shared", "ipw")


def variants_of(family):
    """One variant of each configuration that is shipped or that the heuristic takes."""
    shipped = sorted((v for v in shipped_variants() if isinstance(v, family.variant)), key=repr)
    problems = [p for cc in TARGETS for p in family.chosen(cc)]
    chosen = [v for p in problems for v in family.variants(p, heuristic(p))]
    alike = {}
    for v in dict.fromkeys(shipped + chosen):
        alike.setdefault((v.cc, v.op, v.config), []).append(v)
    return [alternatives[i % len(alternatives)] for i, alternatives in enumerate(alike.values())]


def row_of(v):
    """The figures of a compilation and the gates that it fails."""
    facts = compile_variant(v)
    figures = {name: round(getattr(facts, name), 2) for name in FIGURES}
    return figures | {"faults": faults(v, facts)}


def stored():
    """Variant -> version of Triton -> its figures."""
    return json.loads(RESULT.read_text()) if RESULT.exists() else {}


def compile_all(families, deadline):
    """Adds the rows of this Triton to the stored ones, until the deadline."""
    rows = stored()
    for v in [v for family in families for v in variants_of(family)]:
        by_version = rows.setdefault(repr(v), {})
        if triton.__version__ not in by_version and time.monotonic() < deadline:
            by_version[triton.__version__] = row_of(v)
    lines = [f"{json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)]
    RESULT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def summary(rows):
    """Capability and version -> what the version changes against the oldest one stored."""
    capabilities = sorted({name.split("cc=")[1].split("), ")[0] + ")" for name in rows})
    table = Table("capability", "Triton", "variants", "instructions per weight", "most", "faults")
    for capability in capabilities:
        here = [versions for name, versions in rows.items() if f"cc={capability}" in name]
        oldest = min(version for versions in here for version in versions)
        for version in sorted({version for versions in here for version in versions}):
            pairs = [(row[oldest], row[version]) for row in here if {oldest, version} <= set(row)]
            ratios = [new["ipw"] / old["ipw"] for old, new in pairs if old["ipw"]]
            failing = sum(bool(row[version]["faults"]) for row in here if version in row)
            figures = (f"x {mean(ratios):.3f}", f"x {max(ratios):.3f}") if ratios else ("", "")
            table.add_row(capability, version, str(len(pairs)), *figures, str(failing))
    return table


def main(minutes=None, *names):
    if minutes is not None:
        families = [family for family in COMPILED if not names or family.name in names]
        compile_all(families, time.monotonic() + 60 * float(minutes))
    print(summary(stored()))


if __name__ == "__main__":
    main(*sys.argv[1:])
