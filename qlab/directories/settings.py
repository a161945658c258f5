"""Whether two directories' config.json files say the same of the model."""

import math
from collections.abc import Mapping
from typing import Any

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.ties import FLAG

# relative: how far a float of a config.json may have come through the float32 of a GGUF file
ROUNDED = 1e-7
# Keys of config.json, at any depth, that change no number that the model computes. They say how
# weights are stored, which is checked by itself; who wrote the file with what; and where a
# generation begins, ends and keeps its past, which generation_config.json says too.
PROVENANCE = (
    "quantization_config",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "_attn_implementation_autoset",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
)


def differences(
    model: Checkpoint, reference: Checkpoint, mistied: bool
) -> dict[str, tuple[Any, Any]]:
    """Key -> the directory's value and the reference's, where they differ.

    A key that one of the two files lacks may be a default, or a setting that the other file has
    under a newer name: there transformers' reading of both decides, where it knows the
    architecture. The flag that ties a head counts only if the directory's files disagree with it:
    otherwise the head's tensors are compared.

    mistied: whether they disagree.
    """
    ours, theirs = settings_of(model.raw), settings_of(reference.raw)
    pairs = {key: (ours[key], theirs[key]) for key in ours.keys() & theirs.keys()}
    if ours.keys() != theirs.keys():
        read, expected = _as_transformers_reads(model), _as_transformers_reads(reference)
        if read is None or expected is None:
            read, expected = ours, theirs
        for key in (read.keys() | expected.keys()) - pairs.keys():
            pairs[key] = (read.get(key), expected.get(key))
    differing = {key: pair for key, pair in sorted(pairs.items()) if not same_setting(*pair)}
    if not mistied:
        differing = {key: pair for key, pair in differing.items() if _last(key) != FLAG}
    return differing


def _last(key: str) -> str:
    """The part of a dotted key behind its last dot."""
    return key.rpartition(".")[2]


def settings_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a configuration says of the model: dotted key -> value. A null says nothing."""
    settings: dict[str, Any] = {}
    for key, value in config.items():
        if key in PROVENANCE or value is None:
            continue
        if isinstance(value, dict):
            settings |= settings_of(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = value
    return settings


def _as_transformers_reads(model: Checkpoint) -> dict[str, Any] | None:
    """The settings with transformers' defaults, under the names of its present version; None where
    it does not know the architecture or refuses the file."""
    try:
        return settings_of(model.config.to_dict()) if model.known else None
    except QlabError:
        return None


def same_setting(ours: Any, theirs: Any) -> bool:
    """Whether two values of a configuration are one; NaN is NaN."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(same_setting, ours, theirs))
    if isinstance(ours, float) and isinstance(theirs, float):
        close = math.isclose(ours, theirs, rel_tol=ROUNDED)
        return close or repr(ours) == repr(theirs)
    return ours == theirs or repr(ours) == repr(theirs)
