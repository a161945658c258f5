"""A model directory's Hugging Face model on paper: its modules with parameters on the meta device,
and where its blocks are."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qlab.algebra.experts import experts_forward
from qlab.errors import QlabError, first_line
from qlab.files.checkpoint import Checkpoint
from qlab.model.unbuilt import (
    has_large_numbers,
    most_parameters,
    refuse_large_constants,
    refuse_large_parameters,
)
from qlab.process.surroundings import Floats, foreign, parameters_on_meta

# the name under which transformers finds the forward of fused experts that traces on every device
EXPERTS = "qlab"
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


def on_paper(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on meta, each in the dtype in which transformers holds it when
    it loads the model in `dtype`."""
    try:
        config = copy.deepcopy(checkpoint.config)  # transformers writes into it
        most = most_parameters(checkpoint)
        with foreign, _no_values(), Floats(dtype):
            if has_large_numbers(checkpoint):
                with parameters_on_meta(most), torch.device("meta"):
                    empty = _made(copy.deepcopy(config))
                refuse_large_constants(checkpoint, empty)
                refuse_large_parameters(checkpoint, empty)
            with parameters_on_meta(most):
                model = _made(config).eval()
            run_experts_here(model)
        parts = [getattr(config, name, None) for name in config.sub_configs]
        for part in (config, *parts):
            if part is not None:
                part.dtype = dtype
        _widen(model, dtype)
        return model
    except QlabError:
        raise
    except Exception as error:  # whatever the model's own constructor raises
        raise QlabError(
            "transformers cannot build a causal language model from "
            f"{checkpoint.path}/config.json ({first_line(error)}); qlab quantizes those, and "
            "models of images and text around one"
        ) from error


@contextmanager
def _no_values() -> Iterator[None]:
    """Parameters are given no values while a model is built: on meta they hold none, and drawing
    them is most of the building."""
    drawing = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = lambda model: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = drawing  # type: ignore[method-assign]


def _made(config: PretrainedConfig) -> Any:
    # a dtype of its own would be the whole process's while it builds
    return maker_of(config).from_config(config, dtype=None, trust_remote_code=False)


def run_experts_here(model: PreTrainedModel) -> None:
    """Give a model's fused experts the forward that traces on every device.

    transformers before 5.8 takes no registered name as an option, but all read it from the config
    of the experts' module.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._experts_implementation = EXPERTS


def _widen(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Hold the tensors in float32 that the model's classes name so: transformers matches the names
    when it loads what the files hold."""
    # transformers 5.0.0 has the plan as an attribute
    has_method = hasattr(model, "_get_dtype_plan")
    plan: Any = model._get_dtype_plan(dtype) if has_method else model.dtype_plan
    loaded = model.state_dict(keep_vars=True)
    for pattern, wide in plan.items():
        expression = re.compile(pattern.replace("*", ".*"))
        for name, tensor in loaded.items():
            if not tensor.is_floating_point() or not expression.search(name):
                continue
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            if key in module._buffers:
                module._buffers[key] = tensor.to(wide)
            else:
                module._parameters[key] = nn.Parameter(tensor.to(wide), requires_grad=False)


def dtype_in(model: nn.Module, name: str) -> torch.dtype:
    """The dtype in which the model computes with a parameter or a buffer: that of the run, or
    the one that it has in every run."""
    owner, _, key = name.rpartition(".")
    return getattr(model.get_submodule(owner), key).dtype


def maker_of(config: PretrainedConfig) -> Any:
    """The auto class that makes the architecture that the config names: of text alone, or of images
    and text."""
    for maker in (AutoModelForCausalLM, AutoModelForImageTextToText):
        known: Any = maker._model_mapping.get(type(config), None)
        if known is not None and known.__name__ in (config.architectures or [known.__name__]):
            return maker
    return AutoModelForCausalLM


def find_blocks(model: PreTrainedModel) -> tuple[str, dict[str, nn.Module]]:
    """The path of the largest list of modules in the decoder that text goes through, and path ->
    block for each of them.

    transformers finds the decoder by its name, and some models give this name to their last
    product: where it holds no list, those of the whole model count.
    """
    decoder = path_of(model, model.get_decoder())
    modules = model.named_modules()
    every = {name: m for name, m in modules if isinstance(m, nn.ModuleList) and len(m)}
    lists = {name: m for name, m in every.items() if name.startswith(decoder)} or every
    inner = {name for name in lists if any(name.startswith(f"{other}.") for other in lists)}
    outer = {name: m for name, m in lists.items() if name not in inner}
    if not outer:
        raise QlabError(
            f"{type(model).__name__} has no list of blocks (nn.ModuleList) to stream through"
        )
    prefix = max(outer, key=lambda n: sum(p.numel() for p in outer[n].parameters()))
    return prefix, {f"{prefix}.{i}": block for i, block in enumerate(outer[prefix])}


def path_of(model: nn.Module, module: nn.Module | None) -> str:
    """The name of a module inside a model; "" for the model itself and for what it has not."""
    return next((name for name, m in model.named_modules() if m is module), "")
