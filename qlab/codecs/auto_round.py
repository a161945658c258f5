"""AutoRound: GPTQ's and AWQ's tensors under a config of its own; read only.

`packing_format` says in which layout the tensors are. `extra_config` changes keys for single
modules: the entry with a module's exact name counts, else the first one whose key, as a regular
expression, matches anywhere in the name (re.search). Symmetric scales may be negative.
Source: auto-round 0.16.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from qlab.algebra.spec import Spec
from qlab.codecs import awq, checks, gptq
from qlab.errors import QlabError

# packing_format -> the codec that reads the tensors
LAYOUTS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
# Keys beside the spec -> the values that qlab reads; the first is the default.
ALLOWED: Mapping[str, tuple] = {
    "data_type": ("int", None),
    "act_bits": (None, 16, 32),
    "rotation_config": (None, {}),
}


def layout(config: Mapping[str, Any]) -> str:
    """The name of the codec that reads the tensors of such a directory."""
    name = config.get("packing_format")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise QlabError(
            f"quantization_config has packing_format {name!r}; qlab reads {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[name]


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with a qweight among `names`; refuses a config that qlab does not
    read."""
    bits = awq.BITS if layout(config) == "awq" else gptq.BITS
    changes = config.get("extra_config") or {}
    if not isinstance(changes, Mapping) or not all(
        isinstance(value, Mapping) for value in changes.values()
    ):
        raise QlabError(
            "quantization_config has an `extra_config` that is no table of names with tables of "
            "changes; repair it"
        )
    modules = {name.rpartition(".")[0] for name in names}
    patterns = {key: _compiled(key) for key in changes if key not in modules}
    return {
        path: _spec(path, {**config, **_changes_of(path, changes, patterns)}, bits)
        for path in checks.modules_with("qweight", names)
    }


def _changes_of(
    path: str, changes: Mapping[str, Mapping], patterns: Mapping[str, re.Pattern[str]]
) -> Mapping[str, Any]:
    """The keys that `extra_config` changes for a module."""
    if path in changes:
        return changes[path]
    for key, pattern in patterns.items():
        if pattern.search(path):
            return changes[key]
    return {}


def _spec(path: str, keys: Mapping[str, Any], bits: Collection[int]) -> Spec:
    """The spec of a module, from the keys that hold for it."""
    for name, values in ALLOWED.items():
        if keys.get(name, values[0]) not in values:
            raise QlabError(
                f"{path} has {name} {keys[name]!r} in quantization_config; "
                "qlab reads plain int weights only"
            )
    return checks.read_spec(path, keys, bits)


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise QlabError(
            f"quantization_config has {key!r} in `extra_config`, which is neither a module of "
            f"this model nor a regular expression ({error})"
        ) from error
