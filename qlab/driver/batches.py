"""What goes through the blocks of a model, batch by batch: what each block is called with, and the
states between them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.interpret import outputs_of
from qlab.algebra.transform import Transform
from qlab.algebra.views import WholeBlock
from qlab.data.calibration import Data
from qlab.model.calls import Call, State
from qlab.model.running import record_blocks
from qlab.model.skeleton import Skeleton

BATCH_TOKENS = 2048
Batch = tuple[
    Call, State
]  # what a block is called with, and what other blocks made of it: its hidden states first
Batches = Callable[[], Iterator[Batch]]


def batch_tokens(recipes: Iterable[Transform]) -> int:
    """About how many tokens a batch has: those of one window where a step sees a whole block, which
    draws its samples by window."""
    learns = any(isinstance(stage.view, WholeBlock) for recipe in recipes for stage in recipe)
    return 1 if learns else BATCH_TOKENS


def sharing_a_pass(recipes: Mapping[str, Transform], inputs: str) -> list[list[str]]:
    """The names of recipes whose jobs share a pass: with inputs="reference" all whose batches are
    alike, else each alone."""
    groups: dict[object, list[str]] = {}
    for name, recipe in recipes.items():
        alone = None if inputs == "reference" else name
        groups.setdefault((alone, batch_tokens([recipe])), []).append(name)
    return list(groups.values())


def in_batches(data: Data | None, batch_tokens: int = BATCH_TOKENS) -> list[Mapping[str, Tensor]]:
    """What the model is called with, about `batch_tokens` tokens at a time; without data, a few
    tokens that show the form."""
    return (
        data.batches(batch_tokens)
        if data is not None
        else [{"input_ids": torch.zeros(2, 8, dtype=torch.long)}]
    )


def record(
    skeleton: Skeleton, batches: Sequence[Mapping[str, Tensor]]
) -> tuple[list[State], list[dict[str, Call]]]:
    """The state that enters the first block, which is hidden states alone, and every block's calls,
    for each batch.

    Calls of later batches share the tensors that equal those of the first one (rotary tables,
    masks).
    """
    states: list[State] = []
    calls: list[dict[str, Call]] = []
    for batch in batches:
        h, call = record_blocks(
            skeleton,
            batch["input_ids"],
            {name: t for name, t in batch.items() if name != "input_ids"},
        )
        states.append((h,))
        calls.append(
            {path: _shared(c, calls[0][path] if calls else None) for path, c in call.items()}
        )
    return states, calls


def _shared(call: Call, earlier: Call | None) -> Call:
    if earlier is None or len(earlier.leaves) != len(call.leaves):
        return call
    leaves = tuple(
        old
        if isinstance(new, Tensor)
        and isinstance(old, Tensor)
        and new.shape == old.shape
        and torch.equal(new, old)
        else new
        for new, old in zip(call.leaves, earlier.leaves)
    )
    return replace(call, leaves=leaves)


def push(graph: ModuleGraph, batches: Iterator[Batch]) -> Iterator[State]:
    """The states that leave the segment, batch by batch."""
    for call, state in batches:
        yield call.leaving(state, outputs_of(graph, *call.inputs(state)))
