"""Does every law have teeth? `python tests/mutants.py [words]` plants bugs in copies of the tree and runs the laws on them.

A mutant is one textual replacement in one file. It must be killed by some law; one that survives is a law that is
missing, and the exit code is 1. With words, only the mutants whose names hold one of them are run. Not part of pytest.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
K = "qlab_kernels/"
AT_ONCE = 2


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`, of qlab/ or else of kernels/; `laws` are the test files that ought to notice, of
    tests/laws/ where no folder is named."""

    name: str
    file: str
    old: str
    new: str
    laws: str

    def path(self, tree):
        """The file in a copy of the tree."""
        return tree / ("kernels" if self.file.startswith(K) else "qlab") / self.file


M = Mutant
MUTANTS = [
    # grids and rounding
    M("round down instead of to nearest", "spec.py", "x.round_().clamp_", "x.floor_().clamp_", "rtn"),
    M("codes are not clamped", "spec.py", "x.round_().clamp_(self.qmin, self.qmax)", "x.round_()", "rtn"),
    M("zero point ignored in dense", "qtensor.py", "x - leaf.zeros.to(dtype)[..., None]", "x", "rtn"),
    M("range need not hold zero", "methods/grid.py", "amin(-1).clamp_max(0)", "amin(-1)", "rtn grid"),
    M("zero point of the unrounded scale", "methods/grid.py", "stored = s.to(spec.scale_dtype).float()", "stored = s", "rtn"),
    M("codes of the unrounded scale", "methods/grid.py", "return QTensor(round_codes(W_ok, scales, zeros, spec, outer)",
      "exact, _ = fit(grid, W_ok, __import__('dataclasses').replace(spec, scale_dtype=torch.float32), h_k)\n"
      "    return QTensor(round_codes(W_ok, exact, zeros, spec, outer)", "rtn"),
    M("symmetric range over qmax", "spec.py", "(self.qmax - self.qmin) / 2", "self.qmax", "rtn"),
    M("refit upside down", "methods/grid.py", "stored(B / A, spec, outer)", "stored(A / B, spec, outer)", "grid"),
    M("signed range has no sign", "methods/grid.py", "torch.where(hi > -lo, -absmax, absmax)", "absmax", "grid"),
    M("the best is not refitted again", "methods/grid.py", "    if grid.refit:\n        best", "    if False:\n        best", "grid"),
    M("grid weights ignored", "methods/grid.py", "h_agn = spec.tile.split(", "_ = spec.tile.split(", "grid"),
    # floats
    M("float: large codes do not saturate", "spec.py", "x.add_(0.0).clamp_(-self.max, self.max)", "x.add_(0.0)", "floats"),
    M("float: halves away from the even code", "spec.py", "x.div_(step).round_()", "x.div_(step).add_(0.5).floor_()", "floats"),
    M("float: subnormals as if they were normal", "spec.py", ".clamp_(min=0) - self.mantissa", " - self.mantissa", "floats"),
    M("float: powers of two rounded down", "methods/grid.py", "+ (1 << (22 - rounded_to))", "", "floats"),
    M("float: global scale of a module's first weight", "siblings.py", "map(self._read, self._families[family])",
      "map(self._read, self._families[family][:1])", "doors/siblings"),
    M("a transposed weight is certified as is", "stored.py", "and module in skeleton.transposed else", "and False else",
      "doors/transposed"),
    M("float: global scale of each weight", "transform.py", 'outer = outers.get(site.path)',
      "outer = shared_outer([graph.weight_ok(site)], spec)", "floats"),
    M("hqq: the last step instead of the best", "methods/hqq.py", "better = e_ag < best_e", "better = e_ag < torch.inf",
      "half_quadratic"),
    M("hqq: every error is let be", "methods/hqq.py", ".relu()", "", "half_quadratic"),
    # GPTQ
    M("scales tiled instead of repeated", "methods/gptq.py", "order // cols", "order % x_ag.shape[1]", "gptq"),
    M("group off by one column", "methods/gptq.py", "order // cols", "((order + 1) % len(order)) // cols", "gptq"),
    M("order not restored", "methods/gptq.py", "[order.argsort()]", "", "gptq"),
    M("order applied twice", "methods/gptq.py", "[order.argsort()]", "[order]", "gptq"),
    M("H not permuted", "methods/gptq.py", "H_kk.index_select(0, order).index_select(1, order)", "H_kk", "gptq"),
    M("act-order ascending", "methods/gptq.py", "descending=True", "descending=False", "gptq"),
    M("dead columns not zeroed", "methods/gptq.py", ".masked_fill_(factor.dead.to(W_ok.device), 0)", "", "gptq"),
    M("damping not recorded", "methods/obs.py", "clone()), used,", "clone()), damp,", "gptq"),
    M("damping not added", "methods/obs.py", "diagonal) + damp * mean)", "diagonal))", "gptq"),
    M("factor of H read forwards", "methods/obs.py", "cholesky(H_kk.flip(0, 1), damp)", "cholesky(H_kk, damp)", "gptq"),
    M("factor not normalised", "methods/obs.py", "Factor(C_kk.div_(C_kk.diagonal().clone()),", "Factor(C_kk,", "gptq"),
    M("factor normalised by rows", "methods/obs.py", "C_kk.diagonal().clone()", "C_kk.diagonal().clone()[:, None]", "gptq"),
    M("last block not repaired", "methods/obs.py", "E_ko[:start])", "E_ko[:start], beta=1, alpha=float(stop < k))", "gptq"),
    M("errors of the repaired column", "methods/obs.py", "torch.sub(w[i], out[i]", "torch.sub(a_o, out[i]", "gptq"),
    M("the sweep writes to its input", "methods/obs.py", "torch.sub(w[i], out[i], out=e_o)",
      "torch.sub(w[i], out[i], out=e_o); w[i].copy_(out[i])", "gptq"),
    # coordinate descent
    M("step taken backwards", "methods/quantease.py", "addcdiv_(g_o, hs[j])", "addcdiv_(g_o, hs[j], value=-1)", "quantease"),
    M("curvature without the scale", "methods/quantease.py", "H_kk.diagonal()[:, None] * s_ko",
      "(H_kk.diagonal()[:, None] * s_ko.abs().mean()).expand_as(s_ko)", "quantease"),
    M("gradient not brought up to date", "methods/obs.py", "a_o.addmv_(E_oi, T_i)", "a_o.addmv(E_oi, T_i)", "quantease"),
    M("error not brought up to date", "methods/quantease.py", "D_ko[at] -= inner.e_bo[: len(G_bo)]", "pass", "quantease"),
    M("codes beyond the range", "methods/quantease.py", "spec.nearest_(code_o.addcdiv_(g_o, hs[j]))",
      "code_o.addcdiv_(g_o, hs[j]).round_()", "quantease"),
    M("scales of the wrong group", "methods/quantease.py", "index_select(0, order // cols)",
      "index_select(0, order % (len(order) // cols))", "quantease"),
    M("off-diagonal groups forgotten", "methods/quantease.py", "A_ogh[:, g, g:] = A_ogh[:, g:, g] =",
      "A_ogh[:, g, g:] = 0; A_ogh[:, g:, g] = 0; A_ogh[:, g, g:g + 1] =", "quantease"),
    M("zeros forgotten in the refit", "methods/quantease.py", "c_ogn = c_ogn - q.zeros", "c_ogn = c_ogn - 0 * q.zeros", "quantease"),
    M("ridge pulls to zero", "methods/quantease.py", "b_og + ridge * q.scales.to(W_ok.dtype)", "b_og", "quantease"),
    # AWQ and absorb
    M("a refitted grid may be worse than the first", "methods/grid.py", "torch.where(worse, first[0], best[0])", "best[0]", "grid"),
    M("identity is no candidate", "methods/awq.py", "return found if found.loss < identity.loss else identity", "return found", "awq"),
    M("walk over ratios ends at once", "methods/awq.py", "> len(losses) - 3", "> len(losses) - 2", "awq"),
    M("vertex mirrored", "methods/awq.py", "(below - above) / (below", "(above - below) / (below", "awq"),
    M("tied heads not tied", "methods/awq.py", "fold.tie(absmean_k)", "absmean_k", "awq methods"),
    M("scored with another rounding", "methods/awq.py", "moved = [W_ok * (1 / m_k) for", "moved = [W_ok / m_k for", "awq"),
    M("scored with unrounded scales", "methods/awq.py", "return fold.stored(graph, (s.max() * s.min()).sqrt() / s)",
      "return (s.max() * s.min()).sqrt() / s", "awq"),
    M("bias of rows not folded", "absorb.py", "if p.bias:", "if p.bias and not p.rows:", "absorb"),
    M("bias of norms not folded", "absorb.py", "if p.bias:", "if p.bias and p.rows:", "absorb"),
    M("1 + w folded as w", "absorb.py", "((_wide(w) + offset) * t - offset)", "(w.float() * t)", "absorb"),
    M("leaks allowed", "absorb.py", "not mine & (walk.leaked | others)", "not mine & others", "absorb"),
    M("other sources forgotten", "absorb.py", "not mine & (walk.leaked | others)", "not mine & walk.leaked", "absorb"),
    M("folding into a shared norm", "absorb.py", "(node.name in code.params and len(node.users) == 1)",
      "node.name in code.params", "absorb"),
    M("keys and values may be one", "channels.py", "                    self._leak(scored)", "                    pass", "absorb"),
    M("negative scales fold", "absorb.py", " or not (scales[0] > 0).all()", "", "absorb"),
    M("rounded leaves fold in silence", "absorb.py", "if not self._held(leaf, m_k).all():", "if False:", "absorb"),
    M("rounded rows do not move", "absorb.py", "leaf.scales.float() * t[..., None]", "leaf.scales.float() * 1", "absorb"),
    M("scales of 8 bits take others", "absorb.py", " and (spec.scale_dtype is None or spec.scale_dtype.itemsize > 1)", "", "sweep"),
    M("what a scale loses does not count", "absorb.py", "<= ROUNDED * exact.abs()", "<= exact.abs()", "absorb"),
    M("a scale the rows cannot hold counts as stored", "absorb.py",
      "torch.where(self._held(leaf, m_k), m_k, 1.0) if isinstance(leaf, QTensor) else m_k", "m_k", "absorb"),
    # statistics
    M("transport dropped", "transform.py", "        stats = transport(stats, source, M)\n", "        pass\n", "transform"),
    M("tokens counted along channels", "stats.py", "Moment(gram(o.x_nk), o.x_nk.shape[0])",
      "Moment(gram(o.x_nk), o.x_nk.shape[1])", "stats"),
    M("tokens of one part only", "stats.py", "a.tokens + b.tokens", "max(a.tokens, b.tokens)", "stats"),
    M("lower triangle not mirrored", "stats.py", "H_kk[beyond:, i:beyond] = H_kk[i:beyond, beyond:].T",
      "H_kk[beyond:, i:beyond] = 0", "stats"),
    M("tiles beside the diagonal counted once", "stats.py", "i : i + TILE], alpha=2)", "i : i + TILE])", "stats"),
    M("absmax moves with a sign", "stats.py", "lambda s, M: s * M.abs() if", "lambda s, M: s * M if", "stats"),
    M("ranges do not turn over", "stats.py", "return torch.minimum(lo, hi), torch.maximum(lo, hi)", "return lo, hi", "stats"),
    M("sample takes the first rows", "stats.py", "smallest(_hashed(o.keys)", "smallest(o.keys", "stats"),
    M("combining writes to its input", "stats.py", "Moment(a.sum_kk + b.sum_kk", "Moment(a.sum_kk.add_(b.sum_kk)", "stats"),
    M("drift away from the reference", "stats.py", "o.reference_nk.float() - o.x_nk.float()",
      "o.x_nk.float() - o.reference_nk.float()", "gptaq stats"),
    M("drift along the reference", "stats.py", "o.x_nk.float()).T @ o.x_nk", "o.x_nk.float()).T @ o.reference_nk", "gptaq stats"),
    M("weights aimed beyond their strength", "methods/gptaq.py", "strength * torch.", "torch.", "gptaq"),
    M("weights aimed without damping", "methods/gptaq.py", ".mean_kk, damp)", ".mean_kk, 1e-9)", "gptaq"),
    M("the reference goes on quantized", "sweep.py", "[walked, reference.graph]", "[walked, walked]", "gptaq"),
    M("the reference sees what the quantized one sees", "sweep.py", "[_Stream(graph.code, reference.batches)]",
      "[_Stream(graph.code, batches)]", "gptaq"),
    # graphs and transforms
    M("online operations not applied", "interpret.py", "                x = op(x)\n", "                pass\n", "absorb"),
    M("online operations not observed", "interpret.py", "        x = _run_op(op, x, ends)\n    return",
      "        pass\n    return", "transform"),
    M("a source's input dropped before its last site", "interpret.py", "last[by_name[held]] = max(", "max(", "sweep"),
    M("a walk keeps the leaves it began with", "interpret.py", "interpreter = _Interpreter(graph, self.code.graph)",
      "interpreter = self.__dict__.setdefault('first', _Interpreter(graph, self.code.graph))", "sweep"),
    M("scales folded behind a walk", "sweep.py", "            if stage.sitewise:\n", "            if True:\n", "sweep"),
    M("mixtures scaled source by source", "sweep.py", "lone or not stage.reparametrizes", "True", "sweep"),
    M("a source solved on unquantized inputs", "sweep.py", "                graph, stats = apply(stage, graph, stats)\n",
      "                _, stats = apply(stage, graph, stats)\n", "sweep"),
    M("in-place operations not observed", "interpret.py", " or _writes(n)", "", "graph"),
    M("transposed layout forgotten", "graph.py", 'return W.mT if site.layout.endswith("k o") else W', "return W", "graph"),
    # mixtures of experts
    M("mixture: one statistic for all experts", "stats.py", "Observation(o.x_nk[rows], o.keys[rows], None, other[rows]) for rows in",
      "Observation(o.x_nk, o.keys, None, other) for rows in", "experts stats"),
    M("mixture: no data means no weight", "stats.py", "            return torch.eye(", "            return 0 * torch.eye(",
      "stats experts"),
    M("mixture: routers are rounded", "transform.py", "name in self.scope and not unrounded", "name in self.scope", "graph"),
    M("mixture: everywhere is nowhere", "interpret.py", "if everywhere and node.target is", "if False and node.target is", "experts"),
    M("mixture: pairs are not tokens", "experts.py", "pairs // chosen_nt.shape[1]", "pairs % chosen_nt.shape[0]", "experts"),
    M("mixture: every expert reads the first", "graph.py", "tree_map_only(Tensor, lambda t: t[expert], leaf)",
      "tree_map_only(Tensor, lambda t: t[0], leaf)", "graph"),
    M("mixture: a gather leaks", "channels.py", "if n.target is aten.index.Tensor and", "if False and", "absorb"),
    M("mixture: an origin moves without its statistics", "transform.py", "    for source in by_source(sharing):",
      "    for source in list(by_source(sharing))[:1]:", "transform"),
    M("mixture: parts in another order", "model/names.py", "sorted(pieces, key=lambda p: (p.expert or 0, p.start))", "reversed(pieces)",
      "./names"),
    M("chain reversed", "transform.py", "return sum(transforms, ())", "return sum(reversed(transforms), ())", "transform"),
    M("at ignored", "transform.py", "include=(pattern, *s.scope.include)", "include=s.scope.include", "transform"),
    M("later rules win too", "transform.py", "exclude=stage.scope.exclude + earlier", "exclude=stage.scope.exclude", "transform"),
    M("uncovered sites pass", "transform.py", "if stage.uncovered and chosen.sites:", "if False:", "transform"),
    M("a step writes to the model's own weight", "rounding.py", "        W_ok = W_ok.clone()\n", "        pass\n", "claims"),
    M("a step writes to the statistics of all", "rounding.py", "return _copy(self.held[name])", "return self.held[name]", "claims"),
    M("a step goes on writing to its leaf", "rounding.py", "return _copy(made[0]), note", "return made[0], note", "claims"),
    M("zeros of a mask are lost", "rounding.py", "    if lost:\n", "    if False:\n", "claims"),
    M("what is written behind autograd's back passes", "claims.py", "return [(_version(t), 0 if name",
      "return [(_version(t), 0 if True or name", "claims"),
    M("a program may change", "claims.py", "if new.code is not graph.code:", "if False:", "claims"),
    M("a site-wise step sees all weights", "claims.py", "    if not hidden:\n", "    if True:\n", "claims"),
    M("a wrong inverse passes", "transform.py", "if not (error <= INVERSE).all():", "if False:", "lossless"),
    M("a false claim passes", "lossless.py", "    if change > limit:\n", "    if False:\n", "lossless"),
    M("casts hide a change", "interpret.py", "wide_args = tuple(_wide(a) for a in args)", "wide_args = args", "lossless"),
    M("no gradient for rounded inputs", "methods/inputs.py", "return rounded + (x - x.detach())", "return rounded + 0 * x",
      "codecs/compressed_tensors_inputs"),
    M("NaN passes", "rounding.py", "if not torch.isfinite(W_ok).all():", "if False:", "transform"),
    M("shared inputs may be split", "transform.py", "    if outside:\n", "    if False:\n", "transform"),
    M("weights reparametrized in place", "transform.py", "moved = W_ok * M_inv if", "moved = W_ok.mul_(M_inv) if", "methods"),
    M("rotation transposed", "transform.py", "W_ok.double() @ M_inv.T.double()", "W_ok.double() @ M_inv.double()", "absorb"),
    # kernels, without a GPU: Triton's interpreter against the float64 reference
    M("a split drops its tail", K + "tile.py", "tl.range(first, K // BK, step,", "tl.range(first, K // BK // step * step, step,",
      "kernels/interpreter"),
    M("nibbles swapped", K + "tile.py", "low = (words & 15).to(tl.int8)\n        high = (words >> 4).to(tl.int8)",
      "high = (words & 15).to(tl.int8)\n        low = (words >> 4).to(tl.int8)", "kernels/interpreter"),
    M("a tile wider than a group takes its first scale", K + "tile.py", "rows = tile * GROUPS + tl.arange(0, GROUPS)[None, :]",
      "rows = tile * GROUPS + 0 * tl.arange(0, GROUPS)[None, :]", "kernels/interpreter"),
    M("a group wider than a tile moves on with it", K + "tile.py", "row = tile // (GROUP // BK)", "row = tile", "kernels/interpreter"),
    M("zero points added", K + "tile.py", "w -= load_halves(zeros_ptr, row,", "w += load_halves(zeros_ptr, row,",
      "kernels/interpreter"),
    M("whole rows lose their zero point", K + "tile.py", "tl.dot(w - z if ZEROS else w, x, acc)", "tl.dot(w, x, acc)",
      "kernels/interpreter"),
    M("partial sums in 16 bits", K + "int4_mm.py", "packed.n, dtype=torch.float32)", "packed.n, dtype=stored(x.dtype))",
      "kernels/interpreter"),
    M("experts read from the first one's words", K + "grouped.py", "words_ptr += expert.to(tl.int64) * N_PAD * (K // 2) + ",
      "words_ptr += ", "kernels/interpreter"),
    M("experts end where the next begins", K + "grouped.py", "tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < E), other=0)",
      "tl.load(offsets_ptr + e, mask=(e > 0) & (e < E), other=0)", "kernels/interpreter"),
    M("planes of x unscaled", K + "fma.py", "by_word / powers", "by_word", "kernels/interpreter"),
    M("dequantized rows shifted by an atom", K + "dequantize.py", "row = tl.minimum(row,", "row = 0 * tl.minimum(row,",
      "kernels/interpreter"),
    M("padding holds weights", K + "layout.py", "n_pad, k_pad), 8, dtype=torch.uint8", "n_pad, k_pad), 9, dtype=torch.uint8",
      "kernels/layout kernels/interpreter"),
    M("atoms in another order", K + "layout.py", "permute(0, 1, 5, 2, 4, 8, 6, 7, 3, 9)", "permute(0, 1, 5, 2, 4, 8, 7, 6, 3, 9)",
      "kernels/layout"),
    M("tiles that do not divide are legal", K + "config.py", "smem: int) -> str | None:",
      "smem: int) -> str | None:\n    n_pad = k_pad = 1 << 20\n", "kernels/capability cache/cache cache/tune kernels/interpreter"),
    # the config cache
    M("another device's entries count as the user's own", K + "cache.py", '("user", self.user, True)', '("user", self.user, False)',
      "cache/cache"),
    M("shipped before the user's own", K + "cache.py", '("override", self.override, False), ("user", self.user, True),',
      '("override", self.override, False), ("shipped-device", self.shipped, True), ("user", self.user, True),', "cache/cache"),
    M("illegal entries count", K + "cache.py", "if legal(p, entry.config) is None:\n                    return Found(entry.config, s",
      "if True:\n                    return Found(entry.config, s", "cache/cache"),
    M("the hash forgets the user's files", K + "cache.py", "for layer in (self.override, self.user, self.shipped)",
      "for layer in (self.override, self.shipped)", "cache/cache"),
    M("writers do not lock", K + "entries.py", "fcntl.flock(sidecar, fcntl.LOCK_EX)", "pass", "cache/entries"),
    M("a writer forgets what was there", K + "entries.py", "entries = dict(table.entries) if table else {}", "entries = {}",
      "cache/entries cache/cache"),
    M("a corrupt file is lost", K + "entries.py", "os.replace(path, aside)", "path.unlink()", "cache/entries cache/cache"),
    M("an older entry wins an import", K + "transfer.py", "entries[key].date <= entry.date", "entries[key].date >= entry.date",
      "cache/commands cache/cache"),
    # lowering
    M("high planes at the low ones' scale", "lower/nibbles.py", "torch.cat([16 * scales, scales], 1)", "torch.cat([scales, scales], 1)",
      "lower/operators"),
    M("low planes keep their offset", "lower/nibbles.py", "if zeros is None else zeros) - 8", "if zeros is None else zeros)",
      "lower/operators"),
    M("wide groups in turns", "lower/nibbles.py", "leaf.scales.float().repeat_interleave(rows, 0).repeat_interleave(repeat, 1)",
      "leaf.scales.float().repeat_interleave(rows, 0).repeat(1, repeat)", "lower/operators"),
    M("aten's zero point has the other sign", "lower/cpu.py", "-(planes.zeros * planes.scales).mT", "(planes.zeros * planes.scales).mT",
      "lower/operators"),
    M("words of another machine are read", "lower/cpu.py", "    if name != layout():", "    if False:", "lower/operators lower/model"),
    M("a bias is lost", "lower/linear.py", "y = y if self.bias is None else y + self.bias", "y = y", "lower/model lower/operators"),
    M("the pass loses addmm's bias", "lower/rewrite.py", "            if bias is not None:", "            if False:", "lower/rewrite"),
    M("the pass takes weights that are not transposed", "lower/rewrite.py", "[(k, 1), (n, k)] if", "[(n, k), (k, 1)] if",
      "lower/rewrite"),
]  # fmt: skip


def pytest(tree, laws):
    """Run these law files in a copy of the tree; None if they pass, else the first test that failed."""
    named = (name if "/" in name else f"laws/{name}" for name in laws.split())
    files = [f"tests/{folder}/test_{name}.py" for folder, name in (path.split("/") for path in named)]
    env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}", "LAWS_PROFILE": "mutants", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", "--durations=0", *files]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode != 1 or not failed:
        raise RuntimeError(f"pytest did not run in {tree}: {done.stdout[-800:]}{done.stderr[-800:]}")
    return failed[1].removeprefix("tests/").removeprefix("laws/test_")


def copy_tree(folder):
    tree = Path(folder) / "tree"
    for name in ("qlab", "kernels", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def run(mutant):
    """(what killed it or None, seconds)."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = copy_tree(folder)
        file = mutant.path(tree)
        text = file.read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.name}: {mutant.old!r} occurs {text.count(mutant.old)} times"
        file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return pytest(tree, mutant.laws), time.perf_counter() - started


def main(words):
    console = Console(width=150)
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    for mutant in chosen:  # all of them, before anything runs
        count = mutant.path(ROOT).read_text(encoding="utf-8").count(mutant.old)
        assert count == 1, f"{mutant.name}: {mutant.old!r} occurs {count} times in {mutant.file}"
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree, laws = copy_tree(folder), " ".join(sorted({law for m in chosen for law in m.laws.split()}))
        where = subprocess.run([sys.executable, "-c", "import qlab; print(qlab.__file__)"], cwd=tree, text=True, check=True,
                               capture_output=True, env={**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}).stdout  # fmt: skip
        assert where.startswith(str(tree)), f"the copy is not what is imported, but {where}"
        assert (killer := pytest(tree, laws)) is None, f"the laws fail without a mutant: {killer}"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(run, chosen))
    table = Table("mutant", "in", "killed by", "s", title=f"{sum(bool(k) for k, _ in results)} of {len(chosen)} mutants killed")
    for mutant, (killer, seconds) in zip(chosen, results):
        table.add_row(mutant.name, mutant.file, killer or "[bold red]survived", f"{seconds:.0f}")
    console.print(table)
    return int(not all(killer for killer, _ in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
