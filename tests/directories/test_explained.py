"""What a directory says of its codes: at the top of its configuration or inside a part of it; codes
that nothing explains."""

import json
import re

import pytest
import torch
from foreign import FORMATS, directory
from model_folders import rewrite
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qlab
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint

INT4 = qlab.rtn(qlab.parse_spec("int4-g32"))
KEY = "quantization_config"


@pytest.fixture(scope="module", params=FORMATS)
def written(request, tmp_path_factory):
    return directory(request.param, tmp_path_factory.mktemp("written") / "model")


def moved(folder, place):
    """A directory whose configuration says of its codes what it said, inside the parts that the
    dotted `place` names; nowhere if it is empty."""
    config = json.loads((folder / "config.json").read_text())
    said = {KEY: config.pop(KEY)}
    for name in reversed(place.split(".")):
        said = {name: said}
    (folder / "config.json").write_text(json.dumps(config | (said if place else {})))
    return folder


@pytest.fixture
def bare(tmp_path):
    return moved(directory("zero points", tmp_path / "bare"), "")


def test_a_configuration_inside_another_explains_codes_and_none_is_refused(written):
    there, config = open_checkpoint(written), (written / "config.json").read_text()
    for place in ("text_config", "some.other.part"):
        here = open_checkpoint(moved(written, place))
        assert (here.quantized, here.inputs, here.raw[KEY]) == (
            there.quantized,
            there.inputs,
            there.raw[KEY],
        )
        (written / "config.json").write_text(config)
    with pytest.raises(
        QlabError,
        match=re.escape(f"{written} holds model.layers.0.")
        + r".* and its config\.json has no quantization",
    ):
        open_checkpoint(moved(written, ""))


def test_two_parts_that_differ_are_refused_and_the_top_goes_first(tmp_path):
    folder = directory("groups of 16", tmp_path / "model")
    said = json.loads((folder / "config.json").read_text())[KEY]
    rewrite(
        folder / "config.json",
        lambda c: c.update(a={KEY: said}, b={"c": {KEY: {"quant_method": "gptq"}}}),
    )
    assert len(open_checkpoint(folder).quantized) == 14
    rewrite(folder / "config.json", lambda c: c.pop(KEY))
    with pytest.raises(
        QlabError,
        match=r"config\.json says what codes mean in a and, otherwise, in b\.c; qlab reads one",
    ):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "act",
    [
        qlab.open,
        qlab.inspect,
        qlab.lower,
        lambda path: qlab.convert(path, "gptq", path.parent / "out"),
        lambda path: qlab.quantize(qlab.open(path), INT4, None, path.parent / "out"),
        lambda path: qlab.quantize_files(path, INT4, path.parent / "out"),
        lambda path: qlab.verify(path, path),
    ],
    ids=["open", "inspect", "lower", "convert", "quantize", "model-free", "verify"],
)
def test_every_door_refuses_codes_that_nothing_explains_before_it_writes(act, bare):
    with pytest.raises(
        QlabError,
        match=r"holds model\.layers\.0\..*weight_packed and \d+ more tensors in I32, and its config",  # noqa: E501
    ):
        act(bare)
    assert [path.name for path in bare.parent.iterdir()] == [bare.name]


def test_transformers_refuses_them_too_and_reads_a_configuration_inside_another(
    bare, door, tmp_path
):
    with pytest.raises(QlabError, match=r"weight_packed and \d+ more tensors in I32"):
        AutoModelForCausalLM.from_pretrained(bare)
    folder = moved(directory("zero points", tmp_path / "model"), "part")
    ids = torch.arange(3, 9)[None]
    with pytest.warns(UserWarning, match="kernel"):
        ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = qlab.lower(folder, dtype=torch.float32)
    assert torch.equal(ours(ids).logits, theirs(ids).logits)


def test_codes_that_its_configuration_does_not_explain_are_refused(tmp_path):
    """A narrow float without its scales is none of the format's modules, and no weight either."""
    folder = directory("fp8, rounded inputs", tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    save_file(
        {n: t for n, t in state.items() if n != "model.layers.1.mlp.up_proj.weight_scale_inv"},
        folder / "model.safetensors",
    )
    with pytest.raises(
        QlabError,
        match=r"holds model\.layers\.1\.mlp\.up_proj\.weight and 0 more tensors in F8_E4M3",
    ):
        open_checkpoint(folder)


def test_integers_that_are_no_codes_stay(tmp_path):
    """Tables of places beside a bias, masks, indices of experts beside a weight."""
    folder = directory("groups of 16", tmp_path / "model")
    more = {
        "a.index": torch.ones(4, 4, dtype=torch.int64),
        "a.bias_table": torch.ones(4, 4),
        "b.bias": torch.ones(1, 1, 4, 4).byte(),
        "c.table": torch.ones(8, 2).int(),
        "c.weight": torch.ones(4, 4),
        "d.places": torch.ones(8, 2).int(),
    }
    save_file(load_file(folder / "model.safetensors") | more, folder / "model.safetensors")
    assert len(open_checkpoint(folder).quantized) == 14


@pytest.mark.filterwarnings("ignore:no kernel takes")
@pytest.mark.parametrize("status", ["compressed", None])
def test_older_spellings_are_read(status, door, tmp_path):
    there = open_checkpoint(folder := directory("zero points", tmp_path / "model"))
    said = {**there.raw[KEY], "quantization_status": status}
    rewrite(
        folder / "config.json",
        lambda c: c.update({KEY: {"quant_method": "compressed-tensors", KEY: said}}),
    )
    assert open_checkpoint(folder).quantized == there.quantized
    ids = torch.arange(8)[None]
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(folder)(ids).logits,
        qlab.lower(there, dtype=torch.float32)(ids).logits,
    )


@pytest.mark.parametrize(
    "said, words",
    [
        ({"quant_method": "nobodys"}, "quantized with 'nobodys', which qlab does not read"),
        ([1], r"no object but \[1\]"),
    ],
)
def test_a_method_that_nobody_reads_is_refused_by_the_door_of_transformers(
    said, words, door, tmp_path
):
    folder = directory("groups of 16", tmp_path / "model")
    rewrite(folder / "config.json", lambda c: c.update({KEY: said}))
    with pytest.raises(QlabError, match=words):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_that_the_architecture_has_not_is_refused(tmp_path):
    folder = moved(directory("groups of 16", tmp_path / "model"), "text_config")
    with pytest.raises(
        QlabError,
        match=(
            r"config\.json has text_config, which the architecture llama has not; move what it "
            r"says"
        ),
    ):
        _ = open_checkpoint(folder).config
