"""Blocks of equal structure as one program. A twin of a block has the tensors of that block and all
else of the first block of its structure, its number among layers too: whatever compiles one twin
has compiled all of them.
"""

from collections.abc import Hashable, Mapping
from dataclasses import is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# attributes of these types are what a program may depend on
PLAIN = (bool, int, float, str, tuple, type(None), torch.dtype, FunctionType)
TENSORS = ("_parameters", "_buffers")


def kinds_of(blocks: Mapping[str, nn.Module]) -> list[int]:
    """For each block of a model, by its path and in running order, the number of the first one of
    its structure.

    Two structures are equal where classes, shapes and plain attributes are; an attribute that holds
    the block's own number or path is, too.
    """
    facts = [_facts(path, block) for path, block in blocks.items()]
    first: list[int] = []
    kinds: list[int] = []
    for number in range(len(facts)):
        alike = (kind for kind in first if _are_equal(facts[kind], kind, facts[number], number))
        kinds.append(next(alike, number))
        first += [number] if kinds[-1] == number else []
    return kinds


def twin(first: nn.Module, block: nn.Module) -> nn.Module:
    """A block's tensors in the structure of the first one."""
    tensors = {name: getattr(block, name) for name in TENSORS}
    children = {
        name: None if child is None else twin(child, block._modules[name])  # type: ignore[arg-type]
        for name, child in first._modules.items()
    }
    return copied(first, **tensors, _modules=children)


def replaced(model: Any, others: Mapping[str, nn.Module], path: str = "") -> Any:
    """A model with other modules in some places, which shares everything else with it."""
    if path in others:
        return others[path]
    inside = f"{path}." if path else ""
    if not any(name.startswith(inside) for name in others):
        return model
    children = {
        name: None if child is None else replaced(child, others, inside + name)
        for name, child in model._modules.items()
    }
    return copied(model, _modules=children)


def copied(module: nn.Module, **attributes: Any) -> Any:
    """A module of the same class and attributes, but for some."""
    other = object.__new__(type(module))
    other.__dict__ = {**module.__dict__, **attributes}
    return other


def _facts(path: str, block: nn.Module) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for inside, module in block.named_modules():
        facts[inside] = type(module)
        for name, value in vars(module).items():
            # a model's config is a dataclass too, one for all blocks, that may be changed
            if isinstance(value, PLAIN) or (is_dataclass(value) and isinstance(value, Hashable)):
                said = value.replace(path, "") if isinstance(value, str) else value
                facts[f"{inside}:{name}"] = said
        for kind in TENSORS:
            for name, tensor in getattr(module, kind).items():
                facts[f"{inside}:{name}"] = None if tensor is None else _form(tensor)
    return facts


def _form(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _are_equal(a: dict[str, Any], number: int, b: dict[str, Any], other: int) -> bool:
    return a.keys() == b.keys() and all(
        a[name] == b[name] or (type(a[name]), a[name], b[name]) == (int, number, other)
        for name in a
    )
