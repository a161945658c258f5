"""Faults that the laws must notice, by the part of qlab that they are planted in."""

from mutants import gptq, kernels, lowering, observing, rounding, scaling, transforms, whole

PARTS = (rounding, gptq, scaling, observing, transforms, whole, kernels, lowering)
MUTANTS = tuple(mutant for part in PARTS for mutant in part.MUTANTS)
