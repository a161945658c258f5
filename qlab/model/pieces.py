"""The tensors of the files that hold a parameter: one, or one per expert and projection.

transformers' saving rules, run on the numbers of a fused weight's rows, say which rows of which
expert every file tensor holds.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlab.algebra.qtensor import Leaf, QTensor, by_rows
from qlab.errors import QlabError


@dataclass(frozen=True)
class Piece:
    """A tensor of the files: a whole leaf, rows [start, stop) of one expert of a fused leaf [e, o,
    k], or, where it is of no expert and has rows, those of a leaf that transformers joins from
    several."""

    name: str
    expert: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    def of(self, leaf: Leaf) -> Leaf:
        """The piece's part of the leaf."""
        if self.expert is None:
            return leaf[self.start : self.stop] if self.stop and isinstance(leaf, Tensor) else leaf
        if isinstance(leaf, Tensor):
            return leaf[self.expert, self.start : self.stop]
        rows = leaf.spec.tile.rows or leaf.shape[-2]
        scaled = slice(
            self.start // rows, -(-self.stop // rows)
        )  # a scale of all rows is each part's
        if rows < leaf.shape[-2] and (self.start % rows or self.stop % rows):
            raise QlabError(
                f"{self.module}: rows {self.start} to {self.stop} of the fused experts share "
                f"{leaf.spec} scales with their neighbours; choose groups or channels"
            )
        return QTensor(
            leaf.codes[self.expert, self.start : self.stop],
            leaf.scales[self.expert, scaled],
            None if leaf.zeros is None else leaf.zeros[self.expert, scaled],
            leaf.spec,
            None if leaf.outer is None else leaf.outer[self.expert],
        )


def assemble(pieces: Sequence[Piece], parts: Sequence[Leaf]) -> Leaf:
    """The leaf whose pieces these are: the inverse of Piece.of for groups and channels."""
    if pieces[0].expert is None:
        return (
            parts[0]
            if len(parts) == 1
            else torch.cat([part for part in parts if isinstance(part, Tensor)])
        )
    specs = {part.spec if isinstance(part, QTensor) else None for part in parts}
    if len(specs) > 1:
        raise QlabError(
            f"{pieces[0].module} and the others of its fused weight are stored as "
            f"{' and '.join(sorted(str(spec) for spec in specs))}; qlab reads experts of one spec"
        )
    experts = 1 + max(p.expert or 0 for p in pieces)
    if isinstance(parts[0], Tensor):
        return _stack(experts, pieces, [p for p in parts if isinstance(p, Tensor)])
    quantized = [p for p in parts if isinstance(p, QTensor)]
    if not _joinable([part for piece, part in zip(pieces, quantized) if piece.expert == 0]):
        quantized = [by_rows(part) for part in quantized]
    spec = quantized[0].spec
    if any(p.perm is not None for p in quantized):
        raise QlabError(
            f"{pieces[0].module} is stored as {spec} with an order of channels that is its own; "
            "qlab reads experts whose channels are in the model's order"
        )
    outers: dict[int, Tensor] = {}
    for piece, part in zip(pieces, quantized):
        if part.outer is not None and not torch.equal(
            outers.setdefault(piece.expert or 0, part.outer), part.outer
        ):
            raise QlabError(
                f"{piece.module} has a global scale of its own; qlab reads projections of one "
                "fused weight that share it"
            )
    return QTensor(
        _stack(experts, pieces, [p.codes for p in quantized]),
        _stack(experts, pieces, [p.scales for p in quantized]),
        None
        if spec.symmetric
        else _stack(experts, pieces, [p.zeros for p in quantized if p.zeros is not None]),
        spec,
        torch.stack([outers[e] for e in range(experts)]) if outers else None,
    )


def _joinable(parts: Sequence[QTensor]) -> bool:
    """Whether no scale would be for rows of two projections that lie above each other in one
    expert."""
    rows = parts[0].spec.tile.rows
    return rows is not None and (
        len(parts) == 1 or all(part.shape[-2] % rows == 0 for part in parts)
    )


def _stack(experts: int, pieces: Sequence[Piece], parts: Sequence[Tensor]) -> Tensor:
    """[rows, k] of every piece -> [e, rows, k], filled in place so that no second copy is held."""
    own = [part for piece, part in zip(pieces, parts) if piece.expert == 0]
    out = own[0].new_empty(experts, sum(map(len, own)), own[0].shape[-1])
    at = [0] * experts
    for piece, part in zip(pieces, parts):
        e = piece.expert or 0
        out[e, at[e] : at[e] + len(part)] = part
        at[e] += len(part)
    return out


def pieces_of_experts(
    model: PreTrainedModel, name: str, stored: Collection[str]
) -> tuple[Piece, ...]:
    """The tensors that engines expect for a fused weight [e, o, k], in the order of experts and
    rows; () if transformers knows no names for parts of it. Names are spelled with or without the
    base prefix, as the stored ones are."""
    experts, rows = model.get_parameter(name).shape[:2]
    numbers = torch.arange(
        experts * rows, device="cpu"
    )  # also where models are being built on meta
    two = numbers.view(experts, rows, 1).repeat(1, 1, 2)  # transformers 5.17 drops an axis of one
    cut = revert_weight_conversion(model, {name: two})
    if len(cut) == 1 and all(
        torch.equal(held, two) for held in cut.values()
    ):  # one tensor, of this name or another
        return ()
    pieces = []
    for piece, held in cut.items():
        first, last = int(held.flatten()[0]), int(held.flatten()[-1])
        if not torch.equal(held.reshape(-1, 2), numbers[first : last + 1, None].repeat(1, 2)):
            raise QlabError(
                f"{name} is saved as {piece} in a way that is no range of its rows; qlab cannot "
                "cut it"
            )
        spelled, inside = (
            _spelled(piece, model.base_model_prefix, stored),
            rows > 1 and first // rows == last // rows,
        )
        pieces.append(
            Piece(spelled, first // rows, first % rows, last % rows + 1)
            if inside
            else Piece(spelled, None, first // rows, last // rows + 1)
        )
    return tuple(sorted(pieces, key=lambda p: (p.expert or 0, p.start)))


def _spelled(name: str, prefix: str, stored: Collection[str]) -> str:
    bare = name.removeprefix(f"{prefix}.")
    return bare if name not in stored and bare in stored else name
