"""A config.json that asks for more than its files can hold, refused before that is built.

transformers makes a module for every block and expert, and computes constants (rotary frequencies,
masks, tables of positions) in their whole size, whatever config.json says. Parameters without
memory are counted while they are made. Where a number is large enough for constants to take memory,
all is first made without.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from qlab.errors import QlabError
from qlab.files.checkpoint import Checkpoint
from qlab.files.directory import CONFIG

# Of a model: beside the tensors of its files there are parts of joined ones, and ties.
PER_TENSOR, FEW, MANY = 16, 10_000, 1_000_000
MOST_NUMBERS = 2**36  # in one tensor: 1,000 experts of 8192 x 8192
CONSTANTS = 2**28  # bytes that any model may compute
# Numbers up to which tables of constants are small. Rotary bases are floats of a million and less.
SMALL: Mapping[type, float] = {int: 4096, float: 2.0**20}


def most_parameters(checkpoint: Checkpoint) -> int:
    """How many parameters a model of these files may have; MANY where there are no files."""
    tensors = len(checkpoint.stored)
    return PER_TENSOR * tensors + FEW if tensors else MANY


def has_large_numbers(checkpoint: Checkpoint) -> bool:
    """Whether config.json says a large number that is the size of no tensor."""
    sizes = {size for stored in checkpoint.stored.values() for size in stored.shape}
    return any(number not in sizes for number in _large_numbers(checkpoint.raw))


def refuse_large_parameters(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a parameter of more numbers than the files hold bits; without files, of more than any
    model has in one. model: all of it on meta."""
    held = sum(stored.nbytes for stored in checkpoint.stored.values())
    most = 8 * held if checkpoint.stored else MOST_NUMBERS
    for name, parameter in model.named_parameters():
        if parameter.numel() > most:
            shape = " x ".join(map(str, parameter.shape))
            there = f"its files hold {held:,} bytes" if checkpoint.stored else f"{most:,} is most"
            raise QlabError(
                f"{checkpoint.path / CONFIG} describes {name} of {shape} numbers, and {there}; "
                "correct its sizes, or download the model again"
            )


def refuse_large_constants(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a model whose constants would take more memory than its files. model: all of it on
    meta."""
    held = sum(stored.nbytes for stored in checkpoint.stored.values())
    constants = {name: buffer.nbytes for name, buffer in model.named_buffers()}
    if sum(constants.values()) > max(held, CONSTANTS):
        largest = max(constants, key=lambda name: constants[name])
        raise QlabError(
            f"{checkpoint.path / CONFIG} describes a model that computes {constants[largest]:,} "
            f"bytes of {largest}, and its files hold {held:,} bytes; check its sizes and numbers "
            "of positions"
        )


def _large_numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _large_numbers(inner)
    elif type(value) in SMALL and value > SMALL[type(value)]:
        yield value
