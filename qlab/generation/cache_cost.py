"""What pages of codes cost against pages of 16 bits: bytes, and the KL divergence of next tokens.

    KL = mean over tokens of sum_v p_v log(p_v / q_v),  p without rounding, q through the pages

Means, ranges and scales of a cache, and this, are measured on different windows of a passage that
comes with qlab (`passage.txt`), so that a start needs no text and no network. The figure is for a
first look: two short windows say little of long ones.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from qlab.generation.cache import has_states
from qlab.generation.engine import Engine, nothing
from qlab.generation.passes import pass_over
from qlab.generation.request import Request
from qlab.generation.sampling import Sampling
from qlab.process.surroundings import undisturbed

CALIBRATED, WINDOW, WINDOWS = 256, 96, 2  # tokens that scales are measured on; of the KL

PASSAGE = Path(__file__).with_name("passage.txt")


@dataclass(frozen=True, kw_only=True)
class CacheCost:
    """bytes_of_token: of its keys and values in all layers, on each of so many ranks. share: of
    what 16 bits take. kl: in nats, the mean over `tokens` tokens, NaN over none."""

    bytes_of_token: int
    share: float
    kl: float
    tokens: int
    ranks: int = 1

    def __str__(self) -> str:
        where = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        return (
            f"the cache takes {self.bytes_of_token:,} bytes a token{where}, {self.share:.2f} of 16 "
            f"bits; KL {self.kl:.2g} against a cache without rounding, on {self.tokens} tokens of "
            f"qlab's {PASSAGE.name}"
        )


def calibration_ids(tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    """The tokens that scales are measured on, at most so many."""
    return _parts(tokenizer)[0][:most]


def _parts(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of the passage that scales are measured on, and the others."""
    text = PASSAGE.read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = min(CALIBRATED, len(ids) // 2)
    return ids[:first], ids[first:]


@undisturbed
@torch.no_grad()
def cache_cost(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> CacheCost | None:
    """What the pages of an engine cost that nobody waits for; None where they hold numbers."""
    layers = engine.pool.layers
    if not layers.coders:
        return None
    length = min(WINDOW, engine.longest)
    _, ids = _parts(tokenizer)
    windows = [ids[i : i + length] for i in range(0, len(ids), length)][:WINDOWS]
    sums, tokens = 0.0, 0
    for window in windows:
        sums += _divergence(engine, window)
        tokens += len(window)
    heads = layers.shapes.values()
    plain = 2 * sum(h * (of_key + of_value) for h, of_key, of_value in heads)
    return CacheCost(
        bytes_of_token=layers.bytes_of_token,
        share=layers.bytes_of_token / plain,
        kl=sums / tokens if tokens else math.nan,
        tokens=tokens,
    )


def _divergence(engine: Engine, window: Sequence[int]) -> float:
    """The sum of the KL divergences of the tokens behind those of a window."""
    ids = torch.tensor([[*window]], dtype=torch.int64, device=engine.model.device)
    with unrounded(engine.model):
        p = engine.model(ids, use_cache=False).logits[0].float().log_softmax(-1)
    q = through_pages(engine, window).float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum())


@torch.no_grad()
def through_pages(engine: Engine, tokens: Sequence[int]) -> Tensor:
    """Logits [n, v] of tokens whose keys and values are written to pages and read there, while
    nobody waits for anything."""
    request = Request(number=-1, prompt=[*tokens], sampling=Sampling(), seed=0, told=nothing)
    request.pages = engine.pages.take(engine.pages.needed(len(tokens)))
    cache = DynamicCache(config=engine.model.config)
    states = cache.layers if has_states(cache) else []
    call = pass_over([request], torch.tensor([[*tokens]], dtype=torch.int64), 0, {}, None)
    logits = engine.forward(call, states)[0]
    engine.pages.drop(request.pages)
    return logits


@contextmanager
def unrounded(model: PreTrainedModel) -> Iterator[None]:
    """Let the attentions of a model read queries, keys and values as they are."""
    held: list[Any] = [module for module in model.modules() if "reads" in module._modules]
    reads = [module._modules.pop("reads") for module in held]
    try:
        yield
    finally:
        for module, read in zip(held, reads):
            module._modules["reads"] = read
