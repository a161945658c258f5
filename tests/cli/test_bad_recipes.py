"""Steps of one's own that go wrong, on the command line: one sentence, exit code 2, no folder."""

import pytest

import qlab.cli

RECIPES = """
import torch
import qlab

def shape(spec):
    return qlab.each_weight("mine", lambda W, stats, spec: (W[:, :-1], {}), None)

def off_grid(spec):
    def fn(weight):
        codes = weight.cell.leaf.with_codes(weight.cell.leaf.codes.float())
        codes.codes.fill_(99)
        return weight.cell.put(codes)
    return qlab.chain(qlab.rtn(spec), qlab.each_cell("mine", fn))

def off_support(spec):
    def fn(weight):
        return weight.cell.put(torch.ones(weight.cell.target.shape))
    return qlab.chain(qlab.magnitude("2:4"), qlab.each_cell("mine", fn), qlab.rtn(spec))

def nan(spec):
    return qlab.each_block("mine", lambda block: {
        site.path: block.weight(site.path) / 0 for site in block.segment.sites
    })

def other_function(spec):
    turn = qlab.gauge("mine", "*.down_proj:in", lambda turn: -torch.ones(turn.size))
    return qlab.chain(turn, qlab.rtn(spec))

def split(spec):
    return qlab.rules({"*q_proj": qlab.awq(spec), "*": qlab.rtn(spec)})

def no_recipe(spec):
    return qlab.bind("mine", lambda model: 1.0, lambda value: None)

def no_statistic(spec):
    return qlab.each_weight("mine", lambda W, stats, spec: (W, {}), None, {"second_momentum"})

def no_wire(spec):
    return qlab.chain(qlab.rtn(spec), qlab.insert("mine", "*:keys", lambda wire, stats: torch.neg))

def no_place(spec):
    halve = qlab.insert("mine", "*.up_proj:in", lambda wire, stats: lambda x: x / 2)
    return qlab.chain(qlab.rtn(spec), halve)

def other_shape(spec):
    cut = qlab.insert("mine", "*:value", lambda wire, stats: lambda x: x[..., :2])
    return qlab.chain(qlab.rtn(spec), cut)

def nothing_turns(spec):
    turn = qlab.gauge("mine", "*.gate_proj:out", lambda turn: torch.ones(turn.size))
    return qlab.chain(turn, qlab.rtn(spec))
"""
# recipe -> what the sentence names
WHILE_IT_RUNS = {
    "shape": ("layers.0.self_attn.q_proj", "(64, 63)"),
    "off_grid": ("layers.0.self_attn.q_proj", "[99, 99]"),
    "off_support": ("layers.0.self_attn.q_proj", "set to 0"),
    "nan": ("layers.0.self_attn.q_proj", "NaN or Inf"),
    "other_function": ("layers.0.mlp.down_proj:in", "positive scales"),
    "no_recipe": ("'mine' returned a NoneType", "no recipe"),
}
BEFORE_IT_RUNS = {
    "split": ("layers.0.self_attn.q_proj shares its input with", "splits them"),
    "no_statistic": ("'second_momentum'", "second_moment"),
    "no_wire": ("'mine' matches no wire", "layers.0.self_attn:key"),
    "no_place": ("layers.0.mlp.up_proj", "run-time"),
    "other_shape": ("layers.0.self_attn:value", "same shape"),
    "nothing_turns": ("nothing that can turn", "up_proj:out"),
}
OBSERVING = ("nan", "split", "no_statistic", "no_recipe")  # others take no text


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_recipes.py"
    path.write_text(RECIPES)
    return path


@pytest.mark.parametrize("command_name", ["plan", "quantize"])
@pytest.mark.parametrize("recipe", [*BEFORE_IT_RUNS, *WHILE_IT_RUNS])
def test_a_recipe_that_goes_wrong_is_one_sentence(
    command, file, saved, text, tmp_path, recipe, command_name
):
    out, before = tmp_path / "out", recipe in BEFORE_IT_RUNS
    if command_name == "plan" and not before:
        pytest.skip("a plan runs no step")
    arguments = [command_name, saved(), "--recipe", f"{file}:{recipe}", "--spec", "int4-g16"]
    small = ["--calib", text, "--samples", "2", "--length", "16"] if recipe in OBSERVING else []
    places = ["--out", out] if command_name == "quantize" else []
    code, _, error = command(qlab.cli.main, *arguments, *small, *places)
    lines = [line for line in error.strip().splitlines() if not line.startswith("quantizing")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("qlab: "), error
    assert all(word in lines[0] for word in {**BEFORE_IT_RUNS, **WHILE_IT_RUNS}[recipe])
    assert not out.exists()
