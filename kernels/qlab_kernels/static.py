"""Kernels compiled ahead of time for any capability, without a GPU, and what their machine code
holds.

`compiled` takes any kernel (`gates.Compilation`). The kernels of a family are named by variants,
plain values that `compile_variant` and `faults` hand to the family's file in `compilations/`.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qlab_kernels.compilations import COMPILED
from qlab_kernels.compilations.ahead import AheadOfTime
from qlab_kernels.compilations.int4 import Variant, variant
from qlab_kernels.gates import Compilation, Facts, sentences

__all__ = [
    "Compilation",
    "Facts",
    "Variant",
    "ahead",
    "compile_variant",
    "compiled",
    "faults",
    "longest_loop",
    "variant",
]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_BRANCH = re.compile(r"\bBRA\b.*?(\.L_x_\d+)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
_WGMMA_FROM_REGISTERS = re.compile(r"wgmma\.mma_async[^;]*\{[^}]*\},\s*\{")


def ahead(v: Any) -> AheadOfTime:
    """The family's answers for one of its variants."""
    return next(family for family in COMPILED if isinstance(v, family.variant))


def compile_variant(v: Any, **planted: object) -> Facts:
    """Compile for v.cc with the assembler that Triton ships; needs no driver. Raises what Triton
    raises.

    planted: constants that replace the kernel's own, to see that the gates notice.
    """
    return compiled(ahead(v).compilation(v, **planted))


def faults(v: Any, f: Facts) -> list[str]:
    """The gates that a compilation fails, one sentence each; empty when it passes."""
    family = ahead(v)
    return sentences(family.gates(v), family.compilation(v), f)


def compiled(c: Compilation) -> Facts:
    """Compile for c.cc; needs no driver. Raises what Triton raises."""
    built = triton.compile(
        _source(c),
        target=GPUTarget("cuda", c.cc[0] * 10 + c.cc[1], 32),
        # Triton 3.9 warns where nobody says it, and takes what is said here.
        options={"enable_fp_fusion": True, **c.options},
    )
    ptx, cubin = built.asm["ptx"], built.asm["cubin"]
    usage = _printed_of(cubin, "cuobjdump", "-res-usage")
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert resources, usage
    body: list[str] = []
    # The analysis of branch stacks is left out, since these capabilities have none.
    if c.weights:
        sass = _printed_of(cubin, "nvdisasm", "--print-code", "--no-dataflow")
        body = instructions(sass) if c.straight else longest_loop(sass)
    opcodes = Counter(_PREDICATE.sub("", line).split()[0].split(".")[0] for line in body)
    tensor = ptx.count("mma.sync") + ptx.count("tcgen05.mma") + ptx.count("wgmma.mma_async")
    return Facts(
        registers=int(resources[1]),
        stack=int(resources[2]),
        shared=built.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        wgmma_from_registers=len(_WGMMA_FROM_REGISTERS.findall(ptx)),
        tensor=tensor,
        loop=opcodes,
        async_copies=sum("LDGSTS" in line and ".128" in line for line in body),
        ipw=len(body) * c.threads / max(c.weights, 1),
    )


def _source(c: Compilation) -> ASTSource:
    """The kernel with its argument types, constants and alignments; pointers are aligned."""
    names = c.kernel.arg_names
    signature = {n: "constexpr" if n in c.constants else c.types.get(n, "i32") for n in names}
    aligned = [n for n in names if signature[n].startswith("*") or n in c.aligned]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    constexprs = {(names.index(n),): value for n, value in c.constants.items()}
    return ASTSource(fn=c.kernel, signature=signature, constexprs=constexprs, attrs=attrs)


def _printed_of(cubin: bytes, tool: str, *options: str) -> str:
    """The output of one of the CUDA tools for a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [str(TOOLS / tool), *options, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> list[str]:
    """All of a kernel, but what pads it behind its end."""
    code = [match[1] for match in map(_INSTRUCTION.search, sass.splitlines()) if match]
    return [instruction for instruction in code if instruction != "NOP"]


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
