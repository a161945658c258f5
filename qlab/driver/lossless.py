"""Whether a step that claims to keep the function keeps it: one batch, before and after it.

Both are computed in float32 throughout, whatever dtype the model runs in, so that its rounding
hides no change. What a step folds is rounded to the dtype of the files, which is what may differ.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import NARROW, outputs_of
from qlab.algebra.transform import Stage
from qlab.errors import QlabError
from qlab.model.calls import Call, State

EXACT = 1e-4  # of what the block adds to a token
ROUNDED = 2  # times the precision of the files' dtype: what rounding folded leaves to it may cost
RESIDUAL = 1e-2  # of the token itself: what a block that adds next to nothing is measured against
MOST = 0.99  # of all tokens: rounding sends few to another expert


def refuse_changed(
    stage: Stage,
    before: ModuleGraph,
    after: ModuleGraph,
    call: Call,
    batches: Callable[[], Iterator[tuple[Call, State]]],
) -> None:
    """Refuse a stage that changed what the block computes of the first batch, and claims not to.

    call: what the block is called with where there are no batches, with random numbers then.
    """
    same = all(leaf is before.params[name] for name, leaf in after.params.items())
    if not stage.view.keeps_function or (same and after.inserts == before.inserts):
        return
    call, state = next(batches(), None) or (call, _random_like(call.entering, before))
    state = tuple(t.float() if t.dtype in NARROW else t for t in state)
    old, new = (
        call.leaving(state, outputs_of(graph, *call.inputs(state), wide=True))
        for graph in (before, after)
    )
    change = max(_change(old[0], new[0], state[0]), *(_change(a, b) for a, b in zip(old, new)))
    limit = max(EXACT, ROUNDED * torch.finfo(before.dtype).eps)
    if change > limit:
        raise QlabError(
            f"the stage {stage.name!r} changes what {before.path} computes by "
            f"{change:.1e} (up to {limit:.1e} is rounding), and claims to keep it; "
            "move inputs and weights by inverses of each other, or drop the claim"
        )


def _random_like(entering: State, graph: ModuleGraph) -> State:
    leaves = pytree.tree_leaves(dict(graph.params))
    device = next((t.device for t in leaves if isinstance(t, Tensor)), torch.device("cpu"))
    made = []
    for t in entering:
        drawn = torch.randn(
            t.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
        )
        number = drawn if t.is_floating_point() else torch.zeros(t.shape, dtype=t.dtype)
        made.append(number.to(device))
    return tuple(made)


def _change(old: Tensor, new: Tensor, entering: Tensor | None = None) -> float:
    """|new - old| of most rows as a share of |old|; of hidden states, of what the block adds."""
    if not old.is_floating_point() or old is new:
        return 0.0
    size = old.norm(dim=-1)
    if entering is not None:
        size = torch.maximum((old - entering).norm(dim=-1), RESIDUAL * entering.norm(dim=-1))
    change = ((new - old).norm(dim=-1) / size.clamp_min(1e-30)).flatten()
    change = change[old.norm(dim=-1).flatten().isfinite()].nan_to_num(nan=math.inf)
    rank = math.ceil(MOST * len(change))
    return float(change.kthvalue(rank).values) if rank else 0.0
