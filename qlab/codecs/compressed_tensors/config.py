"""`quantization_config`: which module is stored how, and what happens to its inputs at run time."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlab.algebra.spec import InputSpec, Spec, parse_input_spec, parse_spec
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
MARKS = (
    "weight_packed",
    "weight_scale",
    "compressed",
)  # one of these says that a module's weight is not stored as it is


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

    inputs: how inputs are rounded at run time, for the modules where they are. embeddings: those
    among the modules, which the class Linear does not target. Unquantized modules go to `ignore` by
    full name, a tied lm_head too.

    One scheme targets the class Linear. Several target full names, or one anchored pattern
    where all layers of a family share a scheme; no module matches two groups, so every reader's
    order of matching gives the same answer. Scale dtypes are not written unless they belong to the
    grid: the tensors say them.
    transformers quantizes nn.Linear only and loads a Conv1D named here at random: a plan refuses
    such modules.
    """
    schemes: dict[str, Scheme] = {}
    for path, spec in specs.items():
        if spec and (reason := refusal(spec)):
            raise QlabError(f"{path}: {reason}")
        if spec:
            schemes[path] = Scheme(_settled(spec), (inputs or {}).get(path))
    if bare := sorted(
        path for path, spec in (inputs or {}).items() if spec and path not in schemes
    ):
        raise QlabError(
            f"{bare[0]} has rounded inputs and an unquantized weight; qlab writes both or neither"
        )
    if not schemes:
        raise QlabError(
            f"none of the {len(specs)} modules is quantized; write the model without a "
            "quantization_config"
        )
    targets = _targets(schemes, embeddings)
    groups = {f"group_{i}": _group(scheme, targets[scheme]) for i, scheme in enumerate(targets)}
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": [path for path in specs if path not in schemes],
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _settled(spec: Spec) -> Spec:
    """The spec as a reader will know it: without the scale dtype where the tensors say it."""
    return (
        spec
        if spec.scale_dtype and spec.scale_dtype.itemsize == 1
        else replace(spec, scale_dtype=None)
    )


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
    """Disjoint targets per scheme: a pattern for a family (paths that differ in numbers only) of
    one scheme, else names."""
    if len(set(schemes.values())) == 1:
        return {
            scheme: [LINEAR, *sorted(schemes.keys() & embeddings)] for scheme in schemes.values()
        }
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
    """The spec of every module whose weight is not stored as it is among `names`, as
    compressed-tensors matches it; refuses by name what it cannot read. None: a dense weight in the
    2:4 format.

    `ignore` wins; then exact names, `re:` patterns (re.match, alphabetically), the class Linear.
    """
    return {path: scheme.spec for path, scheme in _schemes(config, names).items()}


def inputs(config: Mapping[str, Any], names: Collection[str]) -> dict[str, InputSpec]:
    """How inputs are rounded at run time, for every module among `names` where they are; matched as
    in `specs`."""
    return {
        path: scheme.inputs for path, scheme in _schemes(config, names).items() if scheme.inputs
    }


def _schemes(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Scheme]:
    sparse = _check_config(config)
    modules = {name.rpartition(".")[0] for name in names}
    targets: dict[str, Scheme] = {}
    for name, group in _mapping(config, "config_groups").items():
        scheme, group_targets = _read_group(
            f"config group {name}", name, group, config.get("format")
        )
        targets |= dict.fromkeys(group_targets, scheme)
    if unknown := {t for t in targets if not t.startswith("re:") and "." not in t} - {
        *CLASSES,
        *modules,
    }:
        raise QlabError(
            f"targets {sorted(unknown)} are no modules of this model; qlab knows the classes "
            f"{' and '.join(CLASSES)} only"
        )
    classes = {name: targets[name] for name in CLASSES if name in targets}
    ignored, named = (
        _matcher("ignore", _strings("ignore", config.get("ignore"))),
        _matcher("targets", targets.keys() - CLASSES),
    )

    def target(path: str) -> str | None:
        return named(path) or (written_with(path, classes, names) if classes else None)

    found: dict[str, Scheme] = {}
    for path, mark in sorted(
        {(p, mark) for p, _, mark in (name.rpartition(".") for name in names) if mark in MARKS}
    ):
        match = None if ignored(path) else target(path)
        scheme = Scheme(None) if match is None else targets[match]
        if scheme.spec is None and not (sparse and mark == "compressed"):
            raise QlabError(
                f"{path}.{mark} is in the files, and quantization_config names no spec for it; "
                "the file or its config is wrong"
            )
        found[path] = scheme
    return found


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
    """module path -> the target that takes precedence for it, or None."""
    names, patterns = frozenset(targets), {}
    for text in sorted(t for t in targets if t.startswith("re:")):
        try:
            patterns[text] = re.compile(text[3:])
        except re.error as error:
            raise QlabError(
                f"quantization_config has {key} {text!r}, no regular expression ({error})"
            ) from error
    fallback = LINEAR if LINEAR in names else None
    return lambda path: (
        path if path in names else next((t for t, p in patterns.items() if p.match(path)), fallback)
    )


def _check_config(config: Mapping[str, Any]) -> bool:
    """Refuse what qlab does not read; whether weights may be stored as 2:4."""
    groups, sparsity = _mapping(config, "config_groups"), _mapping(config, "sparsity_config")
    weights = any(
        not isinstance(group, Mapping) or group.get("weights") for group in groups.values()
    )
    if config.get("quant_method") != METHOD:
        raise QlabError(
            f"quantization_config has quant_method {config.get('quant_method')!r}; qlab reads "
            f"{METHOD!r}"
        )
    status = config.get(
        "quantization_status"
    )  # engines never look at it, and some writers leave it out
    if weights and status not in (None, "compressed"):
        raise QlabError(
            f"quantization_config has quantization_status {status!r}; qlab reads 'compressed'"
        )
    if sparsity.get("format", "dense") not in (
        "dense",
        SPARSE,
    ):  # old releases write {"format": "dense", ...}
        raise QlabError(
            f"quantization_config has sparsity_config {dict(sparsity)}; qlab reads dense and "
            f"{SPARSE} weights only"
        )
    if config.get("moe_sparsity_config"):
        raise QlabError(
            f"quantization_config has moe_sparsity_config {config['moe_sparsity_config']}; qlab "
            "does not apply it, and the model would be another"
        )
    return sparsity.get("format") == SPARSE


def _read_group(where: str, name: str, group: Any, default_format: Any) -> tuple[Scheme, list[str]]:
    if isinstance(group, list) and name.upper() in PRESETS:
        weights, rounded = PRESETS[name.upper()]
        scheme = Scheme(
            parse_spec(weights) if weights else None, parse_input_spec(rounded) if rounded else None
        )
        return scheme, _strings(f"{where} targets", group)
    if not isinstance(group, Mapping):
        raise QlabError(
            f"{where} is neither a scheme with `targets` nor a preset; qlab knows the presets "
            f"{', '.join(PRESETS)}"
        )
    if unknown := sorted(map(str, group.keys() - GROUP_KEYS)):
        raise QlabError(
            f"{where} has unknown key {unknown[0]!r}; qlab knows {', '.join(sorted(GROUP_KEYS))}"
        )
    if group.get("output_activations"):
        raise QlabError(
            f"{where} has output_activations {group['output_activations']}; qlab does not round "
            "outputs"
        )
    args = group.get("weights")
    spec = spec_of(f"{where} weights", args) if args is not None else None
    of_inputs = group.get("input_activations")
    rounded_inputs = (
        input_spec_of(f"{where} input_activations", of_inputs) if of_inputs is not None else None
    )
    if rounded_inputs and spec is None:
        raise QlabError(f"{where} rounds inputs of unquantized weights, which qlab does not read")
    form = group.get("format") or (None if default_format == MIXED else default_format)
    if form is not None:
        check_format(where, form, spec)
    return Scheme(spec, rounded_inputs), _strings(f"{where} targets", group.get("targets"))
