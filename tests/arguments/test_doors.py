"""What the public functions are given: taken where it can mean one thing only, refused in one
sentence otherwise."""

import inspect
import json
import pydoc
from importlib import import_module
from types import SimpleNamespace

import numpy
import pytest
import torch
from model_folders import random_tokens, refused

import qlab
from qlab.arguments.doors import TAKES
from qlab.files.checkpoint import open_checkpoint

INT4 = qlab.parse_spec("int4-g32")
# fisher and kl_of_each are called with what a bind shows
NO_ARGUMENTS_OF_USERS = {
    "keep",
    "absorb",
    "centre_keys",
    "inductor_options",
    "results",
    "schemes",
    "fisher",
    "kl_of_each",
}
WRONG = [
    object(),
    b"x",
    3.5,
    float("nan"),
    -1,
    [],
    {},
    [[]],
    "\uff14",
    "",
    "a" * 5000,
    "a\0b",
    10**5000,
    None,
    True,
    "~nobody/x",
    lambda: None,
    torch.device,
    SimpleNamespace(path=7),
]


@pytest.fixture(scope="module")
def given(saved, text, tmp_path_factory):
    """For every function arguments that it takes."""
    model = open_checkpoint(saved())
    recipe, out = qlab.rtn(INT4), tmp_path_factory.mktemp("doors")
    run = {"model": model, "data": random_tokens(saved(), 2, 8), "out": out / "q"}
    return {
        "open": {"name": saved()},
        "tokens": {"model": model, "texts": text, "samples": 1, "length": 8},
        "image_samples": {"model": model, "texts": [text], "samples": 1, "length": 8},
        "first_windows": {"model": model, "texts": text, "length": 8, "count": 1},
        "from_ids": {"model": model, "ids": torch.ones(2, 3, dtype=torch.long)},
        "quantize": {**run, "recipe": recipe},
        "compare": {**run, "recipes": {"a": recipe}},
        "apply": {"model": model, "recipe": recipe, "data": run["data"]},
        "write": {"quantized": qlab.apply(model, recipe, None), "out": out / "w"},
        "logits": {"model": model, "ids": [[1, 2, 3]]},
        "difference": {"one": None, "other": None},
        "over_seeds": {"run": print, "seeds": [0]},
        "dense": {"leaf": torch.ones(2, 2)},
        "each_cell": {"name": "mine", "fn": print},
        "insert": {"name": "mine", "wires": "*:in", "make": print},
        "quantize_inputs": {"spec": INT4},
        "kv_cache": {"spec": "int8-token"},
        "kv_clipped": {"spec": "int4-token"},
        "attention_inputs": {"spec": "int8-token"},
        **{name: {"pattern": "2:4"} for name in ("magnitude", "wanda", "sparsegpt")},
        "plan": {"model": model, "recipe": recipe},
        "rehearse": {"model": model, "recipe": recipe},
        "quantize_files": {"model": saved(), "recipe": recipe, "out": out / "f"},
        "work": {"folder": out, "shard": (1, 1)},
        "convert": {"model": saved(), "codec": "gptq", "out": out / "c"},
        "evaluate": {"model": model, "against": model, "data": run["data"]},
        "evaluate_tasks": {"model": model, "tasks": ["any"], "folder": out},  # which has none
        "perplexity": {"model": model, "data": run["data"]},
        "inspect": {"path": saved()},
        "verify": {"directory": saved(), "against": saved()},
        "lower": {"model": saved()},
        "pipeline": {"model": saved()},
        "to_torchao": {"model": saved()},
        "at": {"pattern": "*", "transform": recipe},
        "outside": {"transform": recipe},
        "chain": {},
        "rules": {"table": {"*": recipe}},
        "each_block": {"name": "mine", "fn": print},
        "auto_round_refine": {},
        "allocate": {"choices": [recipe], "bits": 4},
        "bind": {"name": "mine", "measure": print, "then": print},
        "kl_tune": {},
        "qat_end_to_end": {},
        "each_weight": {"name": "mine", "fn": print, "spec": INT4},
        "parse_spec": {"text": "int4-g32"},
        "reparametrize": {
            "graph": None,
            "stats": {},
            "origin": "x",
            "M": torch.ones(2),
            "M_inv": torch.ones(2),
        },
        **{
            name: {"spec": INT4}
            for name in ("rtn", "awq", "awq_scale", "gptq", "gptaq", "auto_round", "qat")
        },
        **{n: {"spec": INT4} for n in ("solver", "guidedquant")},
        **{n: {} for n in ("aim_held_out", "aim_in_stream")},
        "aim_at_reference": {},
        "smoothquant": {},
        "spinquant": {"spec": INT4},
        **{n: {} for n in ("lqer", "l2qer", "eora")},
        "method": {"name": "gptq", "spec": INT4},
        "scheme": {"name": "W8A8"},
        **{n: {} for n in ("rotate_heads", "rotate_online", "rotate_residual", "rotate_scores")},
        **{n: {} for n in ("quarot", "incoherence")},
        "gauge": {"name": "mine", "wires": "*:in", "choose": lambda turn: None},
    }


def test_every_public_function_has_a_door():
    functions = {name for name in qlab.__all__ if inspect.isfunction(getattr(qlab, name))}
    assert functions - NO_ARGUMENTS_OF_USERS == set(TAKES)


@pytest.mark.parametrize("name", sorted(TAKES))
def test_help_and_editors_see_the_function_behind_the_door(name):
    public, function = getattr(qlab, name), getattr(import_module(qlab.HOMES[name]), name)
    assert inspect.signature(public) == inspect.signature(function)
    assert public.__doc__ == function.__doc__ and public.__name__ == function.__name__
    shown = pydoc.plain(pydoc.render_doc(public))
    assert all(parameter in shown for parameter in inspect.signature(function).parameters)
    assert inspect.getdoc(function).splitlines()[0] in shown


LOOKS = {(name, argument) for name, kinds in TAKES.items() for argument in kinds}
WORKS = {
    "quantize",
    "compare",
    "plan",
    "quantize_files",
    "convert",
    "evaluate",
    "perplexity",
    "lower",
    "to_torchao",
    "verify",
}


@pytest.mark.parametrize("name, argument", sorted(LOOKS))
def test_what_an_argument_cannot_be_is_a_sentence(given, monkeypatch, tmp_path, name, argument):
    monkeypatch.chdir(tmp_path)  # some of these values are names of folders
    function = getattr(qlab, name)
    signature = inspect.signature(function)
    if argument not in signature.parameters:
        pytest.skip("a kind that is shared with functions that have the argument")
    refusals = 0
    for wrong in WRONG:
        arguments = {**given[name], argument: wrong}
        several = (
            [arguments.pop(argument)]
            if signature.parameters[argument].kind is inspect.Parameter.VAR_POSITIONAL
            else []
        )
        default = signature.parameters[argument].default
        if wrong is default or (name in WORKS and (wrong is None or wrong is True)):
            continue  # taken, and then the work is done
        if (name, argument) == ("over_seeds", "run") and callable(wrong):
            continue  # taken, and then it is called
        try:
            function(*several, **arguments)
        except qlab.QlabError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 1000, error
    assert refusals > 5


def test_names_stand_for_specs_grids_and_models(given, saved, monkeypatch, tmp_path):
    monkeypatch.setattr("qlab.demo.hub.demo_model", saved)
    assert qlab.rtn("int4-g32")[0].spec == qlab.METHODS["rtn"]("int4-g32")[0].spec == INT4
    assert (
        qlab.gptq(INT4, grid="minmax")[0].detail == qlab.gptq(INT4, qlab.GRIDS["minmax"])[0].detail
    )
    for alias, name in {
        "W4A16": "int4-g128",
        "w4a16_asym": "int4-g128-asym",
        "W8A16": "int8-channel",
    }.items():
        assert qlab.parse_spec(alias) == qlab.parse_spec(name)
    result = qlab.quantize("demo", qlab.rtn("int4-g32"), None, tmp_path / "q")
    assert qlab.evaluate(result, "demo", given["evaluate"]["data"]).windows == 2
    assert qlab.inspect(result).json() == qlab.inspect(open_checkpoint(result.path)).json()
    assert not qlab.verify(result, "demo").faults


def test_token_ids_may_be_lists_and_arrays(given):
    model, rows = given["from_ids"]["model"], [[1, 2, 3], [4, 5, 6]]
    for ids in (rows, tuple(map(tuple, rows)), numpy.array(rows)):
        assert qlab.from_ids(model, ids).ids.tolist() == rows
    for ids in (
        [[1], [2, 3]],
        [[1.5]],
        [1, 2],
        [["1"]],
        torch.ones(2, 2),
        torch.ones(2, 2, dtype=torch.long, device="meta"),
    ):
        refused(lambda ids=ids: qlab.from_ids(model, ids), "ids")


def test_what_is_refused_says_what_to_write(given, tmp_path):
    model = given["plan"]["model"]
    refused(lambda: qlab.rules({"*": qlab.gptq}), "gptq and was not called", "gptq(spec)")
    refused(
        lambda: qlab.quantize(model, qlab.gptq(INT4), "my.txt", tmp_path / "q"),
        "qlab.tokens(model, texts)",
    )
    refused(
        lambda: qlab.quantize(model, qlab.rtn(INT4), None, tmp_path / "q", overwrite="no"),
        "overwrite is 'no'",
        "True or False",
    )
    refused(lambda: qlab.quantize(model, qlab.rtn(INT4), None, None), "out is None")
    refused(lambda: qlab.Int(4.5, qlab.Tile(1, 32)), "int4.5")
    refused(lambda: qlab.Int(4, 32), "Tile(1, 64)")
    refused(lambda: qlab.Tile(1, -3), "whole numbers")
    refused(lambda: qlab.parse_spec("int4-g" + "9" * 5000), "give a shorter string")


def test_an_index_that_names_a_file_of_5000_letters(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "a" * 5000}})
    )
    refused(lambda: qlab.open(folder), "no plain name of a file")


def test_links_in_a_circle_and_names_that_are_too_long(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / ("a" * 5000), tmp_path / "none"):
        for act in (qlab.open, qlab.inspect, qlab.lower):
            refused(lambda act=act, path=path: act(path))


@pytest.mark.parametrize(
    "runs",
    [None, 3, int, b"x", [None], [(1, 2)], [("x", "y")], [("x", int)], [[1]]],
    ids=repr,
)
def test_results_of_what_is_no_run_are_a_sentence(runs):
    refused(lambda: qlab.results(runs))


def test_a_table_goes_into_a_file(saved):
    refused(lambda: qlab.results(saved()).to_csv(7), "a table goes into a file")


@pytest.mark.parametrize("kind", [torch.uint16, torch.uint32, torch.int16, torch.uint8])
def test_token_ids_of_every_whole_kind_are_taken(saved, kind):
    assert qlab.from_ids(saved(), torch.ones(2, 3).to(kind)).ids.tolist() == [[1, 1, 1]] * 2


def test_token_ids_and_dtypes_that_torch_computes_nothing_with_are_refused(saved, tmp_path):
    refused(
        lambda: qlab.from_ids(saved(), torch.ones(2, 2, dtype=torch.long).to_sparse()),
        "layout torch.sparse_coo",
    )
    refused(
        lambda: qlab.from_ids(saved(), torch.full((2, 2), 2**63, dtype=torch.uint64)),
        "outside the vocabulary",
    )
    refused(
        lambda: qlab.quantize(saved(), qlab.rtn(INT4), None, tmp_path / "q", dtype="float8_e4m3fn"),
        "give a floating-point dtype",
    )
    refused(
        lambda: qlab.perplexity(saved(), qlab.Tokens(ids=None, texts=(), sha256="", seed=0)),
        "the ids of data are no tensor",
    )
    refused(
        lambda: qlab.compare(saved(), {"\ud800": qlab.rtn(INT4)}, None, tmp_path),
        "half of a character",
    )
