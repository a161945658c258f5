"""K random roundings of a weight by Klein's sampling, of which every row keeps the best.

GPTQ is Babai's nearest plane on the lattice of codes: column after column takes the code nearest to
its moved weight u = w_j / s. A path that sometimes takes the second nearest, mostly where both are
about as near, can end lower. With d = |u - code| that choice costs s^2 D_j ((1 - d)^2 - d^2) more
in column j, and is taken with the probability 1 / (1 + exp(cost / t)), where t is TEMPERATURE times
the mean of s^2 D_j / 12, the mean cost of a rounding. Path 0 is GPTQ's own, so that no row is
worse.

Legend: s, z scales and zeros of one column [r], over r = paths x o rows; D_j the diagonal of D in
M = R D R^T (`qlab.methods.obs`); u_r moved weights in units of the scale.
Sources: Klein 2000; OJBKQ (arXiv 2602.08376) for weights.
"""

import torch
from torch import Tensor

from qlab.algebra.qtensor import QTensor, steps
from qlab.algebra.random import generator
from qlab.algebra.spec import Int
from qlab.errors import QlabError
from qlab.methods.obs import obs_sweep
from qlab.methods.quadratic import accept, start
from qlab.methods.stages import BLOCK, Problem, RoundStage, obs

TEMPERATURE = 0.2


def babai(paths: int = 5, seed: int = 0) -> RoundStage:
    """A rounding for `solver`: of so many paths every row keeps the one with the least J.

    paths: in all, the first of which is GPTQ's. seed: of the random numbers, which also depend on
    the path's number and on nothing else.
    """
    if paths < 1:
        raise QlabError(f"paths is {paths}; give at least 1, which is GPTQ's own")

    def best_path(problem: Problem, scales: Tensor, zeros: Tensor | None) -> QTensor:
        quadratic = problem.quadratic
        best = start(quadratic, obs(problem, scales, zeros), "path 0")
        for codes in sampled_codes(problem, scales, zeros, paths - 1, seed):
            best = accept(quadratic, best, problem.leaf(codes, scales, zeros), "another path")
        return best.leaf

    best_path.__name__ = f"babai_{paths}"
    return best_path


def sampled_codes(
    problem: Problem, scales: Tensor, zeros: Tensor | None, paths: int, seed: int
) -> tuple[Tensor, ...]:
    """Codes [o, k] of every path. All paths are one sweep over their rows, one below the other."""
    if not paths:
        return ()
    spec, W_ok, order = problem.spec, problem.target_ok, problem.order
    if not isinstance(spec, Int):
        raise QlabError(f"random paths step from code to code, which {spec} has not; use obs")
    factor = problem.factor
    o, k = W_ok.shape
    rows, cols = spec.tile.sizes(W_ok.shape)
    W = W_ok[:, order].masked_fill_(factor.dead, 0)

    def per_column(x_ag: Tensor) -> Tensor:
        """[a, g] -> [k, r], in solving order."""
        x_go = x_ag.T.float().repeat_interleave(rows, 1)[:, :o]
        return x_go[order // cols].repeat(1, paths)

    s = per_column(steps(scales, problem.outer, torch.float32))
    z = torch.zeros_like(s) if zeros is None else per_column(zeros)
    draws = [generator(seed, f"babai/{path}") for path in range(1, paths + 1)]
    uniform_kr = torch.cat(
        [torch.rand(k, o, generator=draw, dtype=torch.float32) for draw in draws], 1
    ).to(W.device)
    codes_kr = torch.empty_like(s)
    free = None
    if problem.support is not None:
        free = problem.support[:, order].T.to(s.dtype).repeat(1, paths)
    # costs in units of the mean one, of the columns' mean; scales of a row are about alike
    share_k = factor.D_k / (TEMPERATURE * factor.D_k.mean() / 12)

    def project(w_r: Tensor, j: int, out_r: Tensor) -> None:
        u_r = w_r / s[j] + z[j]
        code_r = u_r.round()
        beyond_r = u_r - code_r
        cost_r = share_k[j] * (1 - 2 * beyond_r.abs())
        other = uniform_kr[j] < torch.sigmoid(-cost_r)
        code_r = torch.where(other, code_r + beyond_r.sign(), code_r)
        codes_kr[j] = code_r.clamp_(spec.qmin, spec.qmax)
        torch.mul(codes_kr[j] - z[j], s[j], out=out_r)
        if free is not None:
            out_r.mul_(free[j])

    obs_sweep(W.repeat(paths, 1), factor.R_kk, project, BLOCK)
    codes_rk = codes_kr[order.argsort()].T.contiguous().to(spec.code_dtype)
    return codes_rk.split(o)
