"""Products with Hadamard matrices: the configurations worth timing, and the one that runs when
nothing was timed.

A problem's n and k are the order of the matrix, its group the order of the core, its m the rows. A
program holds bm rows of bn numbers in its registers: of every row the channels, with the core
filled up to what tensor cores multiply.
"""

from qlab_kernels.capability import Capability, KernelError, target
from qlab_kernels.problem import Config, Family, Problem

OPERATOR = "hadamard"
LARGEST_CORE = 128
LARGEST_ROW = 32768  # 64 fp32 numbers for each of 512 threads
LARGEST_WIDE_ROW = 8192  # in float32 with a core, whose product takes three times the operands
FEWEST_PRODUCTS = 16  # rows that tensor cores multiply at least
# numbers of a thread, the best expected first
PER_THREAD = (32, 64, 16)
WARPS = (1, 2, 4, 8, 16)
FEW_NUMBERS = 2048  # of a program that takes more than one row


def padded_core(core: int) -> int:
    """The columns that a core takes in a program."""
    return 1 if core == 1 else max(16, 1 << (core - 1).bit_length())


def padded_row(n: int, core: int) -> int:
    """The numbers that a row takes in a program."""
    return n // core * padded_core(core)


def refusal(cc: Capability, dtype: str, n: int, core: int) -> str | None:
    """Why no kernel multiplies rows of a dtype with a matrix of order n, or None."""
    name = f"compute capability {cc[0]}.{cc[1]}"
    try:
        row = target(cc)
    except KernelError as error:
        return str(error)
    able = [*(str(kind).removeprefix("torch.") for kind in row.dtypes), "float32"]
    if row.path == "dequantize":
        return f"Triton does not compile for {name}"
    if dtype not in able:
        return f"{name} has kernels for {' and '.join(able)} activations, not {dtype}"
    if core > 1 and row.path != "fused":
        return f"{name} has no tensor cores in Triton, which a core of {core} channels needs"
    if dtype == "float32" and core > 1 and padded_row(n, core) > LARGEST_WIDE_ROW:
        return f"a row of {n} channels in float32 and its core have more than the registers hold"
    return too_large(n, core)


def too_large(n: int, core: int) -> str | None:
    """Why no program holds a row, or None."""
    if core > LARGEST_CORE:
        return f"the core of {core} channels has more than {LARGEST_CORE}"
    if padded_row(n, core) > LARGEST_ROW:
        return f"a row of {n} channels has more than the registers of a program hold"
    return None


def legal(p: Problem, c: Config) -> str | None:
    """None when a program computes whole rows and fits the device."""
    if isinstance(p.cc, str):
        return "a CPU multiplies by the factors in torch"
    reason = refusal(p.cc, p.dtype, p.n, p.group)
    if reason:
        return reason
    numbers = c.bm * c.bn
    if c.kind != "fma" or c.bn != padded_row(p.n, p.group) or c.bm < 1 or numbers & (numbers - 1):
        return (
            f"a program takes a power of two of rows of {padded_row(p.n, p.group)} numbers by fma, "
            f"not {c.bm} of {c.bn} by {c.kind}"
        )
    if c.warps not in WARPS or not 4 <= numbers // (32 * c.warps) <= max(PER_THREAD):
        return f"{numbers} numbers over {c.warps} warps are not 4 to {max(PER_THREAD)} for a thread"
    if p.group > 1 and numbers // padded_core(p.group) < FEWEST_PRODUCTS:
        return f"tensor cores multiply {FEWEST_PRODUCTS} rows of the core, not fewer"
    return None


def candidates(p: Problem) -> list[Config]:
    """Every configuration worth timing; KernelError saying why there is none."""
    width = padded_row(p.n, p.group)
    least = max(width, FEWEST_PRODUCTS * padded_core(p.group) if p.group > 1 else width)
    sizes = [(each, warps, 32 * each * warps) for each in PER_THREAD for warps in WARPS]
    menu = [
        Config("fma", bm=numbers // width, bn=width, warps=warps)
        for each, warps, numbers in sizes
        if least <= numbers <= max(least, FEW_NUMBERS)
    ]
    # a few rows of a small matrix leave threads with fewer numbers
    menu = menu or [Config("fma", bm=max(least // width, 1), bn=width)]
    allowed = [c for c in menu if legal(p, c) is None]
    if not allowed:
        raise KernelError(legal(p, menu[0]) or f"no configuration computes {p}")
    return allowed


def heuristic(p: Problem) -> Config:
    """The fewest numbers for a program with 32 for each thread, so that many programs run."""
    return candidates(p)[0]


def moved(p: Problem) -> float:
    """Bytes of x and y in 16 bits; matrices are small."""
    return 4.0 * p.m * p.n


FAMILY = Family(
    name="hadamard",
    operators=(OPERATOR,),
    sources=("hadamard",),
    legal=legal,
    candidates=candidates,
    heuristic=heuristic,
    moved=moved,
)
