"""The families of kernels, one file each: their operators and configurations."""

from qlab_kernels.families import floats, int4, int4_a8
from qlab_kernels.problem import Family

FAMILIES: tuple[Family, ...] = (int4.FAMILY, floats.FAMILY, int4_a8.FAMILY)
