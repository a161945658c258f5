"""How far leaves are from their weights, as the report of a step says it.

Legend: W_ok a weight in fp32, D_ok = W' - W the error of the leaf W', H the mean second moment of
the input.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.compiled import kernels
from qlab.algebra.leaf import Structured, dense, proper
from qlab.algebra.qtensor import QTensor, largest_step
from qlab.algebra.stats import Moment
from qlab.errors import QlabError, warn

DIVERGED = "diverged_at_step"  # the note of learning that left the finite numbers

# Entries of the report that are measured, so that no step may note them.
MEASURED = {
    "spec",
    "shape",
    "bits_per_weight",
    "inputs",
    "weight_error",
    "largest_step",
    "zeros",
    "tokens",
    "loss",
    "expert_tokens",
    "experts_with_few_tokens",
}


# Numbers of a weight that are worked on at once in fp32, so few that each part takes the memory of
# the part before: fresh memory costs more than the arithmetic. By a second moment, which every part
# reads whole, many are.
AT_ONCE, AT_ONCE_BY_H = 1 << 20, 1 << 24


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far a leaf W' is from its weight W: |D| = |W' - W|, |W|, and the largest error in steps.

    Where the second moment H was observed also tr(D H D^T), tr(W H W^T), the tokens that H was
    observed on (None without H), and its channels.
    """

    D: float
    W: float
    steps: float = 0.0
    D_H: float = 0.0
    W_H: float = 0.0
    tokens: int | None = None
    channels: int = 0


def errors_of(W_ok: Tensor, leaf: Tensor | Structured, moment: Moment | None) -> Errors:
    """The errors of a leaf; moment: the second moment of the input, or None. A weight of many
    numbers is measured in parts of its rows."""
    if not isinstance(leaf, QTensor):
        return _errors_of(W_ok.float(), leaf, moment)
    compiled = _errors_by_kernel(W_ok, leaf) if moment is None else None
    if compiled is not None:
        return compiled
    count = AT_ONCE if moment is None else AT_ONCE_BY_H
    parts = [
        _errors_of(W_ok[rows].float(), leaf.rows(rows, tiles), moment)
        for rows, tiles in leaf.spec.tile.parts(leaf.shape, count)
    ]
    return joined_errors(parts)


def _errors_by_kernel(W_ok: Tensor, leaf: QTensor) -> Errors | None:
    """The errors of a leaf in groups of a row by the compiled kernel, where it is worth loading and
    takes it; the same as `_errors_of` gives."""
    compiled, codes, spec = kernels(), leaf.codes, leaf.spec
    if compiled is None or spec.tile.rows != 1 or leaf.perm is not None or not codes.numel():
        return None
    is_whole = codes.ndim == 2 and codes.shape[1] % spec.tile.sizes(codes.shape)[1] == 0
    if not is_whole or not compiled.takes(W_ok) or W_ok.shape != codes.shape:
        return None
    if not compiled.measures(codes, leaf.scales, leaf.zeros):
        return None
    sums = compiled.measure(W_ok, codes, leaf.scales, leaf.zeros, rows_at_once(W_ok))
    return None if sums is None else errors_of_sums(sums)


def rows_at_once(W_ok: Tensor) -> int:
    """The rows of a part of a weight that is worked on in parts of AT_ONCE numbers."""
    return max(1, AT_ONCE // W_ok.shape[1])


def errors_of_sums(sums: Tensor) -> Errors:
    """The errors of a weight of which a kernel summed the squares of D, those of W, and found the
    largest step: fp64 [parts, 3]."""
    D, W = sums[:, :2].sqrt().float().T.tolist()
    steps = sums[:, 2].tolist()
    return joined_errors([Errors(D=d, W=w, steps=s) for d, w, s in zip(D, W, steps)])


def joined_errors(parts: Sequence[Errors]) -> Errors:
    """The errors of a weight whose rows were measured in parts."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        D=math.hypot(*(part.D for part in parts)),
        W=math.hypot(*(part.W for part in parts)),
        steps=max(part.steps for part in parts),
        D_H=sum(part.D_H for part in parts),
        W_H=sum(part.W_H for part in parts),
    )


def _errors_of(W_ok: Tensor, leaf: Tensor | Structured, moment: Moment | None) -> Errors:
    D_ok = dense(leaf, torch.float32) - W_ok
    steps = 0.0
    codes = proper(leaf)
    if isinstance(codes, QTensor) and codes.perm is None:
        steps = largest_step(codes, D_ok)
    errors = Errors(D=_norm(D_ok), W=_norm(W_ok), steps=steps)
    if moment is None:
        return errors
    return replace(
        errors,
        D_H=moment.output_error(D_ok),
        W_H=moment.output_error(W_ok),
        tokens=moment.tokens,
        channels=len(moment.sum_kk),
    )


def _norm(x_ok: Tensor) -> float:
    """|x| in fp32, of squares that are summed in fp64: so it does not depend on their order."""
    return float(torch.linalg.vector_norm(x_ok, dtype=torch.float64).float())


def errors_in_notes(parts: Sequence[Errors]) -> dict[str, Any]:
    """What the report says of a site's errors. parts: one per expert, or one in all. Losses of
    experts are weighted by their tokens."""
    error = math.hypot(*(part.D for part in parts))
    size = math.hypot(*(part.W for part in parts))
    notes: dict[str, Any] = {
        "weight_error": error / max(size, 1e-30),
        "largest_step": max(part.steps for part in parts),
    }
    counts = [part.tokens for part in parts if part.tokens is not None]
    if not counts:
        return notes
    notes["tokens"] = sum(counts)
    shares = [tokens / max(notes["tokens"], 1) for tokens in counts]
    D_H = sum(part.D_H * share for part, share in zip(parts, shares))
    W_H = sum(part.W_H * share for part, share in zip(parts, shares))
    notes["loss"] = D_H / max(W_H, 1e-30)
    if len(parts) > 1:
        notes["expert_tokens"] = counts
        # With fewer tokens than input channels, an expert's second moment is singular.
        notes["experts_with_few_tokens"] = [
            e
            for e, part in enumerate(parts)
            if part.tokens is not None and part.tokens < part.channels
        ]
    return notes


def noted_by_step(step: str, notes: Mapping[str, Any]) -> dict[str, Any]:
    """What a step notes, as JSON holds it. step: its name, and where it stands, for errors."""
    try:
        note = json.loads(json.dumps(dict(notes), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QlabError(
            f"{step} notes what no report holds ({error}); note numbers and texts"
        ) from error
    taken = sorted(MEASURED & note.keys())
    if taken:
        raise QlabError(
            f"{step} notes {taken[0]!r}, which is measured and not said by a step; choose another "
            "name"
        )
    return note


def merged(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a step notes of the experts of a site: one value where all agree, otherwise a list."""
    lists = {key: [note[key] for note in notes] for key in notes[0]}
    return {
        key: values[0] if all(value == values[0] for value in values) else values
        for key, values in lists.items()
    }


def warn_of_divergence(step: str, notes: Mapping[str, Any]) -> None:
    """Warn of learning that left the finite numbers, of which the notes say when."""
    if DIVERGED in notes:
        warn(
            f"{step} diverged at step {notes[DIVERGED]}, and the best that it saw before is kept; "
            "lower its rate, or take fewer steps"
        )
