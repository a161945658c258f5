"""Kernels compiled ahead of time for any capability, without a GPU, and gates on their machine
code.

The gates stand for speed where no device is at hand: a kernel that spills, converts integers in its
inner loop, feeds wgmma from shared memory or issues too many instructions per weight cannot reach
the memory's rate.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlab_kernels.capability import Capability, target
from qlab_kernels.config import Config, Problem
from qlab_kernels.device import options
from qlab_kernels.layout import padded_group

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
REGISTER_FILE = 65536
# Per weight, of the loop of the kernel for at most 16 tokens, symmetric in groups of 128. Experts'
# pointers cost registers.
MOST_INSTRUCTIONS = {"int4_mm": 3.3, "int4_grouped_mm": 3.4}
_TL = {"float16": tl.float16, "bfloat16": tl.bfloat16}
_PTR = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_WGMMA_FROM_REGISTERS = re.compile(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{")


@dataclass(frozen=True)
class Variant:
    """One compilation. group 0 is whole rows; of the config's split only whether there is one
    matters. op "dequantize", with a config of kind "dequant", is the kernel that makes dense
    weights."""

    op: str
    cc: Capability
    dtype: str
    group: int
    zeros: bool
    config: Config


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The figures of one compilation.

    loop: the longest loop's instructions by opcode, none for a dequantization. ipw: its
    thread-instructions per weight.
    """

    registers: int
    stack: int
    shared: int
    wgmma: int
    wgmma_from_registers: int
    tensor: int
    loop: Counter[str]
    async_copies: int
    ipw: float


def variant(p: Problem, c: Config) -> Variant | None:
    """The compilation that `c` needs for `p`; None for kinds that multiply by the library."""
    if isinstance(p.cc, str) or c.kind in ("dequant", "dense", "int4pack"):
        return None
    k_pad, group = padded_group(p.k, p.group)
    plain = replace(c, split=min(c.split, 2))
    return Variant(p.op, p.cc, p.dtype, 0 if group >= k_pad else group, p.zeros, plain)


def _source(v: Variant, planted: dict) -> tuple[ASTSource, dict[str, int]]:
    """The kernel with its argument types, constants and alignments, and the options it is compiled
    with."""
    c, row = v.config, target(v.cc)
    warps = c.warps
    constants: dict = {"GROUP": v.group, "ZEROS": v.zeros, "BM": c.bm, "BN": c.bn, "BK": c.bk}
    types = {
        "x_ptr": _PTR[v.dtype],
        "y_ptr": _PTR["float32" if c.split > 1 else v.dtype],
        "words_ptr": "*u8",
        "scales_ptr": "*i32",
        "zeros_ptr": "*i32",
        "offsets_ptr": "*i32",
    }
    if v.op == "dequantize":
        from qlab_kernels.dequantize import BK, WARPS
        from qlab_kernels.dequantize import dequantize_kernel as kernel

        half = _TL[v.dtype]
        constants = {"GROUP": v.group, "ZEROS": v.zeros, "BK": BK, "DTYPE": half}
        constants |= {"LAYOUT": row.layout, "SEQUENCE": row.sequence, "COMPUTE": half}
        warps = WARPS
    elif c.kind == "fma":
        from qlab_kernels.fma import int4_mm_fma_kernel as kernel

        types |= {
            "x_ptr": "*fp32",
            "words_ptr": "*i32",
            "scales_ptr": _PTR[v.dtype],
            "zeros_ptr": _PTR[v.dtype],
        }
    else:
        constants |= {"SCALE_ON": c.scale_on, "STAGES": c.stages}
        constants |= {"LAYOUT": row.layout, "SEQUENCE": row.sequence, "COMPUTE": _TL[v.dtype]}
        if v.op == "int4_grouped_mm":
            from qlab_kernels.grouped import int4_grouped_mm_kernel as kernel

            constants["EXPERTS"] = 64
        else:
            from qlab_kernels.int4_mm import int4_mm_kernel as kernel
    constants |= planted
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [n for n in names if n.endswith("_ptr") or n in ("N", "K", "N_PAD", "K_PAD")]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constexprs = {(names.index(n),): value for n, value in constants.items()}
    settings = options(c, row.layout) if c.kind in ("gemm", "split_k") else {"num_warps": warps}
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs), settings


def compile_variant(v: Variant, **planted: object) -> Facts:
    """Compile for v.cc with the assembler that Triton ships; needs no driver. Raises what Triton
    raises.

    planted: constants that replace the kernel's own, to see that the gates notice.
    """
    source, settings = _source(v, planted)
    built = triton.compile(
        source, target=GPUTarget("cuda", v.cc[0] * 10 + v.cc[1], 32), options=settings
    )
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    usage = _printed_of(cubin, "cuobjdump", "-res-usage")
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources, usage
    body: list[str] = []
    # No gate looks at the machine code of a dequantization, and printing it takes long. The
    # analysis of branch stacks is left out, since these capabilities have none.
    if v.op != "dequantize":
        body = longest_loop(_printed_of(cubin, "nvdisasm", "--print-code", "--no-dataflow"))
    opcodes = Counter(_PREDICATE.sub("", line).split()[0].split(".")[0] for line in body)
    tensor = ptx.count("mma.sync") + ptx.count("tcgen05.mma") + ptx.count("wgmma.mma_async")
    weights = max(v.config.bn * v.config.bk, 1)
    return Facts(
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        wgmma_from_registers=len(_WGMMA_FROM_REGISTERS.findall(ptx)),
        tensor=tensor,
        loop=opcodes,
        async_copies=sum("LDGSTS" in line and ".128" in line for line in body),
        ipw=len(body) * 32 * v.config.warps / weights,
    )


def _printed_of(cubin: bytes, tool: str, *options: str) -> str:
    """The output of one of the CUDA tools for a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(TOOLS / tool), *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def longest_loop(sass: str) -> list[str]:
    """The instructions from the target of a backward branch to the branch, for the longest such
    stretch."""
    labels: dict[str, int] = {}
    code: list[str] = []
    longest: list[str] = []
    for line in sass.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(code)
        elif instruction:
            code.append(instruction[1])
            branch = _BRANCH.search(instruction[1])
            start = labels.get(branch[1]) if branch else None
            if start is not None and len(code) - start > len(longest):
                longest = code[start:]
    return longest


def faults(v: Variant, f: Facts) -> list[str]:
    """The gates that a compilation fails, one sentence each; empty when it passes."""
    wrong = _too_large(v, f)
    if v.op == "dequantize":
        return wrong
    if not f.loop:
        wrong.append("no loop found")
    if f.loop["I2F"]:
        wrong.append(f"{f.loop['I2F']} I2F in the loop")
    return wrong if v.config.kind == "fma" else wrong + _slow_on_tensor_cores(v, f)


def _too_large(v: Variant, f: Facts) -> list[str]:
    """The limits of a multiprocessor that a compilation exceeds."""
    threads, smem = 32 * v.config.warps, target(v.cc).smem
    wrong = []
    if f.stack:
        wrong.append(f"spills {f.stack} bytes")
    if f.registers * threads > REGISTER_FILE:
        wrong.append(f"{f.registers} registers x {threads} threads exceed the register file")
    if f.shared > smem:
        wrong.append(f"{f.shared} bytes of shared memory exceed {smem}")
    return wrong


def _slow_on_tensor_cores(v: Variant, f: Facts) -> list[str]:
    """What keeps a kernel for tensor cores from the memory's rate."""
    c = v.config
    wrong = []
    if not f.tensor:
        wrong.append("no tensor-core instruction")
    if v.cc == (9, 0) and not f.wgmma == f.wgmma_from_registers > 0:
        wrong.append(f"{f.wgmma} wgmma, {f.wgmma_from_registers} with the weights in registers")
    if c.stages > 1 and not f.async_copies:
        wrong.append("weights are not copied asynchronously, 16 bytes at a time")
    # tcgen05 takes weights through tensor memory.
    if c.bm <= 32 and v.cc != (10, 0) and f.loop["STS"] > 2:
        wrong.append(
            f"{f.loop['STS']} shared stores in the loop: weights are exchanged between threads"
        )
    if c.bm <= 16 and v.group == 128 and not v.zeros and f.ipw > MOST_INSTRUCTIONS[v.op]:
        wrong.append(f"{f.ipw:.2f} instructions per weight exceed {MOST_INSTRUCTIONS[v.op]}")
    return wrong
