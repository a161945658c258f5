"""Faults that the laws must notice, by the part of qlab that they are planted in."""

from mutants import (
    gptq,
    kernels,
    lowering,
    mixtures,
    observing,
    rounding,
    scaling,
    solving,
    transforms,
    whole,
    written,
)

PARTS = (
    rounding,
    gptq,
    scaling,
    observing,
    transforms,
    mixtures,
    solving,
    whole,
    written,
    kernels,
    lowering,
)
MUTANTS = tuple(mutant for part in PARTS for mutant in part.MUTANTS)
