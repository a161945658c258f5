"""The families of kernels, one file each: their operators and configurations."""

from qlab_kernels.families import int4
from qlab_kernels.problem import Family

FAMILIES: tuple[Family, ...] = (int4.FAMILY,)
