"""Where a directory says what its codes mean, and codes that nothing there explains."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from qlab.codecs import LEGACY_CONFIGS
from qlab.errors import QlabError
from qlab.files.directory import CONFIG, WIDTHS, Stored, read_json

# compressed-tensors called the key otherwise at first.
KEY, OLD_KEY = ("quantization_config", "compression_config")


def explained(raw: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json with its quantization_config at the top level. Older writers put that into a file
    beside config.json."""
    try:
        said = said_in(raw, str(folder / CONFIG)) or _legacy(folder)
        return _without(raw) | ({KEY: said} if said else {})
    except RecursionError as error:
        raise QlabError(
            f"{folder / CONFIG} has objects inside each other without end; repair or download it "
            "again"
        ) from error


def said_in(raw: Mapping[str, Any], where: str) -> Any:
    """What a configuration says of codes, or None. A model of several parts may say it of one part,
    inside that one's configuration.

    What stands at the top goes before what stands inside, as for transformers; two parts that say
    different things are refused.
    """
    inside = [(place, said) for place, said in _inside(raw) if said]
    differing = [place for place, said in inside if said != inside[0][1]]
    if differing and not _said(raw):
        raise QlabError(
            f"{where} says what codes mean in {inside[0][0]} and, otherwise, in {differing[0]}; "
            f"qlab reads one {KEY} for a model"
        )
    return _said(raw) or next((said for _, said in inside), None)


def _said(config: Mapping[str, Any]) -> Any:
    """What a configuration says of codes itself. Older writers put it once more under its own name,
    beside the method's."""
    said = config.get(KEY) or config.get(OLD_KEY)
    if not isinstance(said, Mapping) or not isinstance(said.get(KEY), Mapping):
        return said
    return {**{key: value for key, value in said.items() if key != KEY}, **said[KEY]}


def _inside(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What the parts of a configuration say of codes, each with the part's dotted name."""
    for name, part in raw.items():
        if isinstance(part, Mapping) and name not in (KEY, OLD_KEY):
            yield f"{prefix}{name}", _said(part)
            yield from _inside(part, f"{prefix}{name}.")


def _legacy(folder: Path) -> dict[str, Any] | None:
    """What older writers put into a file of its own."""
    sections = [
        read(read_json(folder / name))
        for name, read in LEGACY_CONFIGS.items()
        if (folder / name).is_file()
    ]
    return sections[0] if sections else None


def _without(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says nothing of codes."""
    return {
        name: _without(part) if isinstance(part, Mapping) else part
        for name, part in raw.items()
        if name not in (KEY, OLD_KEY)
    }


def refuse_unexplained(
    folder: Path, stored: Mapping[str, Stored], quantized: Collection[str], beside: Collection[str]
) -> None:
    """Refuse codes outside the `quantized` modules and the tensors `beside` them, which the
    configuration explains: taken as they are, or left out, they would make another model."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name in stored:
        modules[name.rpartition(".")[0]].append(name)
    codes = [
        name
        for name, tensor in stored.items()
        if name not in beside
        and name.rpartition(".")[0] not in quantized
        and (_narrow(tensor) or _packed(name, stored, modules))
    ]
    if codes:
        says = (
            f"its {CONFIG} has no {KEY} that says what they mean; download it again, or restore "
            "that key"
        )
        raise QlabError(
            f"{folder} holds {codes[0]} and {len(codes) - 1} more tensors in "
            f"{stored[codes[0]].dtype}, and {says}"
        )


def _narrow(tensor: Stored) -> bool:
    """Floats of 8 bits and less mean nothing without their scales."""
    return _floats(tensor) and WIDTHS[tensor.dtype] <= 8


def _packed(name: str, stored: Mapping[str, Stored], modules: Mapping[str, list[str]]) -> bool:
    """Integers in the place of a weight: a matrix, or what is called one, with tensors such as
    scales beside it, in a module without a weight of floats. Indices have 64 bits."""
    tensor, (module, _, kind) = stored[name], name.rpartition(".")
    integers = tensor.dtype[0] in "IU" and WIDTHS[tensor.dtype] < 64
    matrix = len(tensor.shape) in (2, 3) and min(tensor.shape[-2:]) > 1
    if not integers or not (matrix or kind == "weight"):
        return False
    weight = stored.get(f"{module}.weight")
    beside = {*modules[module], *modules.get(name, ())} - {name, f"{module}.bias"}
    return bool(beside) and not (weight and _floats(weight))


def _floats(tensor: Stored) -> bool:
    return tensor.dtype.startswith(("F", "BF"))
