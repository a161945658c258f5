"""The cache of `generate()` on a model that rounds keys and values: a layer of transformers' own
dynamic cache that holds codes. Each token is rounded once, when it comes.

`generate()` makes its cache itself, so that an attention puts such a layer into the cache that it
is given, before anything is in it. Layers with windows, which keep few tokens, and other caches
(static, offloaded, of one's own class) hold numbers, which attentions round in each step: the same
numbers either way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from qlab.lowering.around.coded_tokens import Coder


class CodedLayer(DynamicLayer):
    """Keys and values of one layer as codes [b, n, ...].

    Where something else is cached than what the attention reads (a latent, of which it makes keys
    and values), the layer holds numbers, as transformers' own does.

    Args:
        coders: what keys and values become.

    Attributes:
        decoded: which of "key" and "value" are given back as they were rounded.
    """

    def __init__(self, coders: Mapping[str, Coder]):
        super().__init__()
        self.coders = coders
        self.parts: dict[str, list[Tensor]] = {}
        self.decoded = ["key", "value"]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **more: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [b, h, n, d], and give all of them as numbers."""
        given = {"key": key_states, "value": value_states}
        if not all(coder.fits(given[kind]) for kind, coder in self.coders.items()):
            self.decoded.clear()
            self.__class__ = DynamicLayer  # type: ignore[assignment]
            return DynamicLayer.update(self, key_states, value_states, *args, **more)
        self.is_initialized = True
        return self._with("key", key_states), self._with("value", value_states)

    def _with(self, kind: str, x_bhnd: Tensor) -> Tensor:
        coder, b = self.coders[kind], len(x_bhnd)
        new = [part.unflatten(0, (b, -1)) for part in coder.written(x_bhnd)]
        if kind in self.parts:
            new = [torch.cat(pair, 1) for pair in zip(self.parts[kind], new)]
        self.parts[kind] = new
        return coder.read(new, x_bhnd.dtype)

    def get_seq_length(self) -> int:
        """How many tokens there are."""
        return self.parts["key"][0].shape[1] if self.parts else 0

    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove so many tokens from the end, a negative number."""
        if tokens_to_remove:
            self._change(lambda t: t[:, :tokens_to_remove])

    def reset(self) -> None:
        self.parts, self.is_initialized = {}, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda t: t[indices])

    def _change(self, change: Any) -> None:
        self.parts = {kind: [change(t) for t in parts] for kind, parts in self.parts.items()}


def decoded_of(cache: Any, layer: int, coders: Mapping[str, Coder]) -> Sequence[str]:
    """Which of "key" and "value" a cache gives back as they were rounded. A dynamic cache that is
    empty there holds codes from here on. coders: of an attention both of whose keys and values may
    be codes, else none."""
    decodes = getattr(cache, "decodes", None)
    if decodes is not None:
        return decodes(layer)
    if type(cache) is not DynamicCache or cache.offloading:
        return ()
    while coders and cache.layer_class_to_replicate is not None and len(cache.layers) <= layer:
        cache.layers.append(cache.layer_class_to_replicate())
    held = cache.layers[layer]
    if coders and type(held) is DynamicLayer and not held.is_initialized:
        cache.layers[layer] = CodedLayer(coders)
    return getattr(cache.layers[layer], "decoded", ())
