"""Directories whose config.json, quantization_config or qlab.json is changed at random."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import tiny
from rich.console import Console

from faults import Trial
from faults.inputs import READ, REFUSED, case, refusal
from faults.mutations import OUTSIDE, any_value, changed_json, text_of
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec
from qlab.directories.convert import convert
from qlab.directories.inspect import inspect
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.files.certificate import hash_of
from qlab.files.checkpoint import open_checkpoint
from qlab.files.directory import CONFIG
from qlab.files.ownership import RECORD
from qlab.methods.rtn import rtn
from qlab.model.skeleton import Skeleton

FAMILIES = ["llama", "gpt2", "mixtral", "deepseek_v3", "gemma3_text", "opt", "qwen2_vl", "mamba2"]
KEY = "quantization_config"
# Keys that no family's configuration has, and that libraries read.
MORE = {
    "text_config": {"num_hidden_layers": 10**9},
    "auto_map": {"AutoConfig": "../outside--code.Config", "AutoModelForCausalLM": "code.Model"},
    "configuration_files": ["config.json", "../outside/config.4.0.0.json", "config.4.0.0.json"],
    "_name_or_path": OUTSIDE[0],
    "architectures": ["NoSuchModel"],
    "torch_dtype": "float128",
    "dtype": "int4",
    "compression_config": {"quant_method": "awq"},
    "rope_scaling": {"type": "yarn", "factor": 1e300},
    "rope_parameters": {"rope_type": "longrope"},
    "head_dim": 10**9,
    "num_local_experts": 10**9,
    "max_position_embeddings": 10**12,
    "vision_config": {"depth": 10**9},
    "layer_types": ["full_attention"] * 3,
    "tie_word_embeddings": "no",
}


def linked(source: Path, folder: Path) -> Path:
    """A directory with links to the files of another, as snapshots of hubs have them."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    outside = source.parent / "outside"
    if outside.exists():
        (folder.parent / "outside").symlink_to(outside)
    return folder


def written(folder: Path, name: str, raw: bytes) -> None:
    """A file in the place of a link."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_bytes(raw)


def printed(path: Path) -> None:
    """What `qlab inspect` prints and stores."""
    held = inspect(path)
    console = Console()
    with console.capture():
        console.print(held)
    repr(held)
    held.json()


def configurations(shared: Path) -> Trial:
    """config.json of several families."""
    for family in FAMILIES:
        tiny(family).save_pretrained(shared / family)
    (shared / "outside").mkdir()
    (shared / "outside" / "config.4.0.0.json").write_text('{"model_type": "gpt2"}')

    def one(draw: random.Random, folder: Path) -> str:
        family = draw.choice(FAMILIES)
        config = json.loads((shared / family / CONFIG).read_bytes())
        if draw.random() < 0.2:
            key = draw.choice([*MORE])
            config[key] = MORE[key]
        folder = linked(shared / family, folder / "model")
        written(folder, CONFIG, text_of(draw, changed_json(draw, config)))
        said = [refusal(lambda: printed(folder))[1]]
        said += [refusal(lambda: open_checkpoint(folder).config)[1]]
        if not any(said) and draw.random() < 0.25:
            skeleton, refused = refusal(lambda: Skeleton(open_checkpoint(folder), torch.float32))
            said.append(refused)
            if not refused:
                _is_of_the_files(skeleton)
        return REFUSED if any(said) else READ

    return one


def _is_of_the_files(skeleton: Skeleton) -> None:
    """All that the model holds is no more than a few times what the files hold."""
    model, stored = skeleton.model, skeleton.checkpoint.stored.values()
    elements = sum(p.numel() for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers() if not b.is_meta)
    assert elements <= 4 * sum(s.nbytes for s in stored), "parameters that no file holds"
    assert buffers <= 2**26, f"buffers of {buffers} bytes"


SPECS = {
    "compressed-tensors": "int4-g32-asym",
    "gptq": "int4-g32-asym",
    "awq": "int4-g32-asym",
    "gptq_v2": "int8-channel",
    "fp8": "fp8-channel",
    "nvfp4": "nvfp4",
    "int8": "int8-channel",
    "mxfp4": "mxfp4",
}


def in_formats(shared: Path) -> dict[str, Path]:
    """A tiny model in formats that qlab writes, and what it was made of as `source`."""
    tiny("llama").to(torch.float16).save_pretrained(shared / "source")
    made: dict[str, Path] = {}
    for name, spec in SPECS.items():
        recipe = rtn(parse_spec(spec))
        first = quantize_files(shared / "source", recipe, shared / f"{name} first").path
        is_codec = name in ("gptq", "awq", "gptq_v2")
        made[name] = convert(first, name, shared / name).path if is_codec else first
    return made


def quantization_configs(shared: Path) -> Trial:
    """What config.json says of codes, in several formats. What is read must be the certified
    numbers, or verification says so."""
    made = in_formats(shared)

    def change(draw: random.Random, path: Path) -> tuple[str, bytes]:
        config = json.loads((path / CONFIG).read_bytes())
        was, config[KEY] = config[KEY], changed_json(draw, config[KEY])
        if draw.random() < 0.1:
            config[KEY] = {**made_of(draw), **(was if draw.random() < 0.5 else {})}
        return CONFIG, text_of(draw, config) if draw.random() < 0.1 else json.dumps(config).encode()

    def made_of(draw: random.Random) -> dict[str, Any]:
        other = json.loads((made[draw.choice([*made])] / CONFIG).read_bytes())[KEY]
        return {**other, draw.choice([*other]): any_value(draw)}

    return _verified(made, shared / "source", change)


def records(shared: Path) -> Trial:
    """qlab.json, by which a directory is verified."""

    def change(draw: random.Random, path: Path) -> tuple[str, bytes]:
        record = json.loads((path / RECORD).read_bytes())
        return RECORD, text_of(draw, changed_json(draw, record))

    return _verified(in_formats(shared), shared / "source", change)


def _verified(
    made: dict[str, Path],
    source: Path,
    change: Callable[[random.Random, Path], tuple[str, bytes]],
) -> Trial:
    """Directories with one file changed: read as they were, refused, or found by `verify`."""
    was = {name: _numbers(path) for name, path in made.items()}

    def one(draw: random.Random, folder: Path) -> str:
        name = draw.choice([*made])
        file, raw = change(draw, made[name])
        folder = linked(made[name], folder / "model")
        written(folder, file, raw)
        said = [refusal(lambda: printed(folder))[1]]
        numbers, refused = refusal(lambda: _numbers(folder))
        same = not refused and numbers == was[name]
        if not same or file == RECORD:
            verdict, said_of_it = refusal(lambda: verify(folder, source).faults)
            assert same or refused or said_of_it or verdict, "another model, and verify sees none"
        return REFUSED if refused or any(said) else READ

    return one


def _numbers(path: Path) -> dict[str, str]:
    """The weights that a directory means, by their hashes."""
    model = open_checkpoint(path)
    names = {f"{module}.weight" for module in model.quantized}
    names |= {n for n in model.stored if n.rpartition(".")[0] not in model.quantized}
    return {name: hash_of(dense(model.leaf(name), torch.float32)) for name in sorted(names)}


CASES = [
    case("configurations", configurations),
    case("quantization configs", quantization_configs),
    case("records", records),
]
