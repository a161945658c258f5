"""One compilation of a kernel (`Compilation`), what its machine code holds (`Facts`), and gates:
what such code may not hold.

The gates stand for speed where no device is at hand: a kernel that spills, converts integers in its
inner loop, feeds wgmma from shared memory or issues too many instructions per weight cannot reach
the memory's rate. A gate is a function of a compilation and its facts: None where they pass, else
one sentence.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlab_kernels.capability import Capability, target

REGISTER_FILE = 65536


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """A Triton kernel with all that its machine code depends on.

    kernel: a function under triton.jit. types: Triton's names of the types of its arguments
    ("*bf16"); "i32" where there is none. constants: of its constexpr arguments. aligned: the
    arguments that are multiples of 16, sizes and addresses. options: num_warps and others of the
    compiler's. weights: how many a step of its loop multiplies; 0 where nothing is asked of a loop,
    which then is not read. straight: the kernel has no loop, and all of it is read.
    """

    kernel: Any
    cc: Capability
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: tuple[str, ...]
    options: Mapping[str, Any]
    weights: int
    straight: bool = False

    @property
    def threads(self) -> int:
        """Of a program."""
        return 32 * self.options["num_warps"]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The figures of one compilation.

    loop: the longest loop's instructions by opcode, none where the loop is not read. ipw: its
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


Gate = Callable[[Compilation, Facts], str | None]


def sentences(gates: Iterable[Gate], c: Compilation, f: Facts) -> list[str]:
    """What the gates say of a compilation; empty when it passes."""
    said = [gate(c, f) for gate in gates]
    return [sentence for sentence in said if sentence is not None]


def spills(c: Compilation, f: Facts) -> str | None:
    """No register lives in memory."""
    return f"spills {f.stack} bytes" if f.stack else None


def registers(c: Compilation, f: Facts) -> str | None:
    """A program's registers fit the register file of a multiprocessor."""
    if f.registers * c.threads <= REGISTER_FILE:
        return None
    return f"{f.registers} registers x {c.threads} threads exceed the register file"


def shared_memory(c: Compilation, f: Facts) -> str | None:
    """A program's shared memory fits a multiprocessor."""
    smem = target(c.cc).smem
    return f"{f.shared} bytes of shared memory exceed {smem}" if f.shared > smem else None


FITS: tuple[Gate, ...] = (spills, registers, shared_memory)


def loop(c: Compilation, f: Facts) -> str | None:
    """There is a loop to look at."""
    return None if f.loop else "no loop found"


def without(opcode: str) -> Gate:
    """The loop has no such instruction: "I2F" and "F2F" run at a quarter of the rate or less."""

    def gate(c: Compilation, f: Facts) -> str | None:
        return f"{f.loop[opcode]} {opcode} in the loop" if f.loop[opcode] else None

    return gate


def tensor_cores(c: Compilation, f: Facts) -> str | None:
    """Products run on tensor cores, in whatever precision."""
    return None if f.tensor else "no tensor-core instruction"


def weights_from_registers(c: Compilation, f: Facts) -> str | None:
    """On 9.0 every wgmma takes its left operand from registers."""
    if c.cc != (9, 0) or f.wgmma == f.wgmma_from_registers > 0:
        return None
    return f"{f.wgmma} wgmma, {f.wgmma_from_registers} with the weights in registers"


def asynchronous(c: Compilation, f: Facts) -> str | None:
    """The loop copies to shared memory in the background, 16 bytes at a time."""
    return None if f.async_copies else "weights are not copied asynchronously, 16 bytes at a time"


def no_exchange(c: Compilation, f: Facts) -> str | None:
    """Weights stay in the thread that loads them."""
    if f.loop["STS"] <= 2:
        return None
    return f"{f.loop['STS']} shared stores in the loop: weights are exchanged between threads"


def at_most(instructions: float) -> Gate:
    """Thread-instructions per weight."""

    def gate(c: Compilation, f: Facts) -> str | None:
        if f.ipw <= instructions:
            return None
        return f"{f.ipw:.2f} instructions per weight exceed {instructions}"

    return gate
