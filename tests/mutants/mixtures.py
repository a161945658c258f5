"""Mixtures of experts: rows that are routed, and experts of their own."""

from mutants.planting import Mutant

MUTANTS = [
    Mutant(
        "mixture: one statistic for all experts",
        "algebra/statistic.py",
        "_by_expert",
        "Observation(o.x_nk[rows], o.keys[rows], None, other[rows], "
        "of_rows(o.received_n, rows), of_rows(o.stream_no, rows), o.segment)",
        "Observation(o.x_nk, o.keys, None, other, o.received_n, o.stream_no, o.segment)",
        "experts stats",
    ),
    Mutant(
        "mixture: no data means no weight",
        "algebra/stats.py",
        "Moment.mean_kk",
        "return torch.eye(len(self.sum_kk), dtype=self.sum_kk.dtype, device=self.sum_kk.device)",
        "return 0 * torch.eye(len(self.sum_kk), dtype=self.sum_kk.dtype, "
        "device=self.sum_kk.device)",
        "stats experts",
    ),
    Mutant(
        "mixture: routers are rounded",
        "algebra/transform.py",
        "Stage.touches",
        "site.outside == self.scope.outside and name in self.scope "
        "and (not (site.router and rounds))",
        "site.outside == self.scope.outside and name in self.scope",
        "graph",
    ),
    Mutant(
        "mixture: everywhere is nowhere",
        "algebra/interpret.py",
        "_ending_at",
        "if calibrate_all_experts and node.target is torch.ops.qlab.route.default: ...",
        "if False and node.target is torch.ops.qlab.route.default: ...",
        "experts",
    ),
    Mutant(
        "mixture: pairs are not tokens",
        "algebra/experts.py",
        "route",
        "pairs // chosen_nt.shape[1]",
        "pairs % chosen_nt.shape[0]",
        "experts",
    ),
    Mutant(
        "mixture: every expert reads the first",
        "algebra/leaf.py",
        "of_expert",
        "pytree.tree_map_only(Tensor, lambda t: t[expert], leaf)",
        "pytree.tree_map_only(Tensor, lambda t: t[0], leaf)",
        "graph",
    ),
    Mutant(
        "mixture: a gather leaks",
        "algebra/channels.py",
        "_gathered",
        "rows is None or len(n.args[1]) != 1",
        "True",
        "absorb",
    ),
    Mutant(
        "mixture: an origin moves without its statistics",
        "algebra/reparametrize.py",
        "reparametrize",
        "for source in by_source(sharing): ...",
        "for source in list(by_source(sharing))[:1]: ...",
        "transform",
    ),
    Mutant(
        "mixture: parts in another order",
        "model/pieces.py",
        "pieces_of_experts",
        "sorted(pieces, key=lambda p: (p.expert or 0, p.start))",
        "reversed(pieces)",
        "model/names",
    ),
    Mutant(
        "mixture: a gauge sees the statistics of the first expert",
        "algebra/gauge.py",
        "Turn._sources",
        "state.states[e]",
        "state.states[0]",
        "gauge",
    ),
    Mutant(
        "mixture: losses of experts weigh alike",
        "algebra/measured.py",
        "errors_in_notes",
        "tokens / max(notes['tokens'], 1)",
        "1 / len(counts)",
        "experts",
    ),
]
