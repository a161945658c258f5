"""GPTQ and coordinate descent."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "scales tiled instead of repeated",
        "methods/gptq.py",
        "_codes_of_rows.per_column",
        "order // cols",
        "order % x_ag.shape[1]",
        "gptq",
    ),
    Mutant(
        "group off by one column",
        "methods/gptq.py",
        "_codes_of_rows.per_column",
        "order // cols",
        "(order + 1) % len(order) // cols",
        "gptq",
    ),
    Mutant(
        "order not restored",
        "methods/gptq.py",
        "_codes_of_rows",
        "codes_ko[order.argsort()]",
        "codes_ko",
        "gptq",
    ),
    Mutant(
        "order applied twice",
        "methods/gptq.py",
        "_codes_of_rows",
        "codes_ko[order.argsort()]",
        "codes_ko[order]",
        "gptq",
    ),
    Mutant(
        "H not permuted",
        "methods/gptq.py",
        "gptq_codes",
        "permuted_(H(), order)",
        "H()",
        "gptq",
    ),
    Mutant(
        "act-order ascending",
        "methods/gptq.py",
        "act_order",
        "H_kk.diagonal().argsort(descending=True, stable=True)",
        "H_kk.diagonal().argsort(descending=False, stable=True)",
        "gptq",
    ),
    Mutant(
        "dead columns not zeroed",
        "methods/gptq.py",
        "_codes_of_rows",
        "W_ok.index_select(1, order).masked_fill_(factor.dead.to(W_ok.device), 0)",
        "W_ok.index_select(1, order)",
        "gptq",
    ),
    Mutant(
        "damping not recorded",
        "methods/obs.py",
        "factor_of",
        "Factor(C_kk.div_(root_k), used, diagonal_k.flip(0) == 0, root_k.square())",
        "Factor(C_kk.div_(root_k), damp, diagonal_k.flip(0) == 0, root_k.square())",
        "gptq",
    ),
    Mutant(
        "damping not added",
        "methods/obs.py",
        "damped_",
        "H_kk.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal) + damp * mean)",
        "H_kk.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal))",
        "gptq",
    ),
    Mutant(
        "factor of H read forwards",
        "methods/obs.py",
        "factor_of",
        "cholesky_of(lambda: backwards_(H()), damp)",
        "cholesky_of(H, damp)",
        "gptq",
    ),
    Mutant(
        "factor not normalised",
        "methods/obs.py",
        "factor_of",
        "Factor(C_kk.div_(root_k), used, diagonal_k.flip(0) == 0, root_k.square())",
        "Factor(C_kk, used, diagonal_k.flip(0) == 0, root_k.square())",
        "gptq",
    ),
    Mutant(
        "factor normalised by rows",
        "methods/obs.py",
        "factor_of",
        "C_kk.diagonal().clone()",
        "C_kk.diagonal().clone()[:, None]",
        "gptq",
    ),
    Mutant(
        "last block not repaired",
        "methods/obs.py",
        "obs_sweep",
        """\
A_so[start - first : stop - first].addmm(
    R_kk[first:start, start:stop].T, E_ko[first:start]
)
""",
        """\
A_so[start - first : stop - first].addmm(
    R_kk[first:start, start:stop].T, E_ko[first:start], beta=1, alpha=float(stop < k)
)
""",
        "gptq",
    ),
    Mutant(
        "errors of the first span forgotten",
        "methods/obs.py",
        "obs_sweep",
        "W_ko[span].addmm(R_kk[:first, span].T, E_ko[:first])",
        "W_ko[span].clone()",
        "gptq",
    ),
    Mutant(
        "gradient of columns behind a span forgotten",
        "methods/quantease.py",
        "_product_outside",
        "(H_kk[span, :first] @ D_ko[:first]).addmm_(H_kk[span, stop:], D_ko[stop:])",
        "H_kk[span, :first] @ D_ko[:first]",
        "quantease",
    ),
    Mutant(
        "errors of the repaired column",
        "methods/obs.py",
        "obs_sweep",
        "torch.sub(w[i], out[i], out=e_o)",
        "torch.sub(a_o, out[i], out=e_o)",
        "gptq",
    ),
    Mutant(
        "the sweep writes to its input",
        "methods/obs.py",
        "obs_sweep",
        "W_ok.T.clone(memory_format=torch.contiguous_format)",
        "W_ok.T.contiguous()",
        "gptq",
    ),
    Mutant(
        "step taken backwards",
        "methods/quantease.py",
        "_descended",
        "code_o.addcdiv_(g_o, hs[j])",
        "code_o.addcdiv_(g_o, hs[j], value=-1)",
        "quantease",
    ),
    Mutant(
        "curvature without the scale",
        "methods/quantease.py",
        "_descended",
        "H_kk.diagonal()[:, None] * s_ko",
        "(H_kk.diagonal()[:, None] * s_ko.abs().mean()).expand_as(s_ko)",
        "quantease",
    ),
    Mutant(
        "gradient not brought up to date",
        "methods/obs.py",
        "Substitution.solve",
        "a_o.addmv_(E_oi, T_i)",
        "a_o.addmv(E_oi, T_i)",
        "quantease",
    ),
    Mutant(
        "error not brought up to date",
        "methods/quantease.py",
        "_descended",
        "D_ko[at] -= inner.e_bo[:len(G_bo)]",
        "pass",
        "quantease",
    ),
    Mutant(
        "codes beyond the range",
        "methods/quantease.py",
        "_descended",
        "spec.nearest_(code_o.addcdiv_(g_o, hs[j]))",
        "code_o.addcdiv_(g_o, hs[j]).round_()",
        "quantease",
    ),
    Mutant(
        "scales of the wrong group",
        "methods/quantease.py",
        "_descended",
        """\
steps(q.scales, q.outer, W_ok.dtype).T.repeat_interleave(rows, 1)[
    :, : len(W_ok)
].index_select(0, order // cols)
""",
        """\
steps(q.scales, q.outer, W_ok.dtype).T.repeat_interleave(rows, 1)[
    :, : len(W_ok)
].index_select(0, order % (len(order) // cols))
""",
        "quantease",
    ),
    Mutant(
        "off-diagonal groups forgotten",
        "methods/quantease.py",
        "_refitted",
        "A_ogh[:, g, g:] = A_ogh[:, g:, g] = torch.linalg.vecdot(cH_ohm, c_ogn[:, g:])",
        """\
A_ogh[:, g, g:] = 0
A_ogh[:, g:, g] = 0
A_ogh[:, g, g:g + 1] = torch.linalg.vecdot(cH_ohm, c_ogn[:, g:])
""",
        "quantease",
    ),
    Mutant(
        "zeros forgotten in the refit",
        "methods/quantease.py",
        "_refitted",
        "c_ogn = c_ogn - q.zeros.to(W_ok.dtype)[..., None]",
        "c_ogn = c_ogn - 0 * q.zeros.to(W_ok.dtype)[..., None]",
        "quantease",
    ),
    Mutant(
        "ridge pulls to zero",
        "methods/quantease.py",
        "_refitted",
        "b_og + ridge * q.scales.to(W_ok.dtype)",
        "b_og",
        "quantease",
    ),
]
