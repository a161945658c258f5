"""Which parameters of a model are one: those that config.json and the model's class tie, as far as
the files agree."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

FLAG = "tie_word_embeddings"


def ties(
    model: PreTrainedModel, in_files: Callable[[str], bool], equal: Callable[[str, str], bool]
) -> dict[str, str]:
    """Parameter -> the parameter that it is one with.

    Two parameters are one where the files lack one of them or hold both with the same bits. A
    parameter that they hold with other bits is its own.

    in_files: whether the files hold a parameter. equal: whether they hold two with the same bits.
    """
    groups: dict[str, list[str]] = {}
    for name, other in model.all_tied_weights_keys.items():
        groups.setdefault(other, [other]).append(name)
    tied: dict[str, str] = {}
    for source, names in groups.items():
        keeper = next((name for name in names if in_files(name)), source)
        others = [name for name in names if name != keeper]
        tied |= {name: keeper for name in others if not in_files(name) or equal(name, keeper)}
    return tied


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
