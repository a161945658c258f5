"""The doors of the public functions: a table of the kind of every argument.

A door checks every argument, and looks up what is given by name, before any work
(qlab.arguments.kinds). It has the signature and the docstring of the function behind it.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from qlab.arguments import kinds, plain
from qlab.errors import refusal_of

RUN: Mapping[str, plain.Kind] = {
    "inputs": plain.word,
    "dtype": plain.dtype,
    "device": plain.device,
    "memory": plain.optional_whole,
    "overwrite": plain.flag,
    "resume": plain.flag,
    "calibrate_all_experts": plain.flag,
    "codec": plain.word,
    "target": plain.optional_word,
    "offload": plain.optional_path,
}
METHOD: Mapping[str, plain.Kind] = {"spec": kinds.spec, "grid": kinds.grid}
TUNING: Mapping[str, plain.Kind] = {
    "steps": plain.whole,
    "rate": plain.fraction,
    "windows": plain.whole,
    "held_out": plain.fraction,
}
ROTATION: Mapping[str, plain.Kind] = {"seed": plain.whole, "draw": plain.function}
ROTATIONS = (
    "rotate_heads",
    "rotate_online",
    "rotate_residual",
    "rotate_scores",
    "quarot",
    "incoherence",
)
WINDOWS: Mapping[str, plain.Kind] = {
    "model": kinds.model,
    "samples": plain.whole,
    "length": plain.whole,
    "seed": plain.whole,
}
# public function -> argument -> its kind
TAKES: Mapping[str, Mapping[str, plain.Kind]] = {
    "open": {"name": kinds.folder},
    "tokens": WINDOWS,
    "image_samples": WINDOWS,
    "first_windows": {**WINDOWS, "count": plain.optional_whole},
    "from_ids": {"model": kinds.model, "ids": kinds.ids},
    "quantize": {
        **RUN,
        "model": kinds.model,
        "recipe": kinds.recipe,
        "data": kinds.data,
        "out": plain.path,
        "keep_statistics": plain.optional_path,
    },
    "apply": {**RUN, "model": kinds.model, "recipe": kinds.recipe, "data": kinds.data},
    "write": {**RUN, "quantized": kinds.quantized, "out": plain.path},
    "compare": {
        **RUN,
        "model": kinds.model,
        "recipes": kinds.recipes,
        "data": kinds.data,
        "out": plain.path,
        "keep_statistics": plain.optional_path,
    },
    "plan": {
        **RUN,
        "model": kinds.model,
        "recipe": kinds.recipe,
        "data": kinds.data,
        "ranks": plain.whole,
    },
    "rehearse": {
        **RUN,
        "model": kinds.model,
        "recipe": kinds.recipe,
        "data": kinds.data,
        "blocks": plain.whole,
    },
    "quantize_files": {
        **RUN,
        "model": kinds.directory,
        "recipe": kinds.recipe,
        "out": plain.path,
        "include": plain.names,
        "exclude": plain.names,
    },
    "work": {"folder": plain.folder, "shard": plain.pair},
    "convert": {
        **RUN,
        "model": kinds.directory,
        "out": plain.path,
        "requantize": kinds.optional_spec,
    },
    "evaluate": {
        "model": kinds.read_model,
        "against": kinds.read_model,
        "data": kinds.windows,
        "device": plain.device,
    },
    "evaluate_tasks": {
        "model": kinds.solved_model,
        "tasks": plain.names,
        "folder": plain.optional_path,
        "server": plain.optional_text,
        "api_key": plain.text,
        "served_model_name": plain.text,
        "limit": plain.optional_whole,
        "shots": plain.optional_whole,
        "chat": plain.flag,
        "batch": plain.whole,
        "max_length": plain.optional_whole,
        "device": plain.device,
        "dtype": plain.dtype,
    },
    "perplexity": {"model": kinds.read_model, "data": kinds.windows, "device": plain.device},
    "inspect": {"path": kinds.its_directory},
    "verify": {"directory": kinds.directory, "against": kinds.directory},
    "difference": {"one": kinds.evaluation, "other": kinds.evaluation},
    "over_seeds": {"run": plain.function, "seeds": plain.seeds},
    "logits": {"model": kinds.read_model, "ids": kinds.ids, "device": plain.device},
    "lower": {
        "model": kinds.lowered,
        "device": plain.device,
        "dtype": plain.dtype,
        "dense_cache": plain.flag,
        "activations": plain.optional_word,
        "head": kinds.optional_spec,
    },
    "pipeline": {
        "model": kinds.model,
        "device": plain.device,
        "dtype": plain.dtype,
        "activations": plain.optional_word,
        "head": kinds.optional_spec,
        "rows": plain.whole,
        "max_length": plain.optional_whole,
    },
    "to_torchao": {"model": kinds.directory, "device": plain.device},
    "rtn": METHOD,
    "awq": METHOD,
    "awq_scale": {**METHOD, "inputs": kinds.optional_spec},
    "gptq": {
        **METHOD,
        "order": plain.function,
        "damp": plain.fraction,
        "block": plain.whole,
        "sweeps": plain.whole,
    },
    "gptaq": METHOD,
    "solver": {
        "spec": kinds.spec,
        "grid": plain.function,
        "round": plain.function,
        "damp": plain.fraction,
    },
    "guidedquant": {"spec": kinds.spec, "groups": plain.whole, "damp": plain.fraction},
    "aim_held_out": {},
    "aim_in_stream": {},
    "aim_at_reference": {"strength": plain.fraction, "damp": plain.fraction},
    **dict.fromkeys(ROTATIONS, ROTATION),
    "magnitude": {"pattern": kinds.pattern},
    "wanda": {"pattern": kinds.pattern},
    "sparsegpt": {"pattern": kinds.pattern, "damp": plain.fraction},
    "smoothquant": {"alpha": plain.fraction},
    "lqer": {"rank": plain.whole},
    "l2qer": {"rank": plain.whole},
    "eora": {"rank": plain.whole},
    "method": {"name": plain.text, "spec": kinds.spec},
    "scheme": {"name": plain.text},
    "at": {"pattern": plain.text, "transform": kinds.recipe},
    "outside": {"transform": kinds.recipe},
    "chain": {"transforms": kinds.recipe},
    "rules": {"table": kinds.table},
    "allocate": {
        "choices": kinds.choices,
        "bits": plain.bits,
        "sensitivity": plain.function,
    },
    "bind": {
        "name": plain.text,
        "measure": plain.function,
        "then": plain.function,
        "detail": plain.text,
    },
    "each_cell": {
        "name": plain.text,
        "fn": plain.function,
        "needs": kinds.needed,
        "spec": kinds.optional_spec,
        "detail": plain.text,
        "leaves": plain.text,
    },
    "each_weight": {
        "name": plain.text,
        "fn": plain.function,
        "spec": kinds.optional_spec,
        "needs": kinds.needed,
        "detail": plain.text,
    },
    "gauge": {
        "name": plain.text,
        "wires": plain.text,
        "choose": plain.function,
        "needs": kinds.needed,
        "online": plain.flag,
        "detail": plain.text,
    },
    "each_block": {
        "name": plain.text,
        "fn": plain.function,
        "needs": kinds.needed,
        "spec": kinds.optional_spec,
        "detail": plain.text,
        "visits": plain.whole,
        "leaves": plain.text,
        "by_weight": kinds.optional_schedule,
    },
    "auto_round": {
        **METHOD,
        "steps": plain.whole,
        "windows": plain.whole,
        "lr": plain.optional_fraction,
    },
    "qat": {**METHOD, "steps": plain.whole, "windows": plain.whole, "lr": plain.fraction},
    "kl_tune": TUNING,
    "qat_end_to_end": TUNING,
    "auto_round_refine": {
        "steps": plain.whole,
        "windows": plain.whole,
        "lr": plain.optional_fraction,
    },
    "insert": {
        "name": plain.text,
        "wires": plain.text,
        "make": plain.function,
        "needs": kinds.needed,
        "detail": plain.text,
    },
    "spinquant": {
        "spec": kinds.spec,
        "inputs": kinds.optional_spec,
        "steps": plain.whole,
        "rate": plain.fraction,
        "seed": plain.whole,
    },
    "quantize_inputs": {"spec": kinds.spec, "static": kinds.measured},
    "kv_cache": {"spec": kinds.cache, "static": kinds.measured},
    "kv_clipped": {"spec": kinds.cache},
    "attention_inputs": {"spec": kinds.cache, "static": kinds.measured},
    "parse_spec": {"text": plain.text, "symmetric": plain.flag},
    "dense": {"leaf": kinds.leaf, "dtype": plain.dtype},
    "reparametrize": {"graph": kinds.block},
}


def door(name: str, function: Any) -> Any:
    """A public function that checks its arguments; other public names, and functions that the
    table does not list, as they are."""
    if name == "METHODS":
        return {key: _checked(method, METHOD) for key, method in function.items()}
    return _checked(function, TAKES[name]) if name in TAKES else function


def _checked(function: Callable[..., Any], kind_of: Mapping[str, plain.Kind]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    parameters = signature.parameters

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}() of qlab: {error}; see help(qlab)") from None
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
