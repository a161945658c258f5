"""Lowering."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "high planes at the low ones' scale",
        "lower/nibbles.py",
        "planes_of",
        "torch.cat([16 * scales, scales], 1)",
        "torch.cat([scales, scales], 1)",
        "lower/operators",
    ),
    Mutant(
        "low planes keep their offset",
        "lower/nibbles.py",
        "planes_of",
        "(torch.zeros_like(scales) if zeros is None else zeros) - 8",
        "torch.zeros_like(scales) if zeros is None else zeros",
        "lower/operators",
    ),
    Mutant(
        "wide groups in turns",
        "lower/nibbles.py",
        "planes_of",
        "leaf.scales.float().repeat_interleave(rows, 0).repeat_interleave(repeat, 1)",
        "leaf.scales.float().repeat_interleave(rows, 0).repeat(1, repeat)",
        "lower/operators",
    ),
    Mutant(
        "aten's zero point has the other sign",
        "lower/cpu.py",
        "pack",
        "-(planes.zeros * planes.scales).mT",
        "(planes.zeros * planes.scales).mT",
        "lower/operators",
    ),
    Mutant(
        "words of another machine are read",
        "lower/cpu.py",
        "check",
        "if name != layout(): ...",
        "if False: ...",
        "lower/operators lower/model",
    ),
    Mutant(
        "a bias is lost",
        "lower/linear.py",
        "QLinear.forward",
        "y = y if self.bias is None else y + self.bias",
        "y = y",
        "lower/model lower/operators",
    ),
    Mutant(
        "the pass loses addmm's bias",
        "lower/rewrite.py",
        "fuse",
        "if bias is not None: ...",
        "if False: ...",
        "lower/rewrite",
    ),
    Mutant(
        "the pass takes weights that are not transposed",
        "lower/rewrite.py",
        "_dequantized",
        "[(k, 1), (n, k)] if transposed else [(n, k), (k, 1)]",
        "[(n, k), (k, 1)] if transposed else [(n, k), (k, 1)]",
        "lower/rewrite",
    ),
]
