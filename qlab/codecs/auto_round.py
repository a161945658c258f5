"""AutoRound: GPTQ's and AWQ's tensors under a config of its own; read only.

`packing_format` says whose tensors they are, `extra_config` what is other for a module: its exact
name, else the first pattern found anywhere in it (re.search). Symmetric scales may be negative.
Source: auto-round 0.16.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from qlab.algebra.spec import Spec
from qlab.codecs import awq, checks, gptq
from qlab.errors import QlabError

LAYOUTS = {  # packing_format -> the codec that knows the tensors
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round": "gptq_v2",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}
# What a config may say besides a spec; the first value is meant when the key is absent.
ALLOWED: Mapping[str, tuple] = {
    "data_type": ("int", None),
    "act_bits": (None, 16, 32),
    "rotation_config": (None, {}),
}


def layout(config: Mapping[str, Any]) -> str:
    """The name of the codec for the tensors of such a directory."""
    name = config.get("packing_format")
    if not isinstance(name, str) or name not in LAYOUTS:
        raise QlabError(
            f"quantization_config has packing_format {name!r}; qlab reads {', '.join(LAYOUTS)}"
        )
    return LAYOUTS[name]


def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec]:
    """The spec of every module with a qweight among `names`; refuses by name what it cannot
    read."""
    bits = awq.BITS if layout(config) == "awq" else gptq.BITS
    extra = config.get("extra_config") or {}
    if not isinstance(extra, Mapping) or not all(
        isinstance(value, Mapping) for value in extra.values()
    ):
        raise QlabError(
            "quantization_config has an `extra_config` that is no table of names with tables of "
            "changes; repair it"
        )
    modules = {name.rpartition(".")[0] for name in names}
    patterns = {key: _compiled(key) for key in extra if key not in modules}
    found: dict[str, Spec] = {}
    for path in checks.modules_with("qweight", names):
        key = (
            path
            if path in extra
            else next((k for k, pattern in patterns.items() if pattern.search(path)), None)
        )
        module = {**config, **extra.get(key, {})}
        for name, values in ALLOWED.items():
            if module.get(name, values[0]) not in values:
                raise QlabError(
                    f"{path} has {name} {module[name]!r} in quantization_config; qlab reads plain "
                    "int weights only"
                )
        found[path] = checks.read_spec(path, module, bits)
    return found


def _compiled(key: str) -> re.Pattern[str]:
    try:
        return re.compile(key)
    except re.error as error:
        raise QlabError(
            f"quantization_config has {key!r} in `extra_config`, which is neither a module of "
            f"this model nor a regular expression ({error})"
        ) from error
