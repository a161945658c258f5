"""The doors of the public functions: a table of the kind of every argument.

A door checks every argument, and looks up what is given by name, before any work
(qlab.arguments.kinds). It has the signature and the docstring of the function behind it.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from qlab.arguments import kinds
from qlab.errors import refusal_of

RUN: Mapping[str, kinds.Kind] = {
    "inputs": kinds.word,
    "dtype": kinds.dtype,
    "device": kinds.device,
    "memory": kinds.optional_whole,
    "overwrite": kinds.flag,
    "resume": kinds.flag,
    "calibrate_all_experts": kinds.flag,
    "codec": kinds.word,
    "target": kinds.optional_word,
}
METHOD: Mapping[str, kinds.Kind] = {"spec": kinds.spec, "grid": kinds.grid}
ROTATION: Mapping[str, kinds.Kind] = {"seed": kinds.whole, "draw": kinds.function}
ROTATIONS = ("rotate_heads", "rotate_online", "rotate_scores", "quarot", "incoherence")
WINDOWS: Mapping[str, kinds.Kind] = {
    "model": kinds.model,
    "samples": kinds.whole,
    "length": kinds.whole,
    "seed": kinds.whole,
}
# public function -> argument -> its kind
TAKES: Mapping[str, Mapping[str, kinds.Kind]] = {
    "open": {"name": kinds.folder},
    "tokens": WINDOWS,
    "image_samples": WINDOWS,
    "first_windows": {**WINDOWS, "count": kinds.optional_whole},
    "from_ids": {"model": kinds.model, "ids": kinds.ids},
    "quantize": {
        **RUN,
        "model": kinds.model,
        "recipe": kinds.recipe,
        "data": kinds.data,
        "out": kinds.path,
    },
    "apply": {**RUN, "model": kinds.model, "recipe": kinds.recipe, "data": kinds.data},
    "write": {**RUN, "quantized": kinds.quantized, "out": kinds.path},
    "compare": {
        **RUN,
        "model": kinds.model,
        "recipes": kinds.recipes,
        "data": kinds.data,
        "out": kinds.path,
    },
    "plan": {**RUN, "model": kinds.model, "recipe": kinds.recipe, "data": kinds.data},
    "quantize_files": {
        **RUN,
        "model": kinds.directory,
        "recipe": kinds.recipe,
        "out": kinds.path,
        "include": kinds.names,
        "exclude": kinds.names,
    },
    "convert": {
        **RUN,
        "model": kinds.directory,
        "out": kinds.path,
        "requantize": kinds.optional_spec,
    },
    "evaluate": {
        "model": kinds.read_model,
        "against": kinds.read_model,
        "data": kinds.windows,
        "device": kinds.device,
    },
    "perplexity": {"model": kinds.read_model, "data": kinds.windows, "device": kinds.device},
    "inspect": {"path": kinds.its_directory},
    "verify": {"directory": kinds.directory, "against": kinds.directory},
    "difference": {"one": kinds.evaluation, "other": kinds.evaluation},
    "over_seeds": {"run": kinds.function, "seeds": kinds.seeds},
    "logits": {"model": kinds.read_model, "ids": kinds.ids, "device": kinds.device},
    "lower": {
        "model": kinds.lowered,
        "device": kinds.device,
        "dtype": kinds.dtype,
        "dense_cache": kinds.flag,
    },
    "to_torchao": {"model": kinds.directory, "device": kinds.device},
    "rtn": METHOD,
    "awq": METHOD,
    "awq_scale": METHOD,
    "gptq": {
        **METHOD,
        "order": kinds.function,
        "damp": kinds.fraction,
        "block": kinds.whole,
        "sweeps": kinds.whole,
    },
    "gptaq": METHOD,
    "solver": {
        "spec": kinds.spec,
        "grid": kinds.function,
        "round": kinds.function,
        "damp": kinds.fraction,
    },
    "aim_held_out": {},
    "aim_at_reference": {"strength": kinds.fraction, "damp": kinds.fraction},
    **dict.fromkeys(ROTATIONS, ROTATION),
    "magnitude": {"pattern": kinds.pattern},
    "wanda": {"pattern": kinds.pattern},
    "sparsegpt": {"pattern": kinds.pattern, "damp": kinds.fraction},
    "smoothquant": {"alpha": kinds.fraction},
    "at": {"pattern": kinds.text, "transform": kinds.recipe},
    "outside": {"transform": kinds.recipe},
    "chain": {"transforms": kinds.recipe},
    "rules": {"table": kinds.table},
    "each_cell": {
        "name": kinds.text,
        "fn": kinds.function,
        "needs": kinds.needed,
        "spec": kinds.optional_spec,
        "detail": kinds.text,
    },
    "each_weight": {
        "name": kinds.text,
        "fn": kinds.function,
        "spec": kinds.optional_spec,
        "needs": kinds.needed,
        "detail": kinds.text,
    },
    "gauge": {
        "name": kinds.text,
        "wires": kinds.text,
        "choose": kinds.function,
        "needs": kinds.needed,
        "online": kinds.flag,
        "detail": kinds.text,
    },
    "each_block": {
        "name": kinds.text,
        "fn": kinds.function,
        "needs": kinds.needed,
        "spec": kinds.optional_spec,
        "detail": kinds.text,
        "visits": kinds.whole,
    },
    "auto_round": {
        **METHOD,
        "steps": kinds.whole,
        "windows": kinds.whole,
        "lr": kinds.optional_fraction,
    },
    "qat": {**METHOD, "steps": kinds.whole, "windows": kinds.whole, "lr": kinds.fraction},
    "auto_round_refine": {
        "steps": kinds.whole,
        "windows": kinds.whole,
        "lr": kinds.optional_fraction,
    },
    "insert": {
        "name": kinds.text,
        "wires": kinds.text,
        "make": kinds.function,
        "needs": kinds.needed,
        "detail": kinds.text,
    },
    "quantize_inputs": {"spec": kinds.spec, "static": kinds.measured},
    "kv_cache": {"spec": kinds.cache, "static": kinds.measured},
    "attention_inputs": {"spec": kinds.cache, "static": kinds.measured},
    "parse_spec": {"text": kinds.text, "symmetric": kinds.flag},
    "dense": {"leaf": kinds.leaf, "dtype": kinds.dtype},
    "reparametrize": {"graph": kinds.block},
}


def door(name: str, function: Any) -> Any:
    """A public function that checks its arguments; other public names, and functions that the
    table does not list, as they are."""
    if name == "METHODS":
        return {key: _checked(method, METHOD) for key, method in function.items()}
    return _checked(function, TAKES[name]) if name in TAKES else function


def _checked(function: Callable[..., Any], kind_of: Mapping[str, kinds.Kind]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    parameters = signature.parameters

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for argument, value in given.arguments.items():
            if argument not in kind_of:
                continue
            kind, parameter = kind_of[argument], parameters[argument]
            if parameter.kind is parameter.VAR_POSITIONAL:
                given.arguments[argument] = tuple(kind(each, argument) for each in value)
            elif value is not parameter.default:
                given.arguments[argument] = kind(value, argument)
        try:
            return function(*given.args, **given.kwargs)
        except BrokenPipeError:
            raise
        except (OSError, RecursionError) as error:
            raise refusal_of(error) from error

    return checked
