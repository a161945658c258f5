"""Solvers of stages, low ranks, learning in blocks, and random numbers that have a seed."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "paths: the seed is not used",
        "methods/babai.py",
        "sampled_codes",
        "generator(seed, f'babai/{path}')",
        "generator(0, f'babai/{path}')",
        "stages",
    ),
    Mutant(
        "paths: zeros of a mask are stepped over",
        "methods/babai.py",
        "sampled_codes",
        "problem.support is not None",
        "False",
        "stages",
    ),
    Mutant(
        "accepted: with the zero points of the leaf before",
        "methods/quadratic.py",
        "accept",
        "rows_where(better_a, leaf.zeros, old.zeros)",
        "old.zeros",
        "stages",
    ),
    Mutant(
        "accepted: codes without the scales that they share",
        "methods/quadratic.py",
        "accept",
        "better_a.repeat_interleave(rows)[:len(J_o)]",
        "before.J_o - J_o > 0",
        "stages",
    ),
    Mutant(
        "l2qer: without the inputs",
        "methods/lqer.py",
        "l2qer.fn",
        "E_ok * s_k",
        "E_ok",
        "low_rank",
    ),
    Mutant(
        "low rank: factors in fp32",
        "methods/lqer.py",
        "beside",
        "codes.scales.dtype if wide else torch.bfloat16",
        "torch.float32",
        "low_rank",
    ),
    Mutant(
        "qat: norms move as far as weights",
        "methods/qat.py",
        "_trained",
        "lr * SLOWER",
        "lr",
        "qat",
    ),
    Mutant(
        "rotation of hidden states: the seed is not used",
        "methods/rotate_residual.py",
        "rotate_residual.choose",
        "generator(seed, 'residual stream')",
        "generator(0, 'residual stream')",
        "rotate_residual",
    ),
    Mutant(
        "spinquant: the rate stays where no step helps",
        "methods/spinquant.py",
        "_learned",
        "rate /= 2",
        "pass",
        "spinquant",
    ),
]
