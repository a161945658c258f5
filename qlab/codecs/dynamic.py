"""`dynamic` in the configs of GPTQModel: patterns over module names, each with the keys that it
changes for these modules."""

import re
from collections.abc import Mapping
from typing import Any

from qlab.codecs.families import by_family, pattern
from qlab.errors import QlabError

Keys = tuple[tuple[str, Any], ...]  # the entries of a config that state a spec


def rules(named: Mapping[str, Keys | None], common: Keys) -> dict[str, dict[str, Any]]:
    """`dynamic` for the modules whose keys are not the common ones; keys of None skip a module.

    Patterns are anchored at both ends. A family (paths that differ in numbers only) whose members
    agree has one pattern. No module matches two patterns, so that their order, which sorted JSON
    loses, does not matter.
    """
    families = by_family(named)
    changes: dict[str, dict[str, Any]] = {}
    for path, keys in named.items():
        if keys == common:
            continue
        family = pattern(path)
        regex = family if len(set(families[family])) == 1 else re.escape(path)
        sign = "-" if keys is None else "+"
        changes[f"{sign}:^{regex}$"] = dict(keys or ())
    return changes


def override(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The config as it holds for one module: the first pattern in `dynamic` that matches (re.match)
    decides. `-:` before a pattern skips the module; `+:`, or no sign, changes keys."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(
        isinstance(value, Mapping) for value in dynamic.values()
    ):
        raise QlabError(
            "quantization_config has a `dynamic` that is no table of patterns with tables of "
            "changes; repair it"
        )
    for key, changes in dynamic.items():
        sign, regex = (key[:2], key[2:]) if key[:2] in ("-:", "+:") else ("+:", key)
        try:
            matched = re.match(regex, path)
        except re.error as error:
            raise QlabError(
                f"quantization_config has the pattern {key!r} in `dynamic`, which is no "
                f"regular expression ({error})"
            ) from error
        if matched and sign == "-:":
            raise QlabError(
                f"{path} has codes in the files, and {key!r} in `dynamic` says that it is not "
                "quantized; the file or its config is wrong"
            )
        if matched:
            return {**config, **changes}
    return dict(config)
