"""What a program does with the residual stream, as far as another basis of it is concerned.

h -> h R enters and leaves if the program adds to the stream, scales whole rows of it, norms it by
the size of its rows (after their mean, where R keeps that), and else only multiplies it by weights.
Rows of tables that the stream begins with turn like outputs of weights. Everything is read off the
program, and what it does else is named.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qlab.algebra.folds import vector
from qlab.algebra.graph import (
    LAYOUT,
    SAME_VALUES,
    WEIGHT_OPS,
    Code,
    Site,
    aten,
    behind_casts,
)

SUMS = frozenset({aten.sum.dim_IntList, aten.mean.dim})
# Operations that hand on whole rows where their last axis stays as it is.
MOVES = SAME_VALUES | LAYOUT | {aten.index.Tensor}
QUIET = frozenset({aten.sym_size.int})
ADDS = frozenset({aten.add.Tensor, aten.add_.Tensor})


@dataclass(frozen=True)
class Gain:
    """What a norm does behind the division by the size of rows: x -> x (weight + offset) + bias."""

    weight: str | None
    offset: float = 0.0
    bias: str | None = None


Lacking = Gain | None  # what a value of the stream lacks in the basis R


class Stream:
    """The values of a program that turn with what enters it.

    turned: node -> the gain of the norm that it lacks, in the basis R. squares: the squares of such
    values, whose sum over channels is the same in every basis. centred: whether a norm subtracts
    the mean over channels, which R has to keep. tables: the paths of those that the stream begins
    with. stop: the operation that makes a term of a sum no output of sites.
    """

    def __init__(self, code: Code, entering: str, leaving: str):
        self.code, self.entering, self.leaving = code, entering, leaving
        self.sites = {site.weight: site for site in code.sites}
        self.turned: dict[fx.Node, Lacking] = {}
        self.squares: set[fx.Node] = set()
        self.readers: dict[str, Lacking] = {}
        self.writers: set[str] = set()
        self.centred = False
        self.stop: fx.Node | None = None
        self.lookups = _lookups(code, leaving)

    @property
    def tables(self) -> frozenset[str]:
        return frozenset(self.lookups.values())

    def follow(self, node: fx.Node) -> bool:
        """Note what a node's value is; False where it is not the same in another basis."""
        if node.name == self.entering or node in self.lookups:
            self.turned[node] = None
            return True
        inputs = [a for a in node.all_input_nodes if a in self.turned or a in self.squares]
        if node.op == "output":
            return all(a.name == self.leaving and self.turned.get(a, "") is None for a in inputs)
        asks_dtype = node.target is aten.type_as.default and inputs == [_args(node)[1]]
        if not inputs or node.target in QUIET or asks_dtype:
            return node.name != self.leaving
        if self.squares & {*inputs}:
            return self._of_squares(node)
        if node.target in WEIGHT_OPS:
            return self._reads(node, inputs)
        if node.target in (aten.mul.Tensor, aten.div.Tensor):
            return self._product(node)
        if node.target in ADDS:
            return self._sum(node)
        if node.target is aten.pow.Tensor_Scalar:
            self.squares.add(node)
            return _args(node)[1] == 2 and self.turned[inputs[0]] is None
        if node.target is aten.rms_norm.default:
            return self._normed(node, bias_at=None)
        if node.target is aten.layer_norm.default:
            self.centred = True
            return self._normed(node, bias_at=3)
        if node.target in (aten.mean.dim, aten.sub.Tensor):
            return self._centre(node)
        if node.target not in MOVES or _args(node)[0] not in self.turned:
            return False
        self.turned[node] = self.turned[_args(node)[0]]
        alone = node.target in SAME_VALUES or inputs == [_args(node)[0]]
        return alone and _keeps_rows(node)

    def _of_squares(self, node: fx.Node) -> bool:
        if node.target in SAME_VALUES:
            self.squares.add(node)
            return True
        return node.target in SUMS and _axes(node) == [_last(_args(node)[0])]

    def _reads(self, node: fx.Node, inputs: list[fx.Node]) -> bool:
        x_at, *_ = WEIGHT_OPS[node.target]
        site = self._site(node)
        if site is None or inputs != [_args(node)[x_at]]:
            return False
        self.readers[site.path] = self.turned[inputs[0]]
        return True

    def _site(self, node: fx.Node) -> Site | None:
        weight = behind_casts(_args(node)[WEIGHT_OPS[node.target][1]])
        return self.sites.get(self.code.params.get(weight.name, ""))

    def _product(self, node: fx.Node) -> bool:
        x, other = _args(node)[:2]
        if x is other and node.target is aten.mul.Tensor:
            self.squares.add(node)
            return self.turned[x] is None
        if x not in self.turned:
            x, other = other, x
            if node.target is aten.div.Tensor:
                return False
        norm = self.turned[x]
        self.turned[node] = norm
        if other in self.turned:
            return False
        if _one_per_row(other):
            return True
        gain = vector(self.code, other)
        self.turned[node] = None if gain is None else Gain(*gain)
        return norm is None and gain is not None and node.target is aten.mul.Tensor

    def _normed(self, node: fx.Node, bias_at: int | None) -> bool:
        args = dict(enumerate(_args(node)))
        weight, bias = args.get(2), None if bias_at is None else args.get(bias_at)
        gain = None if weight is None else vector(self.code, weight)
        added = None if bias is None else vector(self.code, bias)
        self.turned[node] = None if gain is None else Gain(*gain, added[0] if added else None)
        known = (weight is None or gain is not None) and (bias is None or added is not None)
        over_rows = len(_args(node)[1]) == 1
        return self.turned_whole(args[0]) and known and over_rows and not (added and gain is None)

    def _centre(self, node: fx.Node) -> bool:
        """The mean over channels, or what is left of rows without one number each: the same in
        every basis that keeps the vector of ones."""
        self.centred = True
        x = _args(node)[0]
        if node.target is aten.mean.dim:
            return self.turned_whole(x) and _axes(node) == [_last(x)]
        self.turned[node] = None
        less = _args(node)[1]
        plain = not node.kwargs and less not in self.turned and _one_per_row(less)
        return self.turned_whole(x) and plain

    def turned_whole(self, node: Any) -> bool:
        """Whether a value turns and lacks nothing."""
        return node in self.turned and self.turned[node] is None

    def _sum(self, node: fx.Node) -> bool:
        terms = _args(node)[:2]
        self.turned[node] = None
        if node.kwargs or not all(isinstance(term, fx.Node) for term in terms):
            return False
        if any(self.turned.get(term) is not None for term in terms):
            return False
        return all(term in self.turned or self._writes(term, node) for term in terms)

    def _writes(self, term: fx.Node, sum_node: fx.Node) -> bool:
        """Whether a term is made of outputs of sites alone, by what treats all channels alike, and
        read by nothing else. Notes those sites."""
        waiting, path, written = [term], {sum_node}, set()
        while waiting:
            node = waiting.pop()
            path.add(node)
            if node.target in WEIGHT_OPS:
                site = self._site(node)
                if site is None or site.router:
                    self.stop = node
                    return False
                written.add(site.path)
                continue
            ahead = _before(node)
            if not ahead:
                self.stop = node
                return False
            waiting += ahead
        self.writers |= written
        users = {user for node in path - {sum_node} for user in node.users}
        return all(user in path or user.target in QUIET for user in users)


def _before(node: fx.Node) -> list[fx.Node]:
    """The values of which a node is the same mixture in every channel; none if it is not."""
    if node.target in MOVES and _keeps_rows(node):
        return [_args(node)[0]]
    if node.target in SUMS:
        return [] if _last(_args(node)[0]) in _axes(node) else [_args(node)[0]]
    if node.target in ADDS and not node.kwargs:
        return [a for a in _args(node)[:2] if isinstance(a, fx.Node)] if _nodes(node) == 2 else []
    if node.target is aten.mul.Tensor:
        factors = [a for a in _args(node)[:2] if not _one_per_row(a)]
        return factors if len(factors) == 1 else []
    return []


def _nodes(node: fx.Node) -> int:
    return sum(isinstance(a, fx.Node) for a in _args(node)[:2])


def _one_per_row(factor: Any) -> bool:
    """Whether a factor is the same for all channels of a row."""
    if not isinstance(factor, fx.Node):
        return True
    value = factor.meta["val"]
    return isinstance(value, Tensor) and (value.ndim == 0 or str(value.shape[-1]) == "1")


def _keeps_rows(node: fx.Node) -> bool:
    """Whether the last axis of the first argument is that of the value."""
    before, after = _args(node)[0].meta["val"], node.meta["val"]
    turns = node.target in (aten.transpose.int, aten.permute.default, aten.t.default)
    return isinstance(after, Tensor) and not turns and str(before.shape[-1]) == str(after.shape[-1])


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _last(node: fx.Node) -> int:
    return node.meta["val"].ndim - 1


def _axes(node: fx.Node) -> list[int]:
    """The axes over which a sum runs."""
    axes = _args(node)[1] if len(_args(node)) > 1 else None
    return [axis % _args(node)[0].meta["val"].ndim for axis in axes or ()]


def _lookups(code: Code, leaving: str) -> dict[fx.Node, str]:
    """The lookups in tables of which the value that leaves is made, each with its table."""
    waiting = [node for node in code.graph.nodes if node.name == leaving]
    found: dict[fx.Node, str] = {}
    while waiting:
        node = waiting.pop()
        if node.target is aten.embedding.default:
            table = behind_casts(_args(node)[0])
            if table.name in code.params and len(table.users) == 1:
                found[node] = code.params[table.name]
        elif node.op == "call_function":
            waiting += _before(node)
    return found
