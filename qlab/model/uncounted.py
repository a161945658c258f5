"""Blocks that the files hold and config.json does not count."""

import re
from itertools import chain

from qlab.errors import QlabError
from qlab.files.shardwise import leaves_by_file
from qlab.model.skeleton import Skeleton


def uncounted(skeleton: Skeleton) -> dict[str, set[str]]:
    """Block of the files beyond those that config.json counts -> its leaves, inside the block.

    A block of the model holds nothing that no counted block holds, and transformers does not say
    that it leaves it out. Layers for other ends are none: a layer that predicts further tokens has
    projections of its own.
    """
    prefix, counted = _counted(skeleton)
    ignored = [*map(re.compile, skeleton.model._keys_to_ignore_on_load_unexpected or ())]
    beyond: dict[str, set[str]] = {}
    for name in chain.from_iterable(leaves_by_file(skeleton.checkpoint)):
        match = _inside(prefix).fullmatch(name)
        if match is None or int(match[1]) < len(skeleton.blocks):
            continue
        if not any(pattern.search(name) for pattern in ignored):
            beyond.setdefault(f"{prefix}{match[1]}", set()).add(match[2])
    return {block: leaves for block, leaves in beyond.items() if leaves <= counted}


def _counted(skeleton: Skeleton) -> tuple[str, set[str]]:
    """The part of names in front of a block's number, and the leaves of the counted blocks, each
    by its name inside its block."""
    first, *others = (_names_of(skeleton, path) for path in skeleton.blocks)
    shared = set(chain.from_iterable(others))  # of tensors that several blocks use
    prefix = _prefix([name for name in first if name not in shared])
    matches = map(_inside(prefix).fullmatch, chain(first, *others))
    return prefix, {match[2] for match in matches if match}


def _names_of(skeleton: Skeleton, path: str) -> list[str]:
    """What the files call the tensors of a block."""
    pieces = skeleton.names.block_names(path).values()
    return [piece.name for piece in chain.from_iterable(pieces)]


def _inside(prefix: str) -> re.Pattern[str]:
    """Matches a name inside a block: the block's number, and the rest."""
    return re.compile(rf"{re.escape(prefix)}(\d+)\.(.+)")


def _prefix(names: list[str]) -> str:
    """The part of the first block's names in front of its number."""
    parts = [name.split(".") for name in names]
    common = [part for part, *others in zip(*parts) if all(other == part for other in others)]
    owners = common[: min(map(len, parts)) - 1]
    number = max((i for i, part in enumerate(owners) if part == "0"), default=0)
    return "".join(f"{part}." for part in common[:number])


def refuse_uncounted(skeleton: Skeleton) -> None:
    """Refuse files with more blocks than config.json counts: without them it is another model."""
    blocks = sorted(uncounted(skeleton))
    if blocks:
        raise QlabError(
            f"{skeleton.checkpoint.path} holds the block {blocks[0]}, and its config.json counts "
            f"{len(skeleton.blocks)} blocks; correct that number, or remove the tensors that do "
            "not belong"
        )
