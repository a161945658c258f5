"""A step by rows is given a weight in parts of its rows, and makes what it makes of the whole."""

from dataclasses import replace

import pytest
import torch

from qlab import rtn
from qlab.algebra.graph import lone_weight
from qlab.algebra.qtensor import QTensor
from qlab.algebra.rounding import AT_ONCE
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, each_row, each_weight
from qlab.driver.solve import solve_alone
from qlab.methods.grid import GRIDS, encode, minmax

SPECS = [
    "int4-g16",
    "int3-g32-asym",
    "int8-channel",
    "int8-tensor",
    "int4-b8x16",
    "fp8-b8x16",
    "mxfp4",
    "nvfp4",
]
UNWEIGHTED = sorted(name for name, grid in GRIDS.items() if not grid.weighted)
ROWS, WIDTH = 21, 64  # the last block of rows is not whole
PARTS = "qlab.algebra.rounding.AT_ONCE"


def segment(layout="o k", dtype=torch.bfloat16):
    shape = (ROWS, WIDTH) if layout == "o k" else (WIDTH, ROWS)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float32)
    graph = lone_weight("proj", W.to(dtype))
    (site,) = graph.code.sites
    return replace(graph, code=replace(graph.code, sites=(replace(site, layout=layout),)))


def same(a, b):
    """Whether two leaves hold the same bits."""
    parts = [(getattr(a, name), getattr(b, name)) for name in ("codes", "scales", "zeros", "outer")]
    return all(
        x is y if x is None else torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in parts
    )


def solved(graph, transform, monkeypatch, count=AT_ONCE):
    with monkeypatch.context() as patch:
        patch.setattr(PARTS, count)
        after = solve_alone(graph, transform)
    return after.params["weight"], after.notes["proj"]


@pytest.mark.parametrize("layout", ["o k", "k o"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_parts_of_rows_have_the_codes_and_errors_of_the_whole(name, dtype, layout, monkeypatch):
    graph = segment(layout, dtype)
    whole, noted = solved(graph, rtn(name), monkeypatch)
    leaf, notes = solved(graph, rtn(name), monkeypatch, count=WIDTH)
    assert same(leaf, whole)
    errors = ("weight_error", "largest_step")
    assert [notes[key] for key in errors] == pytest.approx([noted[key] for key in errors], 1e-6)
    assert {k: v for k, v in notes.items() if k not in errors} == {"grid": "minmax"}


@pytest.mark.parametrize("grid", UNWEIGHTED)
def test_no_grid_without_weights_sees_beyond_its_rows(grid, monkeypatch):
    graph, recipe = segment(), rtn("nvfp4" if grid == "four_six" else "int4-g16", grid)
    whole, _ = solved(graph, recipe, monkeypatch)
    assert same(solved(graph, recipe, monkeypatch, count=3 * WIDTH)[0], whole)


def test_zeros_of_a_mask_stay_in_every_part(monkeypatch):
    def halve(W_ok, stats, spec):
        return W_ok.masked_fill(W_ok.abs() <= W_ok.abs().median(), 0), {}

    recipe = chain(each_weight("halve", halve, None), rtn("int4-g16"))
    whole, _ = solved(segment(), recipe, monkeypatch)
    leaf, _ = solved(segment(), recipe, monkeypatch, count=WIDTH)
    assert same(leaf, whole) and int((leaf.codes == 0).sum()) >= ROWS * WIDTH // 2


def test_each_part_is_a_copy_with_the_rows_of_the_weight(monkeypatch):
    graph = segment(dtype=torch.float32)
    seen, before = [], graph.params["weight"].clone()

    def zeroing(W_ok, stats, spec):
        seen.append(W_ok.clone())
        leaf = encode(minmax, W_ok, spec)
        W_ok.zero_()
        return leaf, {}

    leaf, _ = solved(graph, each_row("zeroing", zeroing, parse_spec("int4-g16")), monkeypatch, 160)
    assert isinstance(leaf, QTensor) and [len(part) for part in seen] == [2] * 10 + [1]
    assert torch.equal(torch.cat(seen), before) and torch.equal(graph.params["weight"], before)
