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
    blocks = {
        piece.name: index
        for index, path in enumerate(skeleton.blocks)
        for pieces in skeleton.names.block_names(path).values()
        for piece in pieces
    }
    prefix = _prefix([name for name, index in blocks.items() if index == 0])
    inside = re.compile(rf"{re.escape(prefix)}(\d+)\.(.+)")
    leaves_counted = {match[2] for match in map(inside.fullmatch, blocks) if match}
    ignored = [
        re.compile(pattern) for pattern in skeleton.model._keys_to_ignore_on_load_unexpected or ()
    ]
    beyond: dict[str, set[str]] = {}
    for name in chain.from_iterable(leaves_by_file(skeleton.checkpoint)):
        match = inside.fullmatch(name)
        if match is None or int(match[1]) < len(skeleton.blocks):
            continue
        if not any(pattern.search(name) for pattern in ignored):
            beyond.setdefault(f"{prefix}{match[1]}", set()).add(match[2])
    return {block: leaves for block, leaves in beyond.items() if leaves <= leaves_counted}


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
