"""`quantization_config`: which module is stored how, and what happens to its inputs at run time."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlab.algebra.spec import InputSpec, Spec, parse_input_spec, parse_spec
from qlab.codecs.checks import refuse_unheld, refuse_unquantized
from qlab.codecs.compressed_tensors.attentions import is_of_attentions
from qlab.codecs.compressed_tensors.classes import CLASSES, LINEAR, written_with
from qlab.codecs.compressed_tensors.scheme import (
    PRESETS,
    args_of,
    check_format,
    format_of,
    input_spec_of,
    refusal,
    spec_of,
)
from qlab.codecs.families import by_family, pattern
from qlab.errors import QlabError

METHOD, MIXED = "compressed-tensors", "mixed-precision"
VERSION = "0.20.0"  # the release whose layout and keys these files follow
GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
SPARSE = "sparse-24-bitmask"
# A module with one of these tensors has a weight that is not stored as it is.
MARKS = ("weight_packed", "weight_scale", "compressed")


# Of a model without a quantized weight.
DENSE: Mapping[str, Any] = {
    "config_groups": {},
    "format": "dense",
    "global_compression_ratio": None,
    "ignore": [],
    "kv_cache_scheme": None,
    "quant_method": METHOD,
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": VERSION,
}


@dataclass(frozen=True)
class Scheme:
    """What a config group says of its modules."""

    spec: Spec | None
    inputs: InputSpec | None = None


# ------------------------------------------------------------------ writing
def config(
    specs: Mapping[str, Spec | None],
    inputs: Mapping[str, InputSpec | None] | None = None,
    embeddings: Collection[str] = (),
) -> dict[str, Any]:
    """config.json's quantization_config for a model whose every nn.Linear is in `specs`; None is
    unquantized.

    inputs: how inputs are rounded at run time, for the modules where they are. embeddings: the
    modules that are embeddings; the class Linear does not target them. Unquantized modules go to
    `ignore` by full name, a tied lm_head too.

    A single scheme targets the class Linear. Several schemes target full names, or one anchored
    pattern where all members of a family have the same scheme. No module matches two groups, so
    that readers with different orders of matching agree. Scale dtypes are written only where they
    are part of the grid; elsewhere the tensors have them.

    transformers quantizes nn.Linear only, and loads a Conv1D that is named here with random
    weights: a plan refuses such modules.
    """
    rounded_inputs = {path: spec for path, spec in (inputs or {}).items() if spec}
    refuse_unheld(specs, refusal)
    schemes = {
        path: Scheme(_settled(spec), rounded_inputs.get(path))
        for path, spec in specs.items()
        if spec
    }
    unquantized = sorted(rounded_inputs.keys() - schemes.keys())
    if unquantized:
        raise QlabError(
            f"{unquantized[0]} has rounded inputs and an unquantized weight; "
            "qlab writes both or neither"
        )
    refuse_unquantized(specs)
    targets = _targets(schemes, embeddings)
    groups = {
        f"group_{number}": _group(scheme, names)
        for number, (scheme, names) in enumerate(targets.items())
    }
    formats = {group["format"] for group in groups.values()}
    return {
        **DENSE,
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "ignore": [path for path in specs if path not in schemes],
    }


def _settled(spec: Spec) -> Spec:
    """The spec as a config states it: without a scale dtype that the tensors state."""
    if spec.scale_dtype and spec.scale_dtype.itemsize == 1:
        return spec
    return replace(spec, scale_dtype=None)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    assert scheme.spec is not None  # only quantized modules have a group
    inputs = scheme.inputs and args_of(scheme.inputs.spec, scheme.inputs.static, of_inputs=True)
    return {
        "format": format_of(scheme.spec, scheme.inputs),
        "input_activations": inputs,
        "output_activations": None,
        "targets": targets,
        "weights": args_of(scheme.spec),
    }


def _targets(schemes: Mapping[str, Scheme], embeddings: Collection[str]) -> dict[Scheme, list[str]]:
    """Scheme -> its targets, which are disjoint: a pattern for a family whose members have one
    scheme, else names."""
    distinct = list(dict.fromkeys(schemes.values()))
    if len(distinct) == 1:
        return {distinct[0]: [LINEAR, *sorted(schemes.keys() & embeddings)]}
    families = by_family(schemes)
    targets: dict[Scheme, set[str]] = defaultdict(set)
    for path, scheme in schemes.items():
        family = pattern(path)
        members = families[family]
        agree = len(members) > 1 and len(set(members)) == 1
        targets[scheme].add(f"re:{family}$" if agree else path)
    return {scheme: sorted(names) for scheme, names in targets.items()}


# ------------------------------------------------------------------ reading
def specs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Spec | None]:
    """The spec of every module among `names` whose weight is not stored as it is; None is a dense
    weight in the 2:4 layout. Refuses a config that qlab does not read.

    Modules are matched as compressed-tensors matches them: `ignore` comes first, then exact names,
    then `re:` patterns (re.match, in alphabetical order), then the class Linear.
    """
    return {path: scheme.spec for path, scheme in _schemes(config, names).items()}


def inputs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, InputSpec]:
    """How inputs are rounded at run time, for every module among `names` where they are. Modules
    are matched as in `specs`."""
    return {
        path: scheme.inputs for path, scheme in _schemes(config, names).items() if scheme.inputs
    }


def _schemes(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Scheme]:
    """The scheme of every module among `names` whose weight is not stored as it is."""
    sparse = _check_config(config)
    targets = _read_targets(config, names)
    classes = {name: targets[name] for name in CLASSES if name in targets}
    ignored = _matcher("ignore", _strings("ignore", config.get("ignore")))
    named = _matcher("targets", targets.keys() - CLASSES)

    def target(path: str) -> str | None:
        if ignored(path):
            return None
        return named(path) or (written_with(path, classes, names) if classes else None)

    schemes: dict[str, Scheme] = {}
    for path, mark in sorted(_marked(names)):
        match = target(path)
        scheme = Scheme(None) if match is None else targets[match]
        if scheme.spec is None and not (sparse and mark == "compressed"):
            raise QlabError(
                f"{path}.{mark} is in the files, and quantization_config names no spec for it; "
                "the file or its config is wrong"
            )
        schemes[path] = scheme
    return schemes


def _marked(names: Collection[str]) -> set[tuple[str, str]]:
    """(module, last name of its tensor) of all tensors that say that a weight is not stored as it
    is."""
    parts = (name.rpartition(".") for name in names)
    return {(path, kind) for path, _, kind in parts if kind in MARKS}


def _read_targets(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Scheme]:
    """Target -> its scheme, of all config groups; refuses classes that qlab does not know."""
    targets: dict[str, Scheme] = {}
    for name, group in _mapping(config, "config_groups").items():
        if is_of_attentions(group, names):
            continue  # what attention reads is no weight (`attentions.py`)
        where = f"config group {name}"
        scheme, group_targets = _read_group(where, name, group, config.get("format"))
        targets |= dict.fromkeys(group_targets, scheme)
    modules = {name.rpartition(".")[0] for name in names}
    plain = {target for target in targets if not target.startswith("re:") and "." not in target}
    unknown = plain - {*CLASSES, *modules}
    if unknown:
        raise QlabError(
            f"targets {sorted(unknown)} are no modules of this model; "
            f"qlab knows the classes {' and '.join(CLASSES)} only"
        )
    return targets


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise QlabError(f"quantization_config has {key} {value!r}, no JSON object")
    return value


def _strings(key: str, value: Any) -> list[str]:
    if not isinstance(value or [], list) or not all(isinstance(text, str) for text in value or []):
        raise QlabError(f"quantization_config has {key} {value!r}, no list of names")
    return value or []


def _matcher(key: str, targets: Collection[str]) -> Callable[[str], str | None]:
    """A function from the path of a module to the target that takes precedence for it, or None."""
    names, patterns = frozenset(targets), {}
    for text in sorted(target for target in targets if target.startswith("re:")):
        try:
            patterns[text] = re.compile(text[3:])
        except re.error as error:
            raise QlabError(
                f"quantization_config has {key} {text!r}, no regular expression ({error})"
            ) from error
    fallback = LINEAR if LINEAR in names else None

    def match(path: str) -> str | None:
        if path in names:
            return path
        matching = (text for text, pattern in patterns.items() if pattern.match(path))
        return next(matching, fallback)

    return match


def _check_config(config: Mapping[str, Any]) -> bool:
    """Whether weights may be in the 2:4 layout; refuses a config that qlab does not read."""
    groups, sparsity = _mapping(config, "config_groups"), _mapping(config, "sparsity_config")
    weights = any(
        not isinstance(group, Mapping) or group.get("weights") for group in groups.values()
    )
    if config.get("quant_method") != METHOD:
        raise QlabError(
            f"quantization_config has quant_method {config.get('quant_method')!r}; "
            f"qlab reads {METHOD!r}"
        )
    # Engines do not read the status, and some writers leave it out.
    status = config.get("quantization_status")
    if weights and status not in (None, "compressed"):
        raise QlabError(
            f"quantization_config has quantization_status {status!r}; qlab reads 'compressed'"
        )
    # Old releases write {"format": "dense", ...} for weights that are not sparse.
    if sparsity.get("format", "dense") not in ("dense", SPARSE):
        raise QlabError(
            f"quantization_config has sparsity_config {dict(sparsity)}; "
            f"qlab reads dense and {SPARSE} weights only"
        )
    if config.get("moe_sparsity_config"):
        raise QlabError(
            f"quantization_config has moe_sparsity_config {config['moe_sparsity_config']}; "
            "qlab does not apply it, and the model would be another"
        )
    return sparsity.get("format") == SPARSE


def _read_group(where: str, name: str, group: Any, default_format: Any) -> tuple[Scheme, list[str]]:
    """A config group's scheme and its targets; a group may be the name of a preset with targets."""
    if isinstance(group, list) and name.upper() in PRESETS:
        return _preset(name.upper()), _strings(f"{where} targets", group)
    _check_group(where, group)
    args = group.get("weights")
    spec = spec_of(f"{where} weights", args) if args is not None else None
    input_args = group.get("input_activations")
    inputs = None
    if input_args is not None:
        inputs = input_spec_of(f"{where} input_activations", input_args)
    if inputs and spec is None:
        raise QlabError(f"{where} rounds inputs of unquantized weights, which qlab does not read")
    layout = group.get("format") or (None if default_format == MIXED else default_format)
    if layout is not None:
        check_format(where, layout, spec)
    return Scheme(spec, inputs), _strings(f"{where} targets", group.get("targets"))


def _preset(name: str) -> Scheme:
    weights, inputs = PRESETS[name]
    return Scheme(
        spec=parse_spec(weights) if weights else None,
        inputs=parse_input_spec(inputs) if inputs else None,
    )


def _check_group(where: str, group: Any) -> None:
    if not isinstance(group, Mapping):
        raise QlabError(
            f"{where} is neither a scheme with `targets` nor a preset; "
            f"qlab knows the presets {', '.join(PRESETS)}"
        )
    unknown = sorted(map(str, group.keys() - GROUP_KEYS))
    if unknown:
        raise QlabError(
            f"{where} has unknown key {unknown[0]!r}; qlab knows {', '.join(sorted(GROUP_KEYS))}"
        )
    if group.get("output_activations"):
        raise QlabError(
            f"{where} has output_activations {group['output_activations']}; "
            "qlab does not round outputs"
        )
