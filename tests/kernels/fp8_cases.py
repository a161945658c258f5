"""Products of 8-bit floats in Triton's interpreter, by kernels in which a test may have planted a
fault."""

import cases
import torch


def off(arguments, planted=None):
    """The excess of a product. arguments: of Fp8Product. planted: a file of kernels that takes the
    place of the package's."""
    from qlab_kernels import fp8_fp8 as launches
    from qlab_kernels.acceptance.fp8_fp8 import Fp8Product, excess

    if planted:
        with cases.planted(launches, planted, "fp8_fp8_kernel", "fp8_parts_kernel"):
            return off(arguments)
    return excess(Fp8Product(**arguments), torch.device("cpu"))
