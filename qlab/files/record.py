"""qlab.json: what made a directory, and what is in it."""

import platform
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from qlab.algebra.spec import (
    InputSpec,
    Spec,
    parse_input_spec,
    spec_from_json,
    spec_json,
)
from qlab.codecs.around import SECTION as AROUND
from qlab.errors import QlabError
from qlab.files.certificate import hash_of_json, promised
from qlab.files.directory import read_json
from qlab.files.ownership import RECORD

PACKAGES = ("qlab", "torch", "transformers", "safetensors", "blake3")


def versions() -> dict[str, str]:
    """The versions of Python and of every package on which the written bytes depend."""
    by_package = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            by_package[name] = version(name)
        except PackageNotFoundError:
            by_package[name] = "not installed"
    return by_package


def bits_per_weight(rows: Mapping[str, Mapping[str, Any]]) -> float:
    """The mean over the weights of all sites; unquantized weights count at their stored width."""
    sizes = {name: torch.Size(row["shape"]).numel() for name, row in rows.items()}
    return sum(row["bits_per_weight"] * sizes[name] for name, row in rows.items()) / max(
        sum(sizes.values()), 1
    )


def recorded(directory: Path) -> dict[str, Any]:
    """The qlab.json of a directory that qlab wrote; {} for directories of others. Refuses one that
    somebody changed by hand."""
    record = read_json(directory / RECORD) if (directory / RECORD).is_file() else {}
    refuse_foreign_record(record, str(directory / RECORD))
    return record


def refuse_foreign_record(record: Any, where: str) -> None:
    """Refuse a record that does not hold what qlab writes there. where: of whom this is said."""
    fault = next(_faults(record), None)
    if fault:
        raise QlabError(
            f"{where}, {fault:.200} is not what qlab writes there; remove the file, or quantize "
            "again"
        )


def _faults(record: Any) -> Iterator[str]:
    """Where a record is not what qlab writes."""
    if not isinstance(record, dict):
        yield "no object, it"
        return
    for section, kinds in ROWS.items():
        rows = record.get(section, {})
        for name, row in rows.items() if isinstance(rows, dict) else [(section, None)]:
            if not isinstance(row, dict) or not _is_row(section, row, kinds):
                yield f"{section}, {name!r}"
    yield from (key for key, kind in KEYS.items() if not isinstance(record.get(key, kind()), kind))
    if not _are_rows(record.get(AROUND, {})):
        yield AROUND


def _is_row(section: str, row: Mapping[str, Any], kinds: Mapping[str, Any]) -> bool:
    if section == "certificates" and promised(row) is None:
        return False
    return all(_holds(row.get(key), kind) for key, kind in kinds.items())


def _holds(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind, and no whole number beyond all floats."""
    return isinstance(value, kind) and (not isinstance(value, int) or abs(value) < 2**1000)


def _are_rows(rows: Any) -> bool:
    """Whether these are rows of what happens at run time (`qlab.codecs.around.Rows`)."""
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        return False
    lists = [steps for places in rows.values() for steps in places.values()]
    if not all(isinstance(steps, list) for steps in lists):
        return False
    return all(_is_step(step) for steps in lists for step in steps)


def _is_step(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    return "tensor" not in step or all(isinstance(step.get(k), str) for k in ("tensor", "sha256"))


_MAYBE_FLOAT = (float, int, NoneType)
# section of qlab.json -> what its rows hold; None also stands for a key that a row does not have
ROWS: Mapping[str, Mapping[str, Any]] = {
    "sites": {
        "spec": (str, NoneType),
        "shape": (list, NoneType),
        "bits_per_weight": _MAYBE_FLOAT,
        "weight_error": _MAYBE_FLOAT,
        "loss": _MAYBE_FLOAT,
        "tokens": (int, NoneType),
    },
    "certificates": {
        "hash": (str, NoneType),
        "sha256": (str, NoneType),  # of older versions
        "weight_error": _MAYBE_FLOAT,
        "largest_step": _MAYBE_FLOAT,
        "made_of": (str, NoneType),
    },
    "unused": {"shape": list},
}
# other key of qlab.json -> what it holds
KEYS: Mapping[str, type] = {
    "job": dict,
    "changed": dict,
    "bits_per_weight": float,
    "quantization_config": str,
}


def spec_entries(
    spec: Spec | None, inputs: InputSpec | None = None, *, dtype: torch.dtype
) -> dict[str, Any]:
    """What the row of a site says of its specs; `spec_of` and `input_spec_of` read it.

    Each stands there by name. Where a name does not say all of it, as of scales in a dtype of their
    own, the whole stands beside it as "exact_spec" or "exact_inputs".

    Args:
        spec: Of the weight; None where it is dense.
        inputs: How the inputs are rounded at run time; None where they are not.
        dtype: The model's own, which scales have where a spec names none.
    """
    entries: dict[str, Any] = {"spec": None if spec is None else str(spec)}
    if spec is not None and not _is_named(spec, dtype):
        entries["exact_spec"] = spec_json(spec)
    if inputs is not None:
        entries["inputs"] = str(inputs)
        if not _is_named(inputs.spec, dtype):
            entries["exact_inputs"] = spec_json(inputs.spec)
    return entries


def _is_named(spec: Spec, dtype: torch.dtype) -> bool:
    """Whether the name of a spec says all of it, in a model of this dtype."""
    open_scales = replace(spec, scale_dtype=None) if spec.scale_dtype == dtype else spec
    return spec_json(open_scales).keys() == {"spec"}


def spec_of(row: Mapping[str, Any]) -> Spec | None:
    """The spec of a site's weight, from its row; None where it is dense."""
    if row["spec"] is None:
        return None
    return spec_from_json(row.get("exact_spec", {"spec": row["spec"]}))


def input_spec_of(row: Mapping[str, Any]) -> InputSpec | None:
    """How the inputs of a site are rounded, from its row; None where they are not."""
    if row.get("inputs") is None:
        return None
    if "exact_inputs" not in row:
        return parse_input_spec(row["inputs"])
    return InputSpec(spec_from_json(row["exact_inputs"]), row["inputs"].endswith(" static"))


def job_of(directory: Path) -> Any:
    """The job that a directory was made by, as its qlab.json has it; None where that cannot be
    read."""
    try:
        return read_json(directory / RECORD).get("job")
    except QlabError:
        return None


def written(
    config: Mapping[str, Any], job: Mapping[str, Any], notes: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The config.json and the qlab.json of a finished directory; the latter certifies what the
    former tells readers of the codes."""
    told = hash_of_json(config.get("quantization_config"))
    return {
        "config.json": config,
        RECORD: {
            **notes,
            "job": job,
            "bits_per_weight": bits_per_weight(notes["sites"]),
            "quantization_config": told,
        },
    }


def read_report(directory: Path) -> dict[str, Any]:
    """The qlab.json of a directory that qlab wrote; refuses directories without one."""
    record = recorded(directory)
    if not record:
        raise QlabError(
            f"{directory} has no {RECORD}, which `qlab quantize` writes; give a directory that "
            "qlab wrote"
        )
    return record
