"""Keys and values of all requests in pages, and what one forward pass sees of them: a transformers
cache whose rows are at positions of their own.

    slot of token t of a request = page[t // size] * size + t % size

States of recurrent layers are no pages: they are objects of a request, laid side by side for a pass
and taken apart behind it.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from qlab.errors import warn
from qlab.generation.coded import Coders, Codes, Numbers, Shapes, Slots, coders_of
from qlab.lowering.around.coded_tokens import why_not

States = list[Any]  # the cache's layer objects of one request, in which recurrent states are


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What is stored of a token.

    shapes: layer -> (heads, channels of a key, channels of a value). dtype: of what is stored as
    numbers. coders: layer, "key" or "value" -> what is stored as codes becomes by it.
    """

    shapes: Shapes
    dtype: torch.dtype
    device: torch.device
    coders: Coders = field(default_factory=dict)

    @property
    def bytes_of_token(self) -> int:
        """Of its keys and values in all layers."""
        return Pool(self, 0, 1).nbytes()


def layers_of(model: PreTrainedModel, shapes: Shapes) -> Layers:
    """What a model stores of a token: codes where its attentions round keys and values."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    coders = coders_of(model, shapes)
    if coders and model.device.type == "cpu" and why_not() is not None:
        warn(f"new tokens of a rounded cache are slow: {why_not()}")
    return Layers(shapes=shapes, dtype=dtype, device=model.device, coders=coders)


class Pool:
    """The slots of every layer that has keys and values.

    Args:
        layers: what is stored of a token.
        pages, size: how many pages there are beside that of nobody, and tokens of a page.
    """

    def __init__(self, layers: Layers, pages: int, size: int):
        self.layers, self.size = layers, size
        slots = (pages + 1) * size
        self.keys: dict[int, Slots] = {}
        self.values: dict[int, Slots] = {}
        for layer, (heads, of_key, of_value) in layers.shapes.items():
            self.keys[layer] = _slots(layers, (layer, "key"), slots, heads, of_key)
            self.values[layer] = _slots(layers, (layer, "value"), slots, heads, of_value)

        self._alone: dict[int, Pool] = {}

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored; the first dimension counts slots."""
        every = (*self.keys.values(), *self.values.values())
        return tuple(tensor for slots in every for tensor in slots.tensors)

    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def like(self, pages: int) -> "Pool":
        """Empty slots of the same form, of so many pages."""
        return Pool(self.layers, pages, self.size)

    def of(self, layer: int) -> "Pool":
        """The slots of one layer, as those of layer 0."""
        if layer not in self._alone:
            alone = self._alone[layer] = copy.copy(self)
            every = self.layers.coders.items()
            coders = {(0, kind): coder for (owner, kind), coder in every if owner == layer}
            alone.layers = replace(self.layers, coders=coders)
            alone.keys = {0: self.keys[layer]} if layer in self.keys else {}
            alone.values = {0: self.values[layer]} if layer in self.values else {}
        return self._alone[layer]

    def slots(self, table_bp: Tensor) -> Tensor:
        """The slots [b, p * size] of pages [b, p]."""
        within = torch.arange(self.size, device=table_bp.device)
        return (table_bp[:, :, None] * self.size + within).flatten(1)

    def written(self, table_bp: Tensor, start_b: Tensor, count: int) -> Tensor:
        """The slots [b, count] of the tokens from `start` on."""
        at = start_b[:, None] + torch.arange(count, device=start_b.device)
        return table_bp.gather(1, at // self.size) * self.size + at % self.size


class Rows(Cache):
    """The cache of one forward pass over b rows.

    Args:
        pool: the slots.
        table: int64 [b, p], the pages of every row, in order; shorter rows end in page 0.
        start: int64 [b], how many tokens of a row have keys and values.
        count: how many tokens of each row the pass computes.
        states: the layer objects of recurrent layers, the rows side by side; none without.
    """

    def __init__(self, pool: Pool, table: Tensor, start: Tensor, count: int, states: States):
        super().__init__(layers=list(states))
        self.pool, self.start, self._is_of_one = pool, start, False
        self.reads = pool.slots(table)
        self.writes = pool.written(table, start, count)

    def of(self, layer: int) -> "Rows":
        """What one layer sees; nothing in it says which one."""
        one = copy.copy(self)
        one.pool, one._is_of_one = self.pool.of(layer), True
        return one

    def _place(self, layer_idx: int) -> int:
        """The number of a layer in the pool."""
        return 0 if self._is_of_one else layer_idx

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [b, h, q, d], and give all that the rows may read [b, h, l,
        d]."""
        return (
            self._stored(self.pool.keys[self._place(layer_idx)], key_states),
            self._stored(self.pool.values[self._place(layer_idx)], value_states),
        )

    def _stored(self, slots: Slots, x_bhqd: Tensor) -> Tensor:
        slots.write(self.writes.flatten(), x_bhqd)
        return slots.read(self.reads, x_bhqd.dtype)

    def decodes(self, layer_idx: int) -> tuple[str, ...]:
        """Which of "key" and "value" come back as an attention rounds them."""
        coders, layer = self.pool.layers.coders, self._place(layer_idx)
        return tuple(kind for kind in ("key", "value") if (layer, kind) in coders)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The position of each row's first new token; a number of a single row, which code of a
        model's own may want, but not in a graph, which no number may be part of."""
        alone = len(self.start) == 1 and not torch.compiler.is_compiling()
        return int(self.start[0]) if alone else self.start

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many keys there are before the new ones, as a width of masks."""
        return self.reads.shape[1] - self.writes.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys that a mask covers, the position of the first one)."""
        return self.reads.shape[1], 0

    @property
    def is_compileable(self) -> bool:
        """Whether transformers may compile what reads it."""
        return True


def _slots(layers: Layers, place: tuple[int, str], slots: int, heads: int, channels: int) -> Slots:
    """Empty slots of the keys or the values of a layer."""
    coder = layers.coders.get(place)
    if coder is None:
        return Numbers(slots, heads, channels, layers.dtype, layers.device)
    return Codes(slots, heads, channels, coder, layers.device)


class _OfNumbers(DynamicCache):
    """A cache into which no attention puts codes."""


def probed(model: PreTrainedModel) -> DynamicCache:
    """A cache of one token, whose shapes are those of every cache of the model."""
    cache = _OfNumbers(config=model.config)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        model(ids, use_cache=True, **{cache_argument(model): cache})
    return cache


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model takes its cache."""
    takes = inspect.signature(model.forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in takes)


def shapes_of(cache: DynamicCache) -> Shapes:
    """Layer -> (heads, channels of a key, channels of a value), of the layers that have them."""
    layers: list[Any] = cache.layers
    return {
        i: (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        for i, layer in enumerate(layers)
        if getattr(layer, "keys", None) is not None
    }


# ------------------------------------------------------------------ recurrent states
KINDS = ("conv_states", "recurrent_states")


def has_states(cache: DynamicCache) -> bool:
    """Whether a layer keeps a state beside keys and values."""
    return any(hasattr(layer, KINDS[0]) for layer in cache.layers)


def side_by_side(rows: Sequence[States]) -> States:
    """The states of several requests as those of a batch; they are not changed in place."""
    batch = []
    for layers in zip(*rows):
        layer = copy.copy(layers[0])
        for kind in KINDS:
            if hasattr(layer, kind):
                setattr(layer, kind, _joined([getattr(other, kind) for other in layers]))
        batch.append(_with_marks_of_its_own(layer))
    return batch


def apart(batch: States, count: int) -> list[States]:
    """The states of a batch as those of each request."""
    rows: list[States] = [[] for _ in range(count)]
    for layer in batch:
        for row, states in enumerate(rows):
            part = copy.copy(layer)
            for kind in KINDS:
                if hasattr(layer, kind):
                    setattr(part, kind, _row(getattr(layer, kind), row))
            states.append(_with_marks_of_its_own(part))
    return rows


def _with_marks_of_its_own(layer: Any) -> Any:
    """A copied layer, whose marks of what it has seen are copied too."""
    if isinstance(getattr(layer, "has_previous_state", None), dict):
        layer.has_previous_state = dict(layer.has_previous_state)
    return layer


def _joined(states: Sequence[dict[Any, Tensor | None]]) -> dict[Any, Tensor | None]:
    return {
        key: None if first is None else torch.cat([_tensor(other[key]) for other in states])
        for key, first in states[0].items()
    }


def _row(states: dict[Any, Tensor | None], row: int) -> dict[Any, Tensor | None]:
    return {key: None if t is None else t[row : row + 1].clone() for key, t in states.items()}


def _tensor(state: Tensor | None) -> Tensor:
    assert state is not None
    return state
