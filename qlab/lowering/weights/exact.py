"""A spec as text and back without loss, for operators, whose schemas take no values of classes.

The text is the spec's name. Where the name stands for another spec, the fields that differ follow
it: 'int4-g32 scale_dtype=float16 zero_dtype=float32'. Columns that share a scale over all rows,
which no name says, follow a name for the whole tensor: 'int8-tensor columns=16'.
"""

from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch

from qlab.algebra.spec import Spec, parse_spec
from qlab.algebra.tile import Tile

WHOLE = Tile(None, None)
COLUMNS = "columns"


def text_of(spec: Spec) -> str:
    """The text that `spec_of` reads."""
    if has_columns(spec):
        return f"{text_of(replace(spec, tile=WHOLE))} {COLUMNS}={spec.tile.cols}"
    named = parse_spec(str(spec))
    names = [field.name for field in fields(spec)]
    differing = [name for name in names if getattr(spec, name) != getattr(named, name)]
    values = [str(getattr(spec, name)).removeprefix("torch.") for name in differing]
    return " ".join([str(spec), *map("{}={}".format, differing, values)])


def has_columns(spec: Spec) -> bool:
    """Whether a scale covers some columns of all rows."""
    return spec.tile.rows is None and spec.tile.cols is not None


@cache
def spec_of(text: str) -> Spec:
    """The spec of a text; parsed once, since operators are given the text at every call."""
    name, *assignments = text.split(" ")
    changes: dict[str, Any] = {}
    for assignment in assignments:
        field, _, value = assignment.partition("=")
        if field == COLUMNS:
            changes["tile"] = Tile(None, int(value))
            continue
        changes[field] = {"True": True, "False": False, "None": None}.get(value)
        if field.endswith("dtype") and value != "None":
            changes[field] = getattr(torch, value)
    return replace(parse_spec(name), **changes)
