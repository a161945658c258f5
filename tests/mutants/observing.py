"""Statistics of inputs."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "transport dropped",
        "algebra/reparametrize.py",
        "reparametrize",
        "stats = transport(stats, source, _whole(M, W_ok.shape[-1]))",
        "pass",
        "transform",
    ),
    Mutant(
        "tokens counted along channels",
        "algebra/stats.py",
        "",
        "Moment(gram(o.x_nk), o.x_nk.shape[0])",
        "Moment(gram(o.x_nk), o.x_nk.shape[1])",
        "stats",
    ),
    Mutant(
        "tokens of one part only",
        "algebra/stats.py",
        "add_moments",
        "a.tokens + b.tokens",
        "max(a.tokens, b.tokens)",
        "stats",
    ),
    Mutant(
        "lower triangle not mirrored",
        "algebra/stats.py",
        "gram",
        "H_kk[beyond:, i:beyond] = H_kk[i:beyond, beyond:].T",
        "H_kk[beyond:, i:beyond] = 0",
        "stats",
    ),
    Mutant(
        "tiles beside the diagonal counted once",
        "algebra/stats.py",
        "quadratic",
        """\
torch.addmm(
    D_ot @ H_kk[i : i + TILE, i : i + TILE],
    D_ok[:, below],
    H_kk[below, i : i + TILE],
    alpha=2,
)
""",
        """\
torch.addmm(
    D_ot @ H_kk[i : i + TILE, i : i + TILE], D_ok[:, below], H_kk[below, i : i + TILE]
)
""",
        "stats",
    ),
    Mutant(
        "absmax moves with a sign",
        "algebra/stats.py",
        "",
        "lambda s, M: s * M.abs() if M.ndim == 1 else None",
        "lambda s, M: s * M if M.ndim == 1 else None",
        "stats",
    ),
    Mutant(
        "ranges do not turn over",
        "algebra/stats.py",
        "_move_minmax",
        "return (torch.minimum(lo, hi), torch.maximum(lo, hi))",
        "return (lo, hi)",
        "stats",
    ),
    Mutant(
        "sample takes the first rows",
        "algebra/stats.py",
        "sample",
        "smallest(_hashed(o.keys), o.x_nk.float())",
        "smallest(o.keys, o.x_nk.float())",
        "stats",
    ),
    Mutant(
        "combining writes to its input",
        "algebra/stats.py",
        "add_moments",
        "Moment(a.sum_kk + b.sum_kk, a.tokens + b.tokens)",
        "Moment(a.sum_kk.add_(b.sum_kk), a.tokens + b.tokens)",
        "stats",
    ),
    Mutant(
        "drift away from the reference",
        "algebra/stats.py",
        "_drift",
        "o.reference_nk.float() - x_nk",
        "x_nk - o.reference_nk.float()",
        "gptaq stats",
    ),
    Mutant(
        "drift along the reference",
        "algebra/stats.py",
        "_drift",
        "(o.reference_nk.float() - x_nk).T @ x_nk",
        "(o.reference_nk.float() - x_nk).T @ o.reference_nk.float()",
        "gptaq stats",
    ),
    Mutant(
        "weights aimed beyond their strength",
        "methods/gptaq.py",
        "aim_at_reference.run",
        "strength * torch.cholesky_solve((W_ok @ drift.mean_kk).mT, factor).mT",
        "torch.cholesky_solve((W_ok @ drift.mean_kk).mT, factor).mT",
        "gptaq",
    ),
    Mutant(
        "weights aimed without damping",
        "methods/gptaq.py",
        "aim_at_reference.run",
        "cholesky(stats[source, 'second_moment'].mean_kk, damp)",
        "cholesky(stats[source, 'second_moment'].mean_kk, 1e-09)",
        "gptaq",
    ),
    Mutant(
        "the reference goes on quantized",
        "driver/solve.py",
        "solve_in_order",
        "[walked, reference.graph]",
        "[walked, walked]",
        "gptaq",
    ),
    Mutant(
        "the reference sees what the quantized one sees",
        "driver/solve.py",
        "solve_in_order",
        "streams.append(_Stream(graph.code, reference.batches))",
        "streams.append(_Stream(graph.code, batches))",
        "gptaq",
    ),
    Mutant(
        "quantile: of the high end alone",
        "methods/inputs.py",
        "quantile.clipped",
        "-high if spec.symmetric else ordered[..., round(last * (1 - share)), None]",
        "-high if spec.symmetric else ordered[..., 0, None]",
        "kv",
    ),
    Mutant(
        "seeds: evaluated on other windows",
        "evaluation/comparison.py",
        "over_seeds",
        "difference(evaluations[seed], evaluations[seeds[0]])",
        "pass",
        "evaluation/trust",
    ),
]
