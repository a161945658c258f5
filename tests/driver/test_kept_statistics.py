"""Statistics that are kept: another recipe runs no block before its solver, and gives the bytes
that it gives without them."""

import shutil

import pytest
from model_folders import change, contents, random_tokens, refused

import qlab.driver.batches
import qlab.driver.observe
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.driver.quantize import compare, quantize
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.auto_round import auto_round
from qlab.methods.awq import awq_scale
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g16")


@pytest.fixture(scope="module")
def source(saved):
    return saved("llama")


@pytest.fixture
def copied(source, tmp_path_factory):
    """The model in a folder of the test's own."""
    return shutil.copytree(source, tmp_path_factory.mktemp("copied") / "model")


@pytest.fixture
def passes(monkeypatch):
    """How often a block was run on a batch, to observe it or to go on."""
    count = [0]

    def counted(module, name):
        run = getattr(module, name)

        def counting(*args, **kwargs):
            count[0] += 1
            return run(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    counted(qlab.driver.observe, "inputs_of")
    counted(qlab.driver.batches, "outputs_of")
    return count


@pytest.fixture
def made(source, tmp_path, passes):
    """made(recipe, kept, data) -> the bytes of the directory, and the runs of blocks on batches."""

    def make(recipe, kept=True, samples=80, seed=0, model=source):
        passes[0] = 0
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        quantize(
            open_checkpoint(model),
            recipe,
            random_tokens(model, samples, 32, seed),
            out,
            inputs="reference",
            keep_statistics=tmp_path / "kept" if kept else None,
        )
        return contents(out), passes[0]

    return make


def test_another_recipe_starts_at_its_solver(made):
    first, runs = made(gptq(SPEC))
    assert runs > 0
    second, none = made(gptq(parse_spec("int3-g16")))
    assert none == 0 and second != first
    assert first == made(gptq(SPEC), kept=False)[0]


def test_what_is_missing_is_observed_and_kept(made, tmp_path, capsys):
    made(gptq(SPEC))
    scaled = chain(awq_scale(SPEC), gptq(SPEC))
    whole, runs = made(scaled)
    assert runs > 0  # for the statistics that gptq did not ask for
    path = min((tmp_path / "kept").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    again, runs = made(scaled)
    assert runs > 0 and again == whole
    assert str(path) in capsys.readouterr().err
    again, none = made(scaled)
    assert none == 0 and again == whole


def test_a_step_that_sees_the_block_reaches_its_inputs(made):
    learnt = auto_round(SPEC, steps=2)
    whole = made(learnt, kept=False, samples=4)[0]
    assert made(learnt, samples=4)[0] == whole


def test_other_data_and_another_model_are_observed_anew(made, copied):
    made(gptq(SPEC), samples=4)
    assert made(gptq(SPEC), samples=4, seed=1)[1] > 0
    change(copied, lm_head__weight=lambda t: t + 1)
    assert made(gptq(SPEC), samples=4, model=copied)[1] > 0


def test_several_recipes_share_them_and_experts_are_kept_each(saved, tmp_path, passes):
    model, data = open_checkpoint(saved("qwen3_moe")), random_tokens(saved("qwen3_moe"), 8, 32)
    recipes = {"four": gptq(SPEC), "three": gptq(parse_spec("int3-g16"))}
    for out in ("once", "twice"):
        passes[0] = 0
        compare(
            model,
            recipes,
            data,
            tmp_path / out,
            inputs="reference",
            keep_statistics=tmp_path / "kept",
        )
    assert passes[0] == 0 and contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_what_cannot_be_kept_is_refused(source, tmp_path):
    model, data = open_checkpoint(source), random_tokens(source)
    keep = {"keep_statistics": tmp_path / "kept"}
    refused(lambda: quantize(model, gptq(SPEC), data, tmp_path / "o", **keep), "reference")
    refused(
        lambda: quantize(model, rtn(SPEC), None, tmp_path / "o", inputs="reference", **keep),
        "observes nothing",
    )
    assert not list(tmp_path.iterdir())


def test_a_model_that_changes_meanwhile_is_refused(copied, tmp_path, monkeypatch):
    model, data = open_checkpoint(copied), random_tokens(copied)
    observe = qlab.driver.observe.Totals.add

    def changing(self, *args):
        change(copied, lm_head__weight=lambda t: t + 1)
        return observe(self, *args)

    monkeypatch.setattr(qlab.driver.observe.Totals, "add", changing)
    refused(
        lambda: quantize(
            model,
            gptq(SPEC),
            data,
            tmp_path / "o",
            inputs="reference",
            keep_statistics=tmp_path / "kept",
        ),
        "changed while it was read",
    )
    assert not (tmp_path / "kept").exists()
