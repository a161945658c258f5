"""The part of each weight that one of several ranks holds, cut before it is packed.

    colwise: W_r = W[rows of r], b_r = b[rows of r]      rowwise: W_r = W[:, columns of r], b_0 = b
    rowwise where inputs are rounded at run time: as colwise (`Style.whole`)

Cuts lie between the tiles of a weight, so that every scale stays with the codes that it is for.
Where the channels of a group lie anywhere (`QTensor.perm`), a rank has some of every group:

    x_r @ W_r.T = x_r[:, order] @ V.T     V: group after group the columns of W_r, filled up with 0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlab.algebra.qtensor import Leaf, QTensor, by_rows
from qlab.algebra.tile import Tile
from qlab.model.parallel import Style, limits, mixed_inputs, parts_of, refuse_degree, styles_of
from qlab.model.skeleton import Skeleton

Spans = Sequence[tuple[int, int]]
FULL = 32  # channels of the least group that kernels multiply


@dataclass(frozen=True, eq=False)
class Share:
    """What a rank holds of a model.

    skeleton: the model that is filled with parts. styles: how its weights are cut (`styles_of`).
    sizes: what `parts_of` says of those that are, while all of them are whole. mixed: the linears
    of a part of the channels whose input is turned over all of them (`mixed_inputs`). rank, world:
    which of how many.
    """

    skeleton: Skeleton
    styles: Mapping[str, Style]
    sizes: Mapping[str, tuple[int, int]]
    mixed: frozenset[str]
    rank: int
    world: int

    def spans(self, name: str, rank: int | None = None) -> Spans:
        """Where the parts of a rank, by default this one, lie along the axis of a weight that is
        cut: one, or one in each of those that are packed in it."""
        style = self.styles[name]
        size, unit = self.sizes[name]
        units, r = -(-size // unit), self.rank if rank is None else rank
        start, stop = (min(size, unit * (units * i // self.world)) for i in (r, r + 1))
        return [(size * i + start, size * i + stop) for i in range(style.packed)]

    def width(self, name: str, rank: int) -> int:
        """How many channels of a weight a rank has along the axis that is cut."""
        return sum(stop - start for start, stop in self.spans(name, rank))

    def divides(self, attention: str) -> bool:
        """Whether the heads of an attention are divided, so that a rank has those of its parts."""
        inside = f"{attention}."
        return any(s.is_open and name.startswith(inside) for name, s in self.styles.items())

    def of_weight(self, name: str, leaf: Leaf) -> tuple[Leaf, Tensor | None]:
        """The part of the weight of a module, or of a fused weight of experts, and which channel of
        its input each column takes, None where that is the order of both."""
        style = self.styles.get(name)
        if style is None or style.axis is None:
            return leaf, None
        spans = self.spans(name)
        if isinstance(leaf, QTensor):
            if style.axis == "k" and leaf.perm is not None:
                return of_channels(leaf, leaf.perm, spans)
            return of_tiles(leaf, style.axis, spans), None
        owner = self.skeleton.model.get_submodule(name.rpartition(".")[0])
        turned = leaf.ndim == 3 and getattr(owner, "is_transposed", False)
        return _along(leaf, -2 if (style.axis == "o") != turned else -1, spans), None

    def of_bias(self, name: str, bias: Tensor) -> Tensor:
        """The part of the bias of a module: of summands, one rank has all of it."""
        style = self.styles.get(name)
        if style is None or style.axis is None:
            return bias
        if style.axis == "o":
            return _along(bias, -1, self.spans(name))
        return torch.zeros_like(bias) if self.rank else bias

    def of_parameter(self, name: str, value: Tensor) -> Tensor:
        """The part of a dense parameter."""
        module, _, key = name.rpartition(".")
        if key == "bias":
            return self.of_bias(module, value)
        part, _ = self.of_weight(module if key == "weight" else name, value)
        assert isinstance(part, Tensor)
        return part

    @torch.no_grad()
    def cut_outside(self) -> None:
        """Cut what is loaded of the parameters outside of the blocks. Those that were one and are
        cut alike stay one."""
        model, blocks = self.skeleton.model, tuple(f"{path}." for path in self.skeleton.blocks)
        parts: dict[tuple[nn.Parameter, str], nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            owner, _, key = name.rpartition(".")
            if name.startswith(blocks) or owner not in self.styles:
                continue
            alike = (parameter, f"{self.spans(owner)}" if self.styles[owner].axis else "")
            if alike not in parts:
                part = self.of_parameter(name, parameter)
                parts[alike] = nn.Parameter(part, requires_grad=False)
            model.get_submodule(owner)._parameters[key] = parts[alike]


def shared(skeleton: Skeleton, rank: int, world: int, rounds: bool) -> Share:
    """The share of a rank. Refuses a number of ranks that is not legal, before a weight is loaded.
    rounds: as `styles_of` takes it."""
    styles = styles_of(skeleton, rounds)
    refuse_degree(limits(skeleton, styles), world)
    cut = {name: style for name, style in styles.items() if style.axis is not None}
    sizes = {name: parts_of(skeleton, name, style) for name, style in cut.items()}
    mixed = mixed_inputs(skeleton, cut, world)
    return Share(skeleton, styles, sizes, mixed, rank, world)


def of_channels(leaf: QTensor, perm: Tensor, spans: Spans) -> tuple[QTensor, Tensor]:
    """Some input channels of a weight [o, k] whose groups have channels of an order of their own.

    Args:
        perm: that of the leaf.
        spans: where the channels lie in the input.

    Returns:
        The columns of these channels, group after group, in groups of at most `FULL` that repeat
        the scale of theirs. The last ones of each are filled up with weights of 0. And int64 [k'],
        the channel among those of the spans that each column takes.
    """
    leaf, k = by_rows(leaf), leaf.shape[-1]
    cols = leaf.spec.tile.cols or k
    size = min(cols, FULL)
    every_k = torch.arange(k, dtype=torch.int64)
    mine = torch.cat([every_k[start:stop] for start, stop in spans])
    place_k = torch.full_like(every_k, -1).index_copy(0, mine, every_k[: len(mine)])[perm.cpu()]
    columns, groups = [], []
    for group, places in enumerate(place_k.split(cols)):
        own = cols * group + (places >= 0).nonzero()[:, 0]
        columns.append(torch.nn.functional.pad(own, (0, -len(own) % size), value=-1))
        groups += [group] * (len(columns[-1]) // size)
    column_j, group_g = torch.cat(columns), torch.tensor(groups, dtype=torch.int64)
    is_filled, column_j = column_j < 0, column_j.clamp_min(0)
    zeros = None if leaf.zeros is None else leaf.zeros[:, group_g]
    empty = torch.zeros((), dtype=torch.int8) if zeros is None else zeros.repeat_interleave(size, 1)
    codes = leaf.codes[:, column_j]
    part = QTensor(
        codes=torch.where(is_filled, empty.to(codes.dtype), codes),
        scales=leaf.scales[:, group_g],
        zeros=zeros,
        spec=replace(leaf.spec, tile=Tile(1, size)),
        outer=leaf.outer,
    )
    return part, place_k[column_j].clamp_min(0)


def of_tiles(leaf: QTensor, axis: str, spans: Spans) -> QTensor:
    """The part of a quantized weight [..., o, k]."""
    tile = leaf.spec.tile
    dim, unit = (-2, tile.rows) if axis == "o" else (-1, tile.cols)

    def scaled(t: Tensor | None) -> Tensor | None:
        if t is None or unit is None:  # one scale for all of them
            return t
        return _along(t, dim, [(start // unit, -(-stop // unit)) for start, stop in spans])

    scales = scaled(leaf.scales)
    assert scales is not None
    return replace(
        leaf, codes=_along(leaf.codes, dim, spans), scales=scales, zeros=scaled(leaf.zeros)
    )


def _along(t: Tensor, dim: int, spans: Spans) -> Tensor:
    """The spans of an axis, one behind the other, in memory of their own."""
    return torch.cat([t.narrow(dim, start, stop - start) for start, stop in spans], dim)
