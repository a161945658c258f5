"""Products of int8 codes in Triton's interpreter, by kernels in which a test may have planted a
fault."""

import cases
import torch


def right(arguments, planted=None):
    """Whether the kernel gives the reference's bits, rounded once. arguments: of Int8Product.
    planted: a file of kernels that takes the place of the package's."""
    from qlab_kernels import int8_int8 as launches
    from qlab_kernels.acceptance.int8_int8 import Int8Product, excess

    if planted:
        with cases.planted(launches, planted, "int8_int8_kernel", "int8_parts_kernel"):
            return right(arguments)
    return excess(Int8Product(**arguments), torch.device("cpu")) == 0
