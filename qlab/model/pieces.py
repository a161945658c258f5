"""The tensors of the files that hold a parameter: one, or one per expert and projection.

transformers' saving rules, run on the numbers of a fused weight's rows, say which rows of which
expert every file tensor holds.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from qlab.algebra.qtensor import Leaf, QTensor, by_rows
from qlab.algebra.spec import Spec
from qlab.errors import QlabError


@dataclass(frozen=True)
class Piece:
    """A tensor of the files: a whole leaf, or a part of one.

    Rows [start, stop) are of one expert of a fused leaf [e, o, k]. Without an expert they are rows
    of a leaf that transformers joins from several tensors; without rows the piece is a whole leaf.
    """

    name: str
    expert: int | None = None
    start: int = 0
    stop: int = 0

    @property
    def module(self) -> str:
        """The module that the tensor lies in, by its name in the files."""
        return self.name.rpartition(".")[0]

    def of(self, leaf: Leaf) -> Leaf:
        """The piece's part of the leaf."""
        if self.expert is None:
            if not self.stop or isinstance(leaf, QTensor):
                return leaf
            return leaf[self.start : self.stop]
        if isinstance(leaf, Tensor):
            return leaf[self.expert, self.start : self.stop]
        rows = leaf.spec.tile.rows or leaf.shape[-2]
        if rows < leaf.shape[-2] and (self.start % rows or self.stop % rows):
            raise QlabError(
                f"{self.module}: rows {self.start} to {self.stop} of the fused experts share "
                f"{leaf.spec} scales with their neighbours; choose groups or channels"
            )
        # a scale of all rows is each part's
        scaled = slice(self.start // rows, -(-self.stop // rows))
        return QTensor(
            codes=leaf.codes[self.expert, self.start : self.stop],
            scales=leaf.scales[self.expert, scaled],
            zeros=None if leaf.zeros is None else leaf.zeros[self.expert, scaled],
            spec=leaf.spec,
            outer=None if leaf.outer is None else leaf.outer[self.expert],
        )


def assemble(pieces: Sequence[Piece], parts: Iterable[Leaf]) -> Leaf:
    """The leaf of which these are the pieces: the inverse of Piece.of for groups and channels.

    parts: a leaf for each piece. Dense experts are asked for one by one, and let go of in their
    places.
    """
    if pieces[0].expert is None:
        whole = list(parts)
        if len(whole) == 1:
            return whole[0]
        return torch.cat([part for part in whole if isinstance(part, Tensor)])
    each = iter(parts)
    first = next(each)
    if isinstance(first, Tensor):
        rows = sum(piece.stop - piece.start for piece in pieces if piece.expert == 0)
        return _stack(pieces, chain([first], _dense(pieces, each)), rows)
    leaves = [first, *each]
    specs = {leaf.spec if isinstance(leaf, QTensor) else None for leaf in leaves}
    if len(specs) > 1:
        _refuse_mixed(pieces, specs)
    return _assemble_codes(pieces, [leaf for leaf in leaves if isinstance(leaf, QTensor)])


def _dense(pieces: Sequence[Piece], parts: Iterable[Leaf]) -> Iterator[Tensor]:
    """The parts, all of which are dense."""
    for part in parts:
        if isinstance(part, QTensor):
            _refuse_mixed(pieces, {None, part.spec})
        else:
            yield part


def _refuse_mixed(pieces: Sequence[Piece], specs: Collection[Spec | None]) -> None:
    raise QlabError(
        f"{pieces[0].module} and the others of its fused weight are stored as "
        f"{' and '.join(sorted(str(spec) for spec in specs))}; qlab reads experts of one spec"
    )


def _assemble_codes(pieces: Sequence[Piece], parts: Sequence[QTensor]) -> QTensor:
    """The fused leaf [e, o, k] whose projections have these codes."""
    if not _joinable([part for piece, part in zip(pieces, parts) if piece.expert == 0]):
        parts = [by_rows(part) for part in parts]
    spec = parts[0].spec
    if any(part.perm is not None for part in parts):
        raise QlabError(
            f"{pieces[0].module} is stored as {spec} with an order of channels that is its own; "
            "qlab reads experts whose channels are in the model's order"
        )
    return QTensor(
        codes=_stacked(pieces, [part.codes for part in parts]),
        scales=_stacked(pieces, [part.scales for part in parts]),
        zeros=None
        if spec.symmetric
        else _stacked(pieces, [part.zeros for part in parts if part.zeros is not None]),
        spec=spec,
        outer=_outers(pieces, parts),
    )


def _stacked(pieces: Sequence[Piece], parts: Sequence[Tensor]) -> Tensor:
    """Codes or scales [rows, ...] of every piece -> [e, rows, ...]."""
    of_first = sum(len(part) for piece, part in zip(pieces, parts) if piece.expert == 0)
    return _stack(pieces, parts, of_first)


def _joinable(parts: Sequence[QTensor]) -> bool:
    """Whether no scale would be for rows of two projections that lie above each other in one
    expert."""
    rows = parts[0].spec.tile.rows
    if rows is None:
        return False
    return len(parts) == 1 or all(part.shape[-2] % rows == 0 for part in parts)


def _outers(pieces: Sequence[Piece], parts: Sequence[QTensor]) -> Tensor | None:
    """The global scale of each expert [e, ...], which its projections share; None where the spec
    has none."""
    outers: dict[int, Tensor] = {}
    for piece, part in zip(pieces, parts):
        if part.outer is None:
            continue
        shared = outers.setdefault(piece.expert or 0, part.outer)
        if not torch.equal(shared, part.outer):
            raise QlabError(
                f"{piece.module} has a global scale of its own; qlab reads projections of one "
                "fused weight that share it"
            )
    return torch.stack([outers[expert] for expert in range(len(outers))]) if outers else None


def _stack(pieces: Sequence[Piece], parts: Iterable[Tensor], rows: int) -> Tensor:
    """[rows of a part, k] of every piece -> [e, rows, k], each put in its place before the next one
    is asked for."""
    experts = 1 + max(piece.expert or 0 for piece in pieces)
    stacked: Tensor | None = None
    filled = [0] * experts
    for piece, part in zip(pieces, parts):
        if stacked is None:
            stacked = part.new_empty(experts, rows, part.shape[-1])
        expert = piece.expert or 0
        stacked[expert, filled[expert] : filled[expert] + len(part)] = part
        filled[expert] += len(part)
    assert stacked is not None
    return stacked


def pieces_of_experts(
    model: PreTrainedModel, name: str, stored: Collection[str]
) -> tuple[Piece, ...]:
    """The tensors that engines expect for a fused weight [e, o, k], in the order of experts and
    rows; () if transformers knows no names for parts of it.

    stored: the names in the files. The pieces are spelled with or without the base prefix, as these
    are.
    """
    experts, rows = model.get_parameter(name).shape[:2]
    # the number of each row; on the CPU also where models are being built on meta
    numbers = torch.arange(experts * rows, device="cpu")
    # two columns: transformers 5.17 drops an axis of one
    numbered = numbers.view(experts, rows, 1).repeat(1, 1, 2)
    saved = revert_weight_conversion(model, {name: numbered})
    if len(saved) == 1 and torch.equal(next(iter(saved.values())), numbered):
        return ()  # it is saved whole, under this name or another
    pieces = []
    for saved_name, part in saved.items():
        first, last = int(part.flatten()[0]), int(part.flatten()[-1])
        expected = numbers[first : last + 1, None].repeat(1, 2)
        if not torch.equal(part.reshape(-1, 2), expected):
            raise QlabError(
                f"{name} is saved as {saved_name} in a way that is no range of its rows; qlab "
                "cannot cut it"
            )
        spelled = _spelled(saved_name, model.base_model_prefix, stored)
        expert, start = divmod(first, rows)
        if rows > 1 and expert == last // rows:
            pieces.append(Piece(spelled, expert, start, last % rows + 1))
        else:
            pieces.append(Piece(spelled, None, expert, last // rows + 1))
    return tuple(sorted(pieces, key=lambda p: (p.expert or 0, p.start)))


def _spelled(name: str, prefix: str, stored: Collection[str]) -> str:
    bare = name.removeprefix(f"{prefix}.")
    return bare if name not in stored and bare in stored else name


def saved_name(model: PreTrainedModel, name: str) -> str:
    """How transformers calls a parameter of at most two axes when it saves it."""
    [saved] = revert_weight_conversion(model, {name: model.get_parameter(name)})
    return saved
