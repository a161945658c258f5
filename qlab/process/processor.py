"""What products of matrices on a CPU depend on: one value, detected once, which tests replace."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

BF16_BOUNDS = ("AVX512_CORE_BF16", "AVX512_CORE_FP16")  # of oneDNN: AVX512_BF16 and no AMX


@dataclass(frozen=True)
class Processor:
    """A processor as kernels use it.

    isa: the widest instruction set of products: "amx", "avx512_bf16", or the one that torch names,
    in lower case ("avx512", "avx2", "default", and those of other architectures).
    """

    isa: str

    @property
    def bf16_units(self) -> bool:
        """Whether it multiplies bf16 faster than fp32: in tiles of matrices, or in pairs."""
        return self.isa in ("amx", "avx512_bf16")

    @property
    def rows_worth_copies(self) -> int:
        """Rows from which 16-bit matrices without such units are faster as fp32 copies."""
        return 256 if self.isa.startswith(("avx512", "amx")) else 8


def detect(environment: Mapping[str, str], capability: str, amx: bool, bf16: bool) -> Processor:
    """The processor that kernels see, which is less than there is where the environment says so.

    capability: what torch's own kernels use, bounded by ATEN_CPU_CAPABILITY already; products of
    oneDNN are bounded by ONEDNN_MAX_CPU_ISA. amx, bf16: whether the processor has AMX and
    AVX512_BF16.
    """
    isa = capability.lower()
    if not isa.startswith("avx512"):
        return Processor(isa)
    bound = (environment.get("ONEDNN_MAX_CPU_ISA") or "ALL").upper()
    everything = bound in ("ALL", "DEFAULT")
    if amx and (everything or "AMX" in bound):
        return Processor("amx")
    if bf16 and (everything or bound.startswith("AVX10") or bound in BF16_BOUNDS or "AMX" in bound):
        return Processor("avx512_bf16")
    wide = everything or bound.startswith(("AVX512", "AVX10"))
    return Processor(isa if wide else "avx2")


@cache
def here() -> Processor:
    """This machine's processor, in this environment."""
    amx, bf16 = (_has(name) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return detect(os.environ, torch.backends.cpu.get_cpu_capability(), amx, bf16)


def _has(feature: str) -> bool:
    return bool(getattr(torch.cpu, feature, lambda: False)())
