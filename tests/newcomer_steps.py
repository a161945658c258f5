"""Three more methods as a newcomer writes them from docs/writing_methods.md: better codes, a metric
of the solver, and a bound at run time."""

import torch

import qlab
from qlab.methods.stages import Metric


def diffused(spec):
    """Sigma-delta rounding: what a weight loses is added to its right neighbour before that is
    rounded, so that sums of neighbours stay."""

    def fn(weight):
        x, lost = weight.cell.leaf.at(weight.cell.target), 0.0
        for k in range(x.shape[1]):
            wanted = x[:, k] + lost
            x[:, k] = wanted.round()
            lost = (wanted - x[:, k]) / 2
        return weight.cell.put(weight.cell.leaf.with_codes(x))

    return qlab.chain(qlab.rtn(spec), qlab.each_cell("diffused", fn))


def by_direction(spec):
    """The solver by a second moment to which every token gives its direction alone, whatever its
    length."""

    def lift(seen):
        x_nk = torch.nn.functional.normalize(seen.x_nk.float(), dim=1)
        return x_nk.T @ x_nk, len(x_nk)

    def combine(a, b):
        return a[0] + b[0], a[1] + b[1]

    def metric(stats):
        H_kk, tokens = stats["directions"]
        return H_kk / tokens

    nothing = lambda k: (torch.eye(k), 1)
    directions = qlab.Stat(lift, combine, nothing=nothing, name="directions")
    return qlab.solver(spec, metric=Metric("direction", frozenset({directions}), metric))


def capped(spec):
    """No channel of what enters an MLP's last weight is more than 6 times its token's size."""

    def make(wire, stats):
        def cap(x):
            most = 6 * x.square().mean(-1, keepdim=True).sqrt()
            return x.clamp(-most, most)

        return cap

    pattern = "re:.*(down_proj|c_proj|fc2|dense_4h_to_h):in"
    return qlab.chain(qlab.rtn(spec), qlab.insert("capped", pattern, make))


# what formats hold no place for -> how the refusal names it
UNHELD = {"capped": "run-time"}
NEWCOMER_STEPS = {"diffused": diffused, "by_direction": by_direction, "capped": capped}
