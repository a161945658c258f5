"""A model run around its blocks: what it calls them with, and its logits.

Nothing here knows an architecture. A block's inputs are recorded by running the model's own forward
with the blocks replaced by recorders; the head is run the same way, with the last block replaying
the final hidden states.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qlab.algebra.graph import Code
from qlab.errors import QlabError, first_line
from qlab.model.calls import Call, to_like
from qlab.model.paper import path_of
from qlab.model.recording import Makers, Recorded, Recorder, Replaced, calls_of
from qlab.model.skeleton import Skeleton
from qlab.process.surroundings import foreign


def check_length(skeleton: Skeleton, tokens: int) -> None:
    """Refuse samples of more tokens than the model has positions, where it looks these up.

    Tables of positions are learned, and then lie beside the vocabulary's embedding, or are buffers
    with as many rows.
    """
    model, config = skeleton.model, skeleton.checkpoint.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", tokens)
    owner, _, vocabulary = path_of(model, model.get_input_embeddings()).rpartition(".")
    beside = model.get_submodule(owner).named_children()
    learned = any(isinstance(m, nn.Embedding) and name != vocabulary for name, m in beside)
    computed = any(positions in buffer.shape for buffer in model.buffers())
    if (learned or computed) and tokens > positions:
        raise QlabError(
            f"windows of {tokens} tokens are longer than the {positions} positions of "
            f"{skeleton.checkpoint.path}; choose a shorter length"
        )


def record_blocks(
    skeleton: Skeleton, tokens: Tensor, beside: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Call]]:
    """The hidden states that enter the first block, and what every block is called with beside
    them.

    Refuses models that change hidden states between blocks.

    beside: what else the model is called with (a mask, images).
    """
    makers = Makers()
    recorders = _recorders(skeleton, makers, skeleton.programs.code)
    recorders[-1].last = True
    embedding = next(skeleton.model.get_input_embeddings().parameters())
    others = {name: to_like(t, embedding) for name, t in (beside or {}).items()}
    with (
        foreign,
        Replaced(skeleton.model, skeleton.prefix, recorders),
        contextlib.suppress(Recorded),
        _explained(skeleton),
        makers,
    ):
        skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False, **others)
    seen = [r.seen for r in recorders if r.seen is not None]
    if len(seen) < len(skeleton.blocks):
        idle = sorted(r.path for r in recorders if r.seen is None)
        raise QlabError(
            f"{type(skeleton.model).__name__} did not run blocks {idle}; qlab streams models that "
            "run each block once, in order"
        )
    for recorder, call in zip(recorders, seen):
        if not _same(call.hidden, seen[0].hidden):
            raise QlabError(
                f"{type(skeleton.model).__name__} changes hidden states before {recorder.path} "
                "(as where images join at several depths); qlab streams models whose blocks "
                "hand them on as they are"
            )
    return seen[0].hidden, dict(zip(skeleton.blocks, calls_of(seen)))


def head(skeleton: Skeleton, tokens: Tensor, hidden: Tensor) -> Tensor:
    """The model's logits [b, l, vocabulary] when the last block returns these hidden states."""
    makers = Makers()
    recorders = _recorders(skeleton, makers, skeleton.programs.first)
    recorders[-1].replay = hidden
    with foreign, Replaced(skeleton.model, skeleton.prefix, recorders), makers:
        return skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False).logits


def _recorders(
    skeleton: Skeleton, makers: Makers, program: Callable[[str, Call], Code]
) -> list[Recorder]:
    """A stand-in for every block, each of which knows the one before."""
    recorders: list[Recorder] = []
    for index, (path, block) in enumerate(skeleton.blocks.items()):
        recorders.append(Recorder(path, index, block, makers, functools.partial(program, path)))
        object.__setattr__(recorders[-1], "before", recorders[-2] if index else None)
    return recorders


@contextlib.contextmanager
def _explained(skeleton: Skeleton) -> Iterator[None]:
    """Explain an error of the model's own forward: stand-ins took the places of its blocks."""
    try:
        yield
    except (QlabError, Recorded):
        raise
    except Exception as error:  # whatever the model's own forward raises
        raise QlabError(
            f"{type(skeleton.model).__name__} cannot be run around its blocks, which are streamed "
            f"one by one ({first_line(error)}); it computes something of what they return before "
            "the last has run"
        ) from error


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))
