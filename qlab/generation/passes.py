"""A forward pass of an engine as a value, which any process that holds the model can run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlab.generation.compiled import Bucket
from qlab.generation.pages import NOBODY
from qlab.generation.request import Request


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass as values. ids_bq: the tokens of b rows. table_bp: the pages of every row, in
    order; shorter rows end in page 0. start_b: how many tokens of a row have keys and values.
    shift_b: by how much positions differ from counts of tokens. keep: of how many last tokens
    logits are wanted, 0 for all. inputs: what else the model takes."""

    ids_bq: Tensor
    table_bp: Tensor
    start_b: Tensor
    shift_b: Tensor
    keep: int
    inputs: Mapping[str, Tensor]


def pass_over(
    requests: Sequence[Request],
    ids_bq: Tensor,
    keep: int,
    inputs: Mapping[str, Tensor],
    bucket: Bucket | None = None,
) -> Pass:
    """The pass over the next tokens of requests. bucket: what runs it, which is filled up with rows
    of nobody, and whose graphs read more than one slot."""
    empty, least = (0, 1) if bucket is None else (bucket.shape.rows - len(requests), 2)
    width = max(least, *(len(request.pages) for request in requests))
    table = [r.pages + [NOBODY] * (width - len(r.pages)) for r in requests]
    done, shift = [r.done for r in requests], [r.shift for r in requests]
    return Pass(
        ids_bq=F.pad(ids_bq, (0, 0, 0, empty)),
        table_bp=torch.tensor(table + [[NOBODY] * width] * empty, dtype=torch.int64),
        start_b=torch.tensor(done + [0] * empty, dtype=torch.int64),
        shift_b=torch.tensor(shift + [0] * empty, dtype=torch.int64),
        keep=keep,
        inputs=inputs,
    )
