"""The properties of a CPU on which matrix products depend: one value, detected once, which tests
replace."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

# Values of ONEDNN_MAX_CPU_ISA that allow AVX512_BF16 and no AMX.
BF16_BOUNDS = ("AVX512_CORE_BF16", "AVX512_CORE_FP16")


@dataclass(frozen=True)
class Processor:
    """A processor as kernels use it.

    isa: the widest instruction set for matrix products: "amx", "avx512_bf16", or what torch reports
    in lower case ("avx512", "avx2", "default", and those of other architectures).
    """

    isa: str

    @property
    def bf16_units(self) -> bool:
        """Whether the processor multiplies bf16 faster than fp32: in tiles (AMX) or in pairs."""
        return self.isa in ("amx", "avx512_bf16")

    @property
    def rows_worth_copies(self) -> int:
        """The number of rows from which a processor without bf16 units multiplies 16-bit matrices
        faster as fp32 copies."""
        return 256 if self.isa.startswith(("avx512", "amx")) else 8


def detect(environment: Mapping[str, str], capability: str, amx: bool, bf16: bool) -> Processor:
    """The processor that kernels may use; variables of the environment can bound it.

    capability: what torch's own kernels use, already bounded by ATEN_CPU_CAPABILITY.
    ONEDNN_MAX_CPU_ISA bounds the products of oneDNN. amx, bf16: whether the processor has AMX and
    AVX512_BF16.
    """
    isa = capability.lower()
    if not isa.startswith("avx512"):
        return Processor(isa)
    bound = (environment.get("ONEDNN_MAX_CPU_ISA") or "ALL").upper()
    everything = bound in ("ALL", "DEFAULT")
    allows_amx = everything or "AMX" in bound
    allows_bf16 = allows_amx or bound.startswith("AVX10") or bound in BF16_BOUNDS
    allows_avx512 = everything or bound.startswith(("AVX512", "AVX10"))
    if amx and allows_amx:
        return Processor("amx")
    if bf16 and allows_bf16:
        return Processor("avx512_bf16")
    return Processor(isa if allows_avx512 else "avx2")


@cache
def here() -> Processor:
    """The processor of this machine, in the environment of this process."""
    amx, bf16 = (_has(name) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return detect(os.environ, torch.backends.cpu.get_cpu_capability(), amx, bf16)


def _has(feature: str) -> bool:
    return bool(getattr(torch.cpu, feature, lambda: False)())
