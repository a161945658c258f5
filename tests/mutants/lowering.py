"""Lowering."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "high planes at the low ones' scale",
        "lowering/weights/nibbles.py",
        "planes_of",
        "torch.cat([16 * scales, scales], 1)",
        "torch.cat([scales, scales], 1)",
        "lowering/operators",
    ),
    Mutant(
        "low planes keep their offset",
        "lowering/weights/nibbles.py",
        "planes_of",
        "(torch.zeros_like(scales) if zeros is None else zeros) - 8",
        "torch.zeros_like(scales) if zeros is None else zeros",
        "lowering/operators",
    ),
    Mutant(
        "wide groups in turns",
        "lowering/weights/nibbles.py",
        "planes_of",
        "leaf.scales.float().repeat_interleave(rows, 0).repeat_interleave(repeat, 1)",
        "leaf.scales.float().repeat_interleave(rows, 0).repeat(1, repeat)",
        "lowering/operators",
    ),
    Mutant(
        "aten's zero point has the other sign",
        "lowering/weights/cpu.py",
        "pack",
        "-(planes.zeros * planes.scales).mT",
        "(planes.zeros * planes.scales).mT",
        "lowering/operators",
    ),
    Mutant(
        "words of another machine are read",
        "lowering/weights/cpu.py",
        "check",
        "if name != layout(): ...",
        "if False: ...",
        "lowering/operators lowering/model",
    ),
    Mutant(
        "a bias is lost",
        "lowering/weights/int4.py",
        "mm",
        "return y if bias is None else y + bias",
        "return y",
        "lowering/model lowering/operators",
    ),
    Mutant(
        "the pass loses addmm's bias",
        "lowering/compiler/rewrite.py",
        "_fused",
        "if bias is not None: ...",
        "if False: ...",
        "lowering/rewrite",
    ),
    Mutant(
        "the pass takes weights that are not transposed",
        "lowering/compiler/rewrite.py",
        "_dequantized",
        "[(k, 1), (n, k)] if transposed else [(n, k), (k, 1)]",
        "[(n, k), (k, 1)] if transposed else [(n, k), (k, 1)]",
        "lowering/rewrite",
    ),
]
