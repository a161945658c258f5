"""Several recipes in one pass give the bytes of separate runs; a recipe that is refused leaves
nothing."""

from dataclasses import replace

import pytest
from model_folders import contents, random_tokens
from quick import WRITTEN

from qlab.algebra.grid import encode, minmax
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, each_weight
from qlab.directories.verify import verify
from qlab.driver.quantize import compare, quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptaq import aim_at_reference, gptaq
from qlab.methods.gptq import gptq
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g16")


@pytest.mark.parametrize("inputs", [{}, {"inputs": "reference"}])
def test_compare_gives_the_bytes_of_separate_runs_by_default_and_in_one_pass(
    inputs, saved, tmp_path
):
    """Of every method in one pass; in passes of their own, of a method of each kind."""
    source = saved()
    model, data = open_checkpoint(source), random_tokens(source)
    others = set(WRITTEN) - {"gptaq", "qronos-refined", "loaq-refined"}
    names = others if inputs else ("rtn", "gptq", "gptaq", "awq", "auto_round", "loaq-refined")
    recipes = {name: WRITTEN[name](INT4) for name in sorted(names)}
    together = compare(model, recipes, data, tmp_path / "all", **inputs)
    for name, recipe in recipes.items():
        alone = quantize(model, recipe, data, tmp_path / name, **inputs)
        assert contents(alone.path) == contents(together[name].path)
        assert alone.inputs == together[name].inputs == inputs.get("inputs", "quantized")


def quantize_beside_rtn(model, recipe, *args, **kwargs):
    return compare(model, {"rtn": rtn(INT4), "mine": recipe}, *args, **kwargs)


@pytest.mark.parametrize("door", [quantize, quantize_beside_rtn])
@pytest.mark.parametrize(
    "family, recipe, inputs, message",
    [
        (
            "llama",
            gptaq(INT4),
            "reference",
            r"'aim_at_reference' corrects how far inputs are .* use inputs='quantized', or",
        ),
        (
            "mixtral",
            chain(at("*experts*", aim_at_reference()), gptq(INT4)),
            "quantized",
            r"would change nothing of .*experts",
        ),
        (
            "mixtral",
            chain(gptq(INT4), at("*.gate", quantize_inputs(INT4))),
            "quantized",
            r"would change nothing: \*\.gate names routers",
        ),
    ],
)
def test_a_stage_without_an_effect_is_refused_before_anything_is_written(
    door, family, recipe, inputs, message, saved, tmp_path
):
    with pytest.raises(QlabError, match=message):
        door(
            open_checkpoint(saved(family)),
            recipe,
            random_tokens(saved(family)),
            tmp_path / "out",
            inputs=inputs,
        )
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_is_refused_halfway_leaves_nothing_and_the_one_before_it_whole(
    saved, tmp_path
):
    off_the_grid = lambda W, stats, spec: (
        replace(q := encode(minmax, W, spec), codes=q.codes + 9),
        {},
    )
    recipes = {"rtn": rtn(INT4), "mine": each_weight("mine", off_the_grid, INT4)}
    with pytest.raises(
        QlabError,
        match=r"layers\.0\..*weight: codes span \[.*\] and int4-g16 has \[-8, 7\]; round to the grid",  # noqa: E501
    ):
        compare(open_checkpoint(saved()), recipes, None, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rtn"]
    assert verify(tmp_path / "out" / "rtn", saved()).faults == []


def test_recipes_that_round_inputs_first_see_statistics_of_their_own(saved, tmp_path):
    source, rounded = saved(), quantize_inputs(parse_spec("int4-channel"))
    recipes = {"plain": gptq(INT4), "rounded": chain(rounded, gptq(INT4))}
    model, data = open_checkpoint(source), random_tokens(source)
    together = compare(model, recipes, data, tmp_path / "all", inputs="reference")
    alone = quantize(model, recipes["rounded"], data, tmp_path / "alone", inputs="reference")
    assert contents(alone.path) == contents(together["rounded"].path)
