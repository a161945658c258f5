"""Whether two directories' config.json files say the same of the model."""

import math
from collections.abc import Mapping
from typing import Any

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.model.ties import FLAG

# relative: how far a float of a config.json may have come through the float32 of a GGUF file
ROUNDED = 1e-7
# Keys of config.json, at any depth, that change no number that the model computes: how weights are
# stored, which is checked by itself, who wrote the file with what, and where a generation begins,
# ends and keeps its past, which is generation_config.json's to say.
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
    """Key -> the directory's value and the reference's, where they differ. Whether a head is tied
    is all one where the directory's files agree with its config (not `mistied`): its tensors are
    compared.

    A key that one of the two files lacks may be a default, or what the other one says in newer
    words: there transformers' reading of both decides, where it knows the architecture.
    """
    ours, theirs = _settings(model.raw), _settings(reference.raw)
    found = {key: (ours[key], theirs[key]) for key in ours.keys() & theirs.keys()}
    if ours.keys() != theirs.keys():
        read, expected = _as_transformers_reads(model), _as_transformers_reads(reference)
        if read is None or expected is None:
            read, expected = ours, theirs
        found = {
            key: (read.get(key), expected.get(key)) for key in read.keys() | expected.keys()
        } | found
    says_nothing = set() if mistied else {key for key in found if key.rpartition(".")[2] == FLAG}
    return {
        key: pair
        for key, pair in sorted(found.items())
        if key not in says_nothing and not _same(*pair)
    }


def _settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a configuration says of the model: dotted key -> value. A null says nothing."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= {} if key in PROVENANCE else _settings(value, f"{prefix}{key}.")
        elif key not in PROVENANCE and value is not None:
            found[f"{prefix}{key}"] = value
    return found


def _as_transformers_reads(model: Checkpoint) -> dict[str, Any] | None:
    """The same with its defaults, by its present names; None where it does not know the
    architecture or refuses the file."""
    try:
        return _settings(model.config.to_dict()) if model.known else None
    except QlabError:
        return None


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a configuration are one; NaN is NaN."""
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if (
        isinstance(ours, float)
        and isinstance(theirs, float)
        and math.isclose(ours, theirs, rel_tol=ROUNDED)
    ):
        return True
    return ours == theirs or repr(ours) == repr(theirs)
