"""A step that measures the whole model, and whose value becomes the next part of the recipe.

A bind is one element of a recipe. The steps in front of it make the model that it measures; the
driver runs it before the steps behind it, and puts what it returns in its place.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlab.algebra.graph import ModuleGraph
from qlab.algebra.spec import Spec
from qlab.algebra.stats import Stats
from qlab.algebra.transform import Stage, Transform, unchanged
from qlab.algebra.views import WholeModel
from qlab.errors import QlabError


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A model as it is known before anything runs.

    Args:
        segments: its segments without their leaves, each with the sites of the bind selected.
        shapes: full name of such a site -> the shape [..., o, k] of its weight.
        rounded: full name of such a site -> what the steps in front of the bind round it to, of
            those that are rounded; None where another bind decides that.
        windows: the number of calibration windows; 0 where none are given.
    """

    segments: Sequence[ModuleGraph]
    shapes: Mapping[str, torch.Size]
    rounded: Mapping[str, Spec] | None
    windows: int


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What a measurement will run, and hold.

    Args:
        forward: how many windows go forward through the whole model.
        backward: how many go forward and backward.
        at_once: of how many of them what passes between segments is held together.
        in_a_pass: how many windows one pass backward has.
        summed: bytes of the gradients that such a pass adds up over its windows.
        kept: of how many windows final hidden states are held, as those of the reference are.
        learned: how many numbers are learned, of which moments and copies are held.
        moments: how many second moments of its input each weight of it gets behind it.
        copies: as how many copies of its weights in fp32 a segment is held while it runs.
        as_stored: whether it runs in bfloat16 where the model is stored so, for which what lies
            around the segments is held once more.
    """

    forward: int = 0
    backward: int = 0
    at_once: int = 0
    in_a_pass: int = 0
    summed: int = 0
    kept: int = 0
    learned: int = 0
    moments: int = 0
    copies: int = 1
    as_stored: bool = False


Measure = Callable[[Any], Any]  # qlab.Model -> a value
Foresee = Callable[[Outline], Foreseen | None]
Then = Callable[[Any], Transform]  # the value -> the next part of the recipe
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype)


@dataclass(frozen=True, kw_only=True)
class Bind(Stage):
    """A measurement whose value decides the next part of a recipe; see `bind`.

    among: the recipes of which the value gives each weight one, where that is known before. budget:
    the bits per weight that they may take. divided: whether all ranks of a run measure together.
    """

    measure: Measure
    then: Then
    foresee: Foresee
    among: tuple[Transform, ...] = ()
    budget: float | None = None
    divided: bool = False


@dataclass(frozen=True)
class Bound(Stage):
    """What is left of a bind in a recipe when it was run: a step that changes nothing. Its detail
    tells one value from another."""


def unforeseen(outline: Outline) -> None:
    """Of a measurement of which nothing is known beforehand."""


def bind(
    name: str,
    measure: Measure,
    then: Then,
    detail: str = "",
    foresee: Foresee = unforeseen,
    spec: Spec | None = None,
    divided: bool = False,
) -> Transform:
    """Measure the whole model, and go on with what the value says: then(measure(model)).

    The steps in front of it make the model that is measured; without any it is the unquantized one.
    What they made is kept, and the steps behind go on from there, block by block.

    Args:
        name: The step's name in plans, reports and errors.
        measure: Gets a `qlab.Model` and returns a value: numbers, texts, tensors, or mappings,
            sequences and dataclasses of these. Gradients are on while it runs.
        then: Gets the value, and returns a recipe. `at` and `rules` around the bind restrict it.
        detail: Settings in words, for plans and reports.
        foresee: Gets a `qlab.algebra.bind.Outline` when the recipe is planned, before anything
            runs. It returns what the measurement will run (`qlab.algebra.bind.Foreseen`), or None
            where it does not know, and raises a QlabError where it cannot work.
        spec: The grid to which `then` rounds every weight of the bind, where that is known
            beforehand; a plan checks it then.
        divided: Whether several ranks measure together. Each of them calls `measure` then, and runs
            its own windows forward and backward: losses and gradients are those of all, and what
            sinks and operations note of windows is put together by `Model.of_all_windows`. All
            ranks have to return the same value. By default rank 0 measures, and tells the others.

    Returns:
        A transform of one stage, which is measured when the recipe is used.

    Raises:
        QlabError: When it is measured: measure raises or returns what has no identity, then returns
            no recipe, or ranks measured different values.

    Example:
        >>> import qlab
        >>> def widest(model):
        ...     def of_block(most, path, graph):
        ...         sizes = [float(graph.weight_ok(site).abs().max()) for site in graph.sites]
        ...         return max(most, *sizes)
        ...     return model.fold(of_block, 0.0)
        >>> def by_width(most):
        ...     return qlab.rtn("int8-channel" if most > 1000 else "int4-g64")
        >>> recipe = qlab.bind("by_width", widest, by_width)
        >>> qlab.apply(qlab.open("demo"), recipe, None).bits_per_weight
        4.25
    """
    view = WholeModel()
    apply = _unmeasured(name)
    stage = Bind(
        name,
        frozenset(),
        apply,
        view,
        spec=spec,
        detail=detail,
        measure=measure,
        then=then,
        foresee=foresee,
        divided=divided,
    )
    return (stage,)


def uses_data(recipe: Transform) -> bool:
    """Whether a recipe observes statistics, or measures a whole model, and so may read calibration
    data."""
    return any(stage.needs or isinstance(stage, Bind) for stage in recipe)


def marked(bind: Bind, value: Any) -> Bound:
    """The step that is left of a bind with this value."""
    detail = f"{bind.detail}, " if bind.detail else ""
    return Bound(
        bind.name,
        frozenset(),
        unchanged,
        WholeModel(),
        detail=f"{detail}value {digest(bind.name, value)}",
        scope=bind.scope,
    )


def returned(bind: Bind, value: Any) -> Transform:
    """What a bind's value makes of the recipe, on the sites of the bind alone."""
    transform = bind.then(value)
    if isinstance(transform, Stage):
        transform = (transform,)
    is_recipe = isinstance(transform, tuple) and all(isinstance(s, Stage) for s in transform)
    if not is_recipe:
        raise QlabError(
            f"the bind {bind.name!r} returned a {type(transform).__name__}, which is no recipe; "
            "return what rtn(spec), chain(...) or rules(...) returns, or keep() to change nothing"
        )
    return narrowed(bind, transform)


def narrowed(bind: Bind, transform: Transform) -> Transform:
    """A recipe on the sites of a bind alone."""
    return tuple(_narrowed(bind, stage) for stage in transform)


def over_budget(name: str, least: float, budget: float) -> QlabError:
    """Why a budget of bits per weight is below what the smallest choices take."""
    return QlabError(
        f"the smallest choices of {name} take {least:.3f} bits per weight and the budget is "
        f"{budget:g}; give more bits, or a smaller choice"
    )


def _narrowed(bind: Bind, stage: Stage) -> Stage:
    scope = replace(
        stage.scope,
        include=(*bind.scope.include, *stage.scope.include),
        exclude=(*stage.scope.exclude, *bind.scope.exclude),
    )
    return replace(stage, scope=scope)


def _unmeasured(name: str) -> Callable[[ModuleGraph, Stats], Any]:
    def apply(graph: ModuleGraph, stats: Stats) -> Any:
        raise QlabError(
            f"the bind {name!r} measures a whole model, and here is one block; give the recipe to "
            "qlab.apply or qlab.quantize"
        )

    return apply


def digest(name: str, value: Any) -> str:
    """What tells one value of a bind from another, for the identity of a job: 16 hex digits."""
    hashed = hashlib.sha256()
    for part in _bytes_of(name, value):
        hashed.update(part)
    return hashed.hexdigest()[:16]


def _bytes_of(name: str, value: Any) -> Iterator[bytes]:
    """The value as bytes, part by part. Refuses what has no identity beside its address."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)};".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, PLAIN):
        yield f"{kind} {value!r};".encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)};".encode()
        for key, each in value.items():
            yield from _bytes_of(name, key)
            yield from _bytes_of(name, each)
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)};".encode()
        for each in value:
            yield from _bytes_of(name, each)
    elif is_dataclass(value) and not isinstance(value, type):
        # what takes no part in comparing two values is no part of their identity
        compared = [field for field in fields(value) if field.compare]
        yield f"{kind} {len(compared)};".encode()
        for field in compared:
            yield from _bytes_of(name, getattr(value, field.name))
    else:
        raise QlabError(
            f"the bind {name!r} measured a {kind}, by which a run that is continued cannot tell "
            "one value from another; return numbers, texts, tensors, or mappings, sequences and "
            "dataclasses of these"
        )
