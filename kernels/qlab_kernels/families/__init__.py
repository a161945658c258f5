"""The families of kernels, one file each: their operators and configurations."""

from qlab_kernels.families import (
    cache_attention,
    floats,
    fp8_fp8,
    hadamard,
    int4,
    int4_a8,
    int8_int8,
)
from qlab_kernels.problem import Family

FAMILIES: tuple[Family, ...] = (
    int4.FAMILY,
    floats.FAMILY,
    int4_a8.FAMILY,
    int8_int8.FAMILY,
    fp8_fp8.FAMILY,
    hadamard.FAMILY,
    cache_attention.FAMILY,
)
