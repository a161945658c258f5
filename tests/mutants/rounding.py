"""Grids, codes and floats."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "round down instead of to nearest",
        "algebra/spec.py",
        "Int.nearest_",
        "x.round_().clamp_",
        "x.floor_().clamp_",
        "rtn",
    ),
    Mutant(
        "codes are not clamped",
        "algebra/spec.py",
        "Int.nearest_",
        "x.round_().clamp_(self.qmin, self.qmax)",
        "x.round_()",
        "rtn",
    ),
    Mutant(
        "zero point ignored in dense",
        "algebra/qtensor.py",
        "dense",
        "x - leaf.zeros.to(dtype)[..., None]",
        "x",
        "rtn",
    ),
    Mutant(
        "range need not hold zero",
        "algebra/grid.py",
        "_fit_rows",
        "x_agn.amin(-1).clamp_max(0)",
        "x_agn.amin(-1)",
        "rtn grid",
    ),
    Mutant(
        "zero point of the unrounded scale",
        "algebra/grid.py",
        "_ranged",
        "stored = s.to(spec.scale_dtype).float()",
        "stored = s",
        "rtn",
    ),
    Mutant(
        "codes of the unrounded scale",
        "algebra/grid.py",
        "encode",
        "return QTensor(round_codes(W_ok, scales, zeros, spec, outer), scales, zeros, spec, outer)",
        """\
exact, _ = fit(
    grid, W_ok, __import__("dataclasses").replace(spec, scale_dtype=torch.float32), h_k
)
return QTensor(round_codes(W_ok, exact, zeros, spec, outer), scales, zeros, spec, outer)
""",
        "rtn",
    ),
    Mutant(
        "symmetric range over qmax",
        "algebra/spec.py",
        "Int.reach",
        "(self.qmax - self.qmin) / 2",
        "self.qmax",
        "rtn",
    ),
    Mutant(
        "refit upside down",
        "algebra/grid.py",
        "_best",
        "stored(B / A, spec, outer)",
        "stored(A / B, spec, outer)",
        "grid",
    ),
    Mutant(
        "signed range has no sign",
        "algebra/grid.py",
        "_signed_range.candidates",
        "torch.where(hi > -lo, -absmax, absmax)",
        "absmax",
        "grid",
    ),
    Mutant(
        "the best is not refitted again",
        "algebra/grid.py",
        "_fit_rows",
        "if grid.refit: ...",
        "if False: ...",
        "grid",
    ),
    Mutant(
        "grid weights ignored",
        "algebra/grid.py",
        "fit",
        "h_agn = spec.tile.split(h_k.expand(spec.tile.sizes(W_ok.shape)[0], -1))",
        "_ = spec.tile.split(h_k.expand(spec.tile.sizes(W_ok.shape)[0], -1))",
        "grid",
    ),
    Mutant(
        "float: large codes do not saturate",
        "algebra/spec.py",
        "Float.nearest_",
        "x.add_(0.0).clamp_(-self.max, self.max)",
        "x.add_(0.0)",
        "floats",
    ),
    Mutant(
        "float: halves away from the even code",
        "algebra/spec.py",
        "Float.nearest_",
        "x.div_(step).round_()",
        "x.div_(step).add_(0.5).floor_()",
        "floats",
    ),
    Mutant(
        "float: subnormals as if they were normal",
        "algebra/spec.py",
        "Float.nearest_",
        "(x.frexp().exponent - 1).clamp_(min=0) - self.mantissa",
        "x.frexp().exponent - 1 - self.mantissa",
        "floats",
    ),
    Mutant(
        "float: powers of two rounded down",
        "algebra/grid.py",
        "_power_of_two",
        "absmax.float().view(torch.int32) + (1 << 22 - rounded_to)",
        "absmax.float().view(torch.int32)",
        "floats",
    ),
    Mutant(
        "float: global scale of a module's first weight",
        "driver/siblings.py",
        "Siblings.outer",
        "map(self._read, self._families[family])",
        "map(self._read, self._families[family][:1])",
        "directories/siblings",
    ),
    Mutant(
        "a transposed weight is certified as is",
        "driver/writing.py",
        "certificates",
        """\
original.mT if isinstance(
    original, Tensor
) and module in skeleton.names.transposed else original
""",
        "original.mT if isinstance(original, Tensor) and False else original",
        "directories/transposed",
    ),
    Mutant(
        "float: global scale of each weight",
        "algebra/transform.py",
        "each_weight.run",
        "outer = outers.get(site.path)",
        "outer = shared_outer([graph.weight_ok(site)], spec)",
        "floats",
    ),
    Mutant(
        "hqq: the last step instead of the best",
        "methods/hqq.py",
        "half_quadratic",
        "better = e_ag < best_e",
        "better = e_ag < torch.inf",
        "half_quadratic",
    ),
    Mutant(
        "hqq: every error is let be",
        "methods/hqq.py",
        "half_quadratic",
        "(d_agn.abs() - d_agn.abs().pow(P - 1) / beta).relu()",
        "d_agn.abs() - d_agn.abs().pow(P - 1) / beta",
        "half_quadratic",
    ),
]
