"""Blocks that the files hold and config.json does not count."""

import re

from qlab.errors import QlabError
from qlab.files.shardwise import leaves_by_file
from qlab.model.skeleton import Skeleton


def uncounted(skeleton: Skeleton) -> dict[str, set[str]]:
    """Block of the files beyond those that config.json counts -> its leaves, inside the block.

    Only what looks like a block of the model is one: it holds nothing that no counted block holds,
    as layers for other ends do (a prediction layer has projections of its own), and transformers
    does not say that it leaves it out.
    """
    held = {
        piece.name: index
        for index, path in enumerate(skeleton.blocks)
        for pieces in skeleton.names.block_names(path).values()
        for piece in pieces
    }
    prefix = _prefix([name for name, index in held.items() if index == 0])
    inside = re.compile(rf"{re.escape(prefix)}(\d+)\.(.+)")
    counted = {match[2] for name in held if (match := inside.fullmatch(name))}
    ignored = [
        re.compile(pattern) for pattern in skeleton.model._keys_to_ignore_on_load_unexpected or ()
    ]
    found: dict[str, set[str]] = {}
    for name in (name for file in leaves_by_file(skeleton.checkpoint) for name in file):
        match = inside.fullmatch(name)
        if (
            match
            and int(match[1]) >= len(skeleton.blocks)
            and not any(pattern.search(name) for pattern in ignored)
        ):
            found.setdefault(f"{prefix}{match[1]}", set()).add(match[2])
    return {block: leaves for block, leaves in found.items() if leaves <= counted}


def _prefix(names: list[str]) -> str:
    """What stands before the number of a block in the names of the first one's leaves."""
    parts = [name.split(".") for name in names]
    common = [part for part, *others in zip(*parts) if all(other == part for other in others)]
    at = max(
        (i for i, part in enumerate(common[: min(map(len, parts)) - 1]) if part == "0"), default=0
    )
    return "".join(f"{part}." for part in common[:at])


def refuse_uncounted(skeleton: Skeleton) -> None:
    """Refuse files with more blocks than config.json counts: whatever is made of the others, it is
    another model."""
    if blocks := sorted(uncounted(skeleton)):
        raise QlabError(
            f"{skeleton.checkpoint.path} holds the block {blocks[0]}, and its config.json counts "
            f"{len(skeleton.blocks)} blocks; correct that number, or remove the tensors that do "
            "not belong"
        )
