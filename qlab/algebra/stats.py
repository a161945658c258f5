"""Statistics of the inputs x of linear layers: what is observed of calibration data.

A statistic is a monoid: each batch is lifted to a state, and states are combined in any order. When
the inputs become x @ M, the state is transported instead of being observed again.

Legend: x_nk is n tokens by k channels, H_kk = sum_n x_n^T x_n. States are fp32 for every dtype of
the model.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlab.algebra.statistic import Observation, PerExpert, Stat, here, per_expert
from qlab.errors import QlabError

STRETCH, HELD_OUT = 128, 4  # tokens in a stretch, and of how many stretches one is held out
TILE = 192  # columns per block of a symmetric matrix, of which one triangle is multiplied


Need = str | Stat  # a statistic that a step asks for: a key of STATS, or one of its own


def name_of(need: Need) -> str:
    """The name of a statistic, by which steps find its state."""
    return need if isinstance(need, str) else need.name


def named(needs: Iterable[Need]) -> frozenset[Need]:
    """Statistics that a step asks for; refuses those of its own without a name, or with one that
    another of them has."""
    names: dict[str, Need] = {}
    for need in needs:
        name = name_of(need)
        if not name:
            raise QlabError("a statistic has no name; give it one: qlab.Stat(..., name='mine')")
        if names.setdefault(name, need) != need or (not isinstance(need, str) and name in STATS):
            raise QlabError(
                f"two statistics have the name {name!r}; give the one of your own another"
            )
        names[name] = need
    return frozenset(names.values())


class Moment(NamedTuple):
    """sum over tokens of x^T x, fp32 [k, k], and the number of tokens."""

    sum_kk: Tensor
    tokens: int

    @property
    def mean_kk(self) -> Tensor:
        """The mean over tokens. Without tokens it is I: every direction counts the same."""
        if not self.tokens:
            return torch.eye(len(self.sum_kk), dtype=self.sum_kk.dtype, device=self.sum_kk.device)
        return self.sum_kk / self.tokens

    @property
    def mean_square_k(self) -> Tensor:
        """The diagonal of mean_kk."""
        squares_k = self.sum_kk.diagonal()
        return squares_k / self.tokens if self.tokens else torch.ones_like(squares_k)

    def output_errors(self, D_ok: Tensor) -> Tensor:
        """d H d^T of every row [o] with H = mean_kk: the mean squared output error of a weight
        error D."""
        return quadratic(D_ok, self.sum_kk) / self.tokens if self.tokens else D_ok.square().sum(-1)

    def output_error(self, D_ok: Tensor) -> float:
        """tr(D H D^T), the sum of `output_errors`."""
        return float(self.output_errors(D_ok).sum())


Add = Callable[[Moment, Moment], Moment]


def own_mean_kk(moment: Moment) -> Tensor:
    """The mean over tokens, in the memory of a moment that is the caller's own, which is lost."""
    return moment.sum_kk.div_(moment.tokens) if moment.tokens else moment.mean_kk


class Drifting(NamedTuple):
    """The second moment of the inputs x, and their drift sum (x' - x)^T x, of the same tokens."""

    moment: Moment
    drift: Moment


class Sample(NamedTuple):
    """The rows [n, k] with the smallest hashed keys [n], which are the same for every order of
    batches."""

    order: Tensor
    x_nk: Tensor


def gram(x_nk: Tensor) -> Tensor:
    """x^T x in fp32 [k, k]. Blocks of the upper triangle are multiplied and mirrored, so it is
    exactly symmetric."""
    x, k = x_nk.float(), x_nk.shape[1]
    H_kk = x.new_empty(k, k)
    for i in range(0, k, TILE):
        torch.mm(x[:, i : i + TILE].T, x[:, i:], out=H_kk[i : i + TILE, i:])
    return _upper_mirrored_(H_kk)


def add_gram_(H_kk: Tensor, x_nk: Tensor) -> Tensor:
    """H + x^T x in the memory of a symmetric H: the bits of H + gram(x), without a second matrix
    [k, k]."""
    x, k = x_nk.float(), x_nk.shape[1]
    strip_tk = x.new_empty(min(TILE, k), k)  # columns lie in it as in H, for the same products
    for i in range(0, k, TILE):
        product = strip_tk[: k - i, i:]
        H_kk[i : i + TILE, i:] += torch.mm(x[:, i : i + TILE].T, x[:, i:], out=product)
    return _upper_mirrored_(H_kk)


def _upper_mirrored_(H_kk: Tensor) -> Tensor:
    """H with its upper triangle in the place of the lower one, too."""
    for i in range(0, len(H_kk), TILE):  # tile by tile, which stays in cache
        tile, beyond = H_kk[i : i + TILE, i : i + TILE], i + TILE
        tile.copy_(tile.triu() + tile.triu(1).T)
        H_kk[beyond:, i:beyond] = H_kk[i:beyond, beyond:].T
    return H_kk


def add_moments(a: Moment, b: Moment) -> Moment:
    """The moment of the tokens of both."""
    return Moment(a.sum_kk + b.sum_kk, a.tokens + b.tokens)


def add_into(a: Moment, b: Moment) -> Moment:
    """The same in the memory of the first, which is lost."""
    return Moment(a.sum_kk.add_(b.sum_kk), a.tokens + b.tokens)


def _drift(o: Observation) -> Moment:
    """sum over tokens of (x' - x)^T x, with x' the input in the reference model."""
    tokens, k = o.x_nk.shape
    if o.reference_nk is None:
        return Moment(o.x_nk.new_zeros(k, k, dtype=torch.float32), tokens)
    x_nk = o.x_nk.float()
    return Moment((o.reference_nk.float() - x_nk).T @ x_nk, tokens)


def _is_held_out(keys: Tensor) -> Tensor:
    """Which tokens are held out: one stretch of every HELD_OUT, so that neighbours, which are much
    alike, mostly lie on the same side."""
    return (keys // STRETCH) % HELD_OUT == HELD_OUT - 1


def _part(o: Observation, rows: Tensor) -> Observation:
    """Those tokens of an observation, with what they are compared with."""
    other_nk = None if o.reference_nk is None else o.reference_nk[rows]
    stream_no = None if o.stream_no is None else o.stream_no[rows]
    return Observation(o.x_nk[rows], o.keys[rows], None, other_nk, None, stream_no)


def _of_held_out(lift: Callable[[Observation], Moment]) -> Callable[[Observation], Moment]:
    """What a statistic is of the tokens that are held out."""
    return lambda o: lift(_part(o, _is_held_out(o.keys)))


def _of_fitted(lift: Callable[[Observation], Moment]) -> Callable[[Observation], Moment]:
    """What a statistic is of the tokens that are not held out."""
    return lambda o: lift(_part(o, ~_is_held_out(o.keys)))


def _held_out(o: Observation) -> Drifting:
    """The second moment and the drift of the tokens that are held out."""
    part = _part(o, _is_held_out(o.keys))
    return Drifting(Moment(gram(part.x_nk), len(part.x_nk)), _drift(part))


def _received(o: Observation) -> Moment:
    """sum over tokens of a x^T x, with a what they receive; of no tokens where nothing is known of
    it."""
    k = o.x_nk.shape[1]
    if o.received_n is None:
        return Moment(o.x_nk.new_zeros(1, 1, dtype=torch.float32).expand(k, k), 0)
    return Moment(gram(o.x_nk.float() * o.received_n.sqrt()[:, None]), len(o.x_nk))


def add_known(a: Moment, b: Moment, add: Add = add_moments) -> Moment:
    """The same of moments that may be of no tokens, where nothing is known."""
    # a sum with nothing is not worth its matrix
    if a.tokens and b.tokens:
        return add(a, b)
    return max((a, b), key=lambda state: (state.tokens, len(state.sum_kk)))


_known_into = partial(add_known, add=add_into)


def _stream_drift(o: Observation) -> Moment:
    """sum over tokens of (r' - r)^T x [o, k], with r what the output is added to; of no tokens
    where nothing is known of it."""
    if o.stream_no is None:
        return Moment(o.x_nk.new_zeros(1, o.x_nk.shape[1], dtype=torch.float32), 0)
    return Moment(o.stream_no.float().T @ o.x_nk.float(), len(o.x_nk))


def _move_stream(state: Moment, M: Tensor) -> Moment:
    moved = state.sum_kk * M if M.ndim == 1 else state.sum_kk @ M
    return Moment(moved, state.tokens)


def _no_stream(k: int) -> Moment:
    return Moment(torch.zeros(1, k, dtype=torch.float32), 0)


def _no_moment(k: int) -> Moment:
    return Moment(torch.zeros(k, k, dtype=torch.float32), 0)


def _move_moment(state: Moment, M: Tensor) -> Moment:
    H = state.sum_kk
    if M.ndim == 1:
        return Moment(H * M[:, None] * M[None, :], state.tokens)
    return Moment((M.T.double() @ H.double() @ M.double()).float(), state.tokens)


def _move_minmax(state: tuple[Tensor, Tensor], M: Tensor) -> tuple[Tensor, Tensor] | None:
    if M.ndim != 1:
        return None
    if (state[0] > state[1]).all():  # no token was seen
        return state
    lo, hi = state[0] * M, state[1] * M
    return torch.minimum(lo, hi), torch.maximum(lo, hi)


def _hashed(keys: Tensor) -> Tensor:
    """A fixed pseudo-random order of token keys (the finalizer of splitmix64)."""
    h = (keys + 1) * -7046029254386353131
    h = (h ^ (h >> 30)) * -4658895280553007687
    h = (h ^ (h >> 27)) * -7723592293110705685
    return h ^ (h >> 31)


def sample(n: int) -> Stat:
    """A random sample of n rows of x, which does not depend on the order of batches."""

    def smallest(order: Tensor, x_nk: Tensor) -> Sample:
        kept = order.argsort(stable=True)[:n]
        return Sample(order[kept], x_nk[kept])

    return Stat(
        lambda o: smallest(_hashed(o.keys), o.x_nk.float()),
        lambda a, b: smallest(torch.cat([a.order, b.order]), torch.cat([a.x_nk, b.x_nk])),
        lambda s, M: Sample(s.order, s.x_nk * M if M.ndim == 1 else s.x_nk @ M),
        lambda k: Sample(torch.empty(0, dtype=torch.long), torch.empty(0, k, dtype=torch.float32)),
    )


STATS: dict[str, Stat] = {
    "second_moment": Stat(
        lambda o: Moment(gram(o.x_nk), o.x_nk.shape[0]),
        add_moments,
        _move_moment,
        _no_moment,
        into=add_into,
        grow=lambda a, o: Moment(add_gram_(a.sum_kk, o.x_nk), a.tokens + o.x_nk.shape[0]),
        sums=True,
    ),
    "drift": Stat(
        _drift,
        add_moments,
        _move_moment,
        _no_moment,
        into=add_into,
        sums=True,
    ),
    # The part of both on which a choice that was made on the rest is judged.
    "held_out": Stat(
        _held_out,
        lambda a, b: Drifting(*map(add_moments, a, b)),
        lambda s, M: Drifting(*(_move_moment(moment, M) for moment in s)),
        lambda k: Drifting(_no_moment(k), _no_moment(k)),
        into=lambda a, b: Drifting(*map(add_into, a, b)),
        sums=True,
    ),
    # What the attention that tokens receive adds to their weight in the second moment.
    "received": Stat(_received, add_known, _move_moment, _no_moment, into=_known_into),
    # What the sum that an output goes into lacks already, as far as the input says it.
    "stream_drift": Stat(_stream_drift, add_known, _move_stream, _no_stream, into=_known_into),
    "stream_held_out": Stat(
        _of_held_out(_stream_drift), add_known, _move_stream, _no_stream, into=_known_into
    ),
    # Of the other tokens. With those that are held out they make up the whole, which need not be
    # multiplied once more.
    "drift_fitted": Stat(
        _of_fitted(_drift), add_moments, _move_moment, _no_moment, into=add_into, sums=True
    ),
    "stream_fitted": Stat(
        _of_fitted(_stream_drift), add_known, _move_stream, _no_stream, into=_known_into
    ),
    "absmax": Stat(
        lambda o: o.x_nk.abs().amax(0).float(),
        torch.maximum,
        lambda s, M: s * M.abs() if M.ndim == 1 else None,
        torch.zeros,
    ),
    "absmean": Stat(
        lambda o: (o.x_nk.abs().float().sum(0), o.x_nk.shape[0]),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        lambda s, M: (s[0] * M.abs(), s[1]) if M.ndim == 1 else None,
        lambda k: (torch.zeros(k, dtype=torch.float32), 0),
    ),
    "minmax": Stat(
        lambda o: (o.x_nk.float().amin(0), o.x_nk.float().amax(0)),
        lambda a, b: (torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])),
        _move_minmax,
        lambda k: (
            torch.full((k,), torch.inf, dtype=torch.float32),
            torch.full((k,), -torch.inf, dtype=torch.float32),
        ),
    ),
    "sample": sample(512),
}

# Statistics that compare with the reference model. Routed experts have none of them: their rows
# have no counterpart there.
COMPARING = frozenset(
    {"drift", "held_out", "stream_drift", "stream_held_out", "drift_fitted", "stream_fitted"}
)
# Of them, those that compare what the output is added to.
JOINING = frozenset({"stream_drift", "stream_held_out", "stream_fitted"})
# Statistics that read how much attention tokens receive, which is computed for them alone.
ATTENDING = frozenset({"received"})
Stats = Mapping[tuple[str, Need], Any]  # (source node or wire, statistic) -> state


def stat_of(need: Need, experts: bool) -> Stat:
    """The statistic that is asked for; refuses a name that none has. experts: of every expert's own
    tokens."""
    if isinstance(need, str) and need not in STATS:
        raise QlabError(
            f"the recipe asks for a statistic {need!r}; there are {', '.join(sorted(STATS))}"
        )
    stat = STATS[need] if isinstance(need, str) else need
    return per_expert(stat) if experts else stat


def transport(stats: Stats, source: str, M: Tensor) -> Stats:
    """The statistics after the inputs of `source` became x * m or x @ M. Those that M cannot move
    are dropped."""
    moved = dict(stats)
    for key, state in stats.items():
        if key[0] == source:
            stat = stat_of(key[1], isinstance(state, PerExpert))
            moved[key] = stat.transport(here(state), M)
    return {key: state for key, state in moved.items() if state is not None}


def quadratic(D_ok: Tensor, H_kk: Tensor) -> Tensor:
    """d H d^T of every row [o]: the squared output error of a weight error D on inputs of second
    moment H. One triangle of H is read."""
    total_o = D_ok.new_zeros(len(D_ok))
    for i in range(0, len(H_kk), TILE):
        D_ot, below = D_ok[:, i : i + TILE], slice(i + TILE, None)
        product = torch.addmm(
            D_ot @ H_kk[i : i + TILE, i : i + TILE],
            D_ok[:, below],
            H_kk[below, i : i + TILE],
            alpha=2,
        )
        total_o += torch.linalg.vecdot(product, D_ot)
    return total_o
