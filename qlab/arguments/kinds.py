"""The kinds of arguments that are qlab's own: models, specs, recipes, data, results. Each is a
function (value, name) -> value, as those of `plain`.

A kind takes a name or a path where that can only mean one thing: a spec, a grid, a model.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, TypeGuard

from qlab.arguments.plain import LARGEST, names, said, text
from qlab.errors import QlabError


def needed(value: Any, name: str) -> Any:
    """Names of statistics, and statistics of one's own (qlab.Stat)."""
    from qlab.algebra.statistic import Stat

    if isinstance(value, Stat):
        return frozenset({value})
    several = value if isinstance(value, list | tuple | set | frozenset) else ()
    own = frozenset(each for each in several if isinstance(each, Stat))
    others = [each for each in several if not isinstance(each, Stat)] if own else value
    return own | frozenset(names(others, name))


def model(value: Any, name: str) -> Any:
    """A model, or what it is opened from: its directory, or a result of qlab."""
    from qlab.demo import hub
    from qlab.files.checkpoint import Checkpoint

    if isinstance(value, Checkpoint):
        return value
    return hub.open(folder(value, name))


def read_model(value: Any, name: str) -> Any:
    """A model or what it is opened from, what a recipe makes of one, or a reading of a model."""
    from qlab.driver.apply import Quantized
    from qlab.evaluation.perplexity import Reading

    return value if isinstance(value, Reading | Quantized) else model(value, name)


def solved_model(value: Any, name: str) -> Any:
    """A model or what it is opened from, or what a recipe makes of one."""
    from qlab.driver.apply import Quantized

    return value if isinstance(value, Quantized) else model(value, name)


def lowered(value: Any, name: str) -> Any:
    """What a recipe makes of a model, or a directory."""
    from qlab.driver.apply import Quantized

    return value if isinstance(value, Quantized) else directory(value, name)


def quantized(value: Any, name: str) -> Any:
    """What a recipe makes of a model."""
    from qlab.driver.apply import Quantized

    return _instance(value, name, Quantized, "what qlab.apply returns")


def directory(value: Any, name: str) -> Any:
    """A model or its directory, which may have an architecture that transformers does not know."""
    from qlab.demo import hub
    from qlab.files.checkpoint import Checkpoint

    if isinstance(value, Checkpoint):
        return value
    where = folder(value, name)
    return hub.demo_model() if hub.is_demo_name(where) else where


def its_directory(value: Any, name: str) -> Any:
    """The directory of a model."""
    return getattr(directory(value, name), "path", None) or directory(value, name)


def folder(value: Any, name: str) -> Any:
    """The directory of a model, a result of qlab that has one, or 'demo'."""
    if not isinstance(value, str | os.PathLike):
        value = getattr(value, "path", value)
    if not isinstance(value, str | os.PathLike) or isinstance(os.fspath(value), bytes):
        raise QlabError(
            f"{name} is {said(value)}; give what qlab.open returns, a model's directory, or 'demo'"
        )
    where = os.fspath(value)
    if "\0" in where or not where.strip():
        raise QlabError(f"{name} is {said(where)}; give a model's directory, or 'demo'")
    if where.startswith("~") and os.path.expanduser(where) == where:
        raise QlabError(
            f"{name} {said(where)} is in the home of nobody known here; give the whole path"
        )
    try:
        # what is not there is 'demo', or a directory that is refused when it is opened
        with suppress(FileNotFoundError):
            os.stat(os.path.expanduser(where))
    except OSError as error:
        raise QlabError(
            f"{name} {said(where)} cannot be read ({error.strerror}); check the path"
        ) from error
    return value


def spec(value: Any, name: str) -> Any:
    """A spec, or its name."""
    from qlab.algebra.spec import Float, Int, parse_spec

    if isinstance(value, str):
        return parse_spec(value)
    if not isinstance(value, Int | Float):
        raise QlabError(f"{name} is {said(value)}; give a spec, or its name such as 'int4-g64'")
    return value


def optional_spec(value: Any, name: str) -> Any:
    """A spec, its name, or None."""
    return value if value is None else spec(value, name)


def optional_schedule(value: Any, name: str) -> Any:
    """The schedule of a step that learns, or None."""
    from qlab.algebra.windows import Schedule

    if value is not None and not isinstance(value, Schedule):
        raise QlabError(
            f"{name} is {said(value)}; give the qlab.algebra.windows.Schedule with which the step "
            "learns, or None"
        )
    return value


def cache(value: Any, name: str) -> Any:
    """How a cache is rounded: a cache spec, a spec, or its name."""
    from qlab.algebra.spec import Float, Int
    from qlab.methods.kv import CacheSpec, cache_spec, parse_cache_spec

    if isinstance(value, str):
        return parse_cache_spec(value)
    if isinstance(value, Int | Float):
        return cache_spec(value)
    if not isinstance(value, CacheSpec):
        raise QlabError(f"{name} is {said(value)}; give a spec, or its name such as 'int8-head'")
    return value


def measured(value: Any, name: str) -> Any:
    """How a stored scale is measured, or its name."""
    from qlab.methods.inputs import RANGES, Range

    found = RANGES.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, Range):
        raise QlabError(f"{name} is {said(value)}; give one of qlab.RANGES: {', '.join(RANGES)}")
    return found


def grid(value: Any, name: str) -> Any:
    """A grid, or its name."""
    from qlab.algebra.grid import Grid
    from qlab.methods.grid import GRIDS

    grid = GRIDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(grid, Grid):
        raise QlabError(f"{name} is {said(value)}; give a grid of qlab.GRIDS: {', '.join(GRIDS)}")
    return grid


def recipe(value: Any, name: str) -> Any:
    """A transform: a tuple of stages, or a single stage."""
    from qlab.algebra.transform import Stage

    if isinstance(value, Stage):
        return (value,)
    if isinstance(value, tuple) and all(isinstance(stage, Stage) for stage in value):
        return value
    if callable(value):
        called = getattr(value, "__name__", "a method")
        raise QlabError(f"{name} is {called} and was not called; write {called}(spec)")
    raise QlabError(f"{name} is {said(value)}; give a recipe such as qlab.rtn('int4-g64')")


def recipes(value: Any, name: str) -> Any:
    """Names -> recipes."""
    if not isinstance(value, Mapping) or not value:
        raise QlabError(f"{name} is {said(value)}; give a mapping of names to recipes")
    return {key: recipe(each, f"{name}[{said(key)}]") for key, each in value.items()}


def choices(value: Any, name: str) -> Any:
    """Several recipes to choose from."""
    if not isinstance(value, list | tuple) or not value:
        raise QlabError(
            f"{name} is {said(value)}; give a list of recipes such as [qlab.rtn('int2-g64'), "
            "qlab.rtn('int4-g64')]"
        )
    return [recipe(each, f"{name}[{i}]") for i, each in enumerate(value)]


def table(value: Any, name: str) -> Any:
    """Patterns -> recipes; None keeps the sites as they are."""
    if not isinstance(value, Mapping):
        raise QlabError(
            f"{name} is {said(value)}; give a mapping such as {{'*.down_proj': recipe, '*': "
            "recipe}"
        )
    for key in value:
        text(key, "a pattern")
    return {
        key: None if each is None else recipe(each, f"the rule {key!r}")
        for key, each in value.items()
    }


def data(value: Any, name: str) -> Any:
    """Calibration data, or None."""
    if value is None or (hasattr(value, "batches") and hasattr(value, "describe")):
        return value
    raise QlabError(f"{name} is {said(value)}; give what qlab.tokens(model, texts) returns")


def windows(value: Any, name: str) -> Any:
    """Windows of tokens."""
    from qlab.data.calibration import Tokens

    if not isinstance(value, Tokens):
        raise QlabError(
            f"{name} is {said(value)}; give what qlab.first_windows or qlab.tokens returns"
        )
    if getattr(value.ids, "ndim", None) != 2:
        raise QlabError(
            f"the ids of {name} are no tensor [samples, length]; give them to qlab.from_ids"
        )
    return value


def ids(value: Any, name: str) -> Any:
    """Token ids [samples, length], as int64: a tensor, a numpy array, or lists."""
    import torch

    if _is_list(value):
        return torch.tensor(_rows(value, name), dtype=torch.long, device="cpu")
    if type(value).__name__ == "ndarray" and value.dtype.kind in "iu":
        value = torch.from_numpy(value)
    if not isinstance(value, torch.Tensor):
        raise QlabError(
            f"{name} is {said(value)}; give token ids [samples, length] as a tensor or as lists"
        )
    fractional = value.is_floating_point() or value.is_complex()
    if value.is_meta or fractional or value.dtype == torch.bool:
        kind = "without values, on the meta device" if value.is_meta else f"of {value.dtype}"
        raise QlabError(f"{name} is a tensor {kind}; token ids are whole numbers")
    if value.layout != torch.strided:
        raise QlabError(
            f"{name} is a tensor of the layout {value.layout}; give one with all of its numbers"
        )
    return value.long()  # torch has few operations for unsigned numbers


def _is_list(value: Any) -> TypeGuard[Sequence]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _rows(value: Sequence, name: str) -> list[list[int]]:
    """Lists of token ids; refuses lists of different lengths and other values."""
    rows = [list(row) if _is_list(row) else [] for row in value]
    lengths = {len(row) for row in rows}
    numbers = chain.from_iterable(rows)
    if (
        len(lengths) != 1
        or 0 in lengths
        or any(type(number) is not int or abs(number) > LARGEST for number in numbers)
    ):
        raise QlabError(
            f"{name} is a {type(value).__name__} and no list of equally long lists of whole "
            "numbers; give token ids [samples, length]"
        )
    return rows


def pattern(value: Any, name: str) -> Any:
    """Which weights a mask keeps: "2:4", or the share of zeros."""
    from qlab.methods.pattern import Pattern, parse_pattern

    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse_pattern(text(value, name))
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > LARGEST:
        raise QlabError(f"{name} is {said(value)}; give a pattern such as '2:4', or a share")
    return parse_pattern(value)


def leaf(value: Any, name: str) -> Any:
    """What a program holds in the place of a weight."""
    from qlab.algebra.leaf import is_leaf

    if not is_leaf(value):
        raise QlabError(f"{name} is {said(value)}; give a tensor, a QTensor or another leaf")
    return value


def evaluation(value: Any, name: str) -> Any:
    """What `evaluate` returns."""
    from qlab.evaluation.figures import Evaluation

    return _instance(value, name, Evaluation, "what qlab.evaluate returns")


def block(value: Any, name: str) -> Any:
    """The graph of a block."""
    from qlab.algebra.graph import ModuleGraph

    return _instance(value, name, ModuleGraph, "the graph that a stage is called with")


def _instance(value: Any, name: str, of: type, give: str) -> Any:
    if not isinstance(value, of):
        raise QlabError(f"{name} is {said(value)}; give {give}")
    return value
