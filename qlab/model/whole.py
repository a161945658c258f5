"""A directory's model as transformers loads it, and how texts are generated with it."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import read_json
from qlab.model.paper import maker_of
from qlab.model.skeleton import Skeleton

GENERATION = "generation_config.json"


def load_whole(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of an unquantized directory. Refuses files that lack a tensor, which transformers
    would draw at random."""
    generation_config_of(checkpoint)  # transformers says less of a damaged one
    try:
        model, told = maker_of(checkpoint.config).from_pretrained(
            checkpoint.path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except QlabError:
        raise
    except Exception as error:  # whatever the model's own constructor raises
        Skeleton(checkpoint, dtype)  # says which tensor is of another model
        raise QlabError(
            f"transformers cannot load {checkpoint.path} ({first_line(error)}); check its "
            "config.json and its files"
        ) from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise QlabError(
            f"{checkpoint.path} has no tensor {missing[0]}, which the architecture "
            f"{checkpoint.raw.get('model_type')} needs; the download may be incomplete"
        )
    return model


def generation_config_of(checkpoint: Checkpoint) -> GenerationConfig | None:
    """What generation_config.json says; None where there is none. Refuses one that says tokens or
    numbers which are none."""
    file = checkpoint.path / GENERATION
    if not file.is_file():
        return None
    raw = read_json(file)
    wrong = [name for name, is_right in RIGHT.items() if not is_right(raw.get(name))]
    if wrong:
        raise QlabError(
            f"{file} has {wrong[0]} {raw[wrong[0]]!r:.100}, which does not belong there; repair "
            "or download it again"
        )
    try:
        return GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # whatever its own checks raise
        raise QlabError(
            f"transformers cannot read {file} ({first_line(error)}); repair or download it again"
        ) from error


def _is_number(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _are_tokens(value: Any) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return value is None or all(type(token) is int for token in tokens)


# key of generation_config.json that qlab reads -> whether it holds what belongs there
RIGHT = {
    "eos_token_id": _are_tokens,
    "do_sample": _is_flag,
    "temperature": _is_number,
    "top_k": _is_number,
    "top_p": _is_number,
}
