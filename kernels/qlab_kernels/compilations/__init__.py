"""What of each family is compiled ahead of time, one file each; needs Triton."""

from qlab_kernels.compilations import (
    cache_attention,
    floats,
    fp8_fp8,
    hadamard,
    int4,
    int4_a8,
    int8_int8,
)
from qlab_kernels.compilations.ahead import AheadOfTime

COMPILED: tuple[AheadOfTime, ...] = (
    int4.AHEAD,
    floats.AHEAD,
    int4_a8.AHEAD,
    int8_int8.AHEAD,
    fp8_fp8.AHEAD,
    hadamard.AHEAD,
    cache_attention.AHEAD,
)
