"""Which parameters are another's too: those that config.json and the model's class tie, as far as
the files agree."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

FLAG = "tie_word_embeddings"


def ties(
    model: PreTrainedModel, held: Callable[[str], bool], equal: Callable[[str, str], bool]
) -> dict[str, str]:
    """Parameter -> the one that it is too: one that the files lack, or hold equal to the other's.
    One that they hold apart is its own.

    held: whether the files hold a parameter. equal: whether they hold two of them alike.
    """
    groups: dict[str, list[str]] = {}
    for name, other in model.all_tied_weights_keys.items():
        groups.setdefault(other, [other]).append(name)
    found: dict[str, str] = {}
    for source, names in groups.items():
        keeper = next((name for name in names if held(name)), source)
        others = [name for name in names if name != keeper]
        found |= {name: keeper for name in others if not held(name) or equal(name, keeper)}
    return found


def apart(model: PreTrainedModel, tied: Mapping[str, str]) -> set[str]:
    """The parameters that config.json ties and the files hold apart."""
    declared = model.all_tied_weights_keys
    return {
        name for name, other in declared.items() if name not in tied and tied.get(other) != name
    }


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json whose head has a weight of its own."""
    parts = {
        key: untied(part)
        for key, part in config.items()
        if isinstance(part, dict) and (FLAG in part or key == "text_config")
    }
    return {**config, **parts, FLAG: False}
