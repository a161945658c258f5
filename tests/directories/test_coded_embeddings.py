"""Embeddings with codes, tied to the head or not: read by every door, and never written where no
reader looks for them."""

import json
import shutil

import pytest
import torch
from model_folders import bits_equal, rewrite, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qlab
from qlab.algebra.grid import encode, minmax
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_input_spec
from qlab.codecs import CODECS
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint

IDS = torch.arange(3, 19)[None]
EMBEDDING = "model.embed_tokens"
CT = CODECS["compressed-tensors"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def coded(request, saved, tmp_path):
    """coded(targets of the embedding, its spec) -> a directory with codes in linears and in the
    embedding, and it with that dense."""
    source = saved("llama", tie_word_embeddings=request.param)

    def make(targets, spec="int8-channel"):
        folder_with_codes = qlab.quantize(
            qlab.open(source),
            qlab.rtn(qlab.parse_spec("int4-g32")),
            None,
            tmp_path / "made",
            overwrite=True,
        ).path
        state = tensors(folder_with_codes)
        reference = shutil.copytree(folder_with_codes, tmp_path / "reference")
        leaf = encode(minmax, state.pop(f"{EMBEDDING}.weight"), qlab.parse_spec(spec))
        for folder, entries in (
            (folder_with_codes, CT.encode(EMBEDDING, leaf)),
            (reference, {f"{EMBEDDING}.weight": dense(leaf)}),
        ):
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            save_file(
                {name: t.contiguous() for name, t in (state | entries).items()},
                folder / "model.safetensors",
            )
        (folder_with_codes / "qlab.json").unlink()
        group = CT.config({EMBEDDING: leaf.spec})["config_groups"]["group_0"] | {"targets": targets}
        rewrite(
            folder_with_codes / "config.json",
            lambda c: c["quantization_config"]["config_groups"].update(group_1=group),
        )
        return folder_with_codes, reference

    return make


@pytest.mark.parametrize(
    "targets, spec",
    [
        ([EMBEDDING], "int8-channel"),
        (["re:.*embed_tokens$"], "int4-g16"),
        (["Embedding"], "int8-g32"),
        (["Embedding"], "int4-g16"),
        (["Embedding"], "int8-channel"),
    ],
)
def test_every_door_reads_them(targets, spec, coded, door):
    folder_with_codes, reference = coded(targets, spec)
    assert (
        str(open_checkpoint(folder_with_codes).quantized[EMBEDDING]) == spec
        and len(open_checkpoint(folder_with_codes).quantized) == 15
    )
    data = qlab.from_ids(qlab.open(reference), IDS)
    assert qlab.evaluate(qlab.open(folder_with_codes), qlab.open(reference), data).kl == 0
    with pytest.warns(UserWarning, match="no int4 kernel on a CPU takes torch.float32"):
        right, ours = (
            qlab.lower(path, dtype=torch.float32)(IDS).logits
            for path in (reference, folder_with_codes)
        )
        theirs = AutoModelForCausalLM.from_pretrained(folder_with_codes, dtype=torch.float32).eval()
    assert torch.equal(ours, right) and torch.equal(theirs(IDS).logits, right)


def test_what_transformers_saves_holds_their_codes(coded, door, tmp_path):
    folder_with_codes, _ = coded([EMBEDDING])
    AutoModelForCausalLM.from_pretrained(folder_with_codes, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "saved"
    )
    before, after = tensors(folder_with_codes), tensors(tmp_path / "saved")
    assert before.keys() == after.keys()
    assert all(
        bits_equal(before[name], after[name]) for name in before if name.startswith(EMBEDDING)
    )


def test_they_are_converted_under_their_name_or_refused(coded, tmp_path):
    folder_with_codes, _ = coded([EMBEDDING], "int4-g32")
    with pytest.raises(
        QlabError,
        match=(
            r"gptq holds codes of linears, and model\.embed_tokens of .* is an embedding with "
            r"codes"
        ),
    ):
        qlab.convert(folder_with_codes, "gptq", tmp_path / "none")
    out = qlab.convert(folder_with_codes, "compressed-tensors", tmp_path / "out").path
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (
        said["config_groups"]["group_0"]["targets"] == ["Linear", EMBEDDING]
        and not (tmp_path / "none").exists()
    )
    assert qlab.verify(out, out).faults == []


def test_classes_that_may_both_be_meant_are_refused(coded):
    folder_with_codes, _ = coded(["Embedding"], "int4-g32")
    change = {
        "input_activations": CT.config(
            {"m": qlab.parse_spec("int4-g32")}, {"m": parse_input_spec("int8-token")}
        )
    }
    inputs = change["input_activations"]["config_groups"]["group_0"]["input_activations"]
    rewrite(
        folder_with_codes / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(
            input_activations=inputs
        ),
    )
    with pytest.raises(
        QlabError,
        match=(
            r"may be of Linear or of Embedding, which quantization_config quantizes in different "
            r"ways"
        ),
    ):
        open_checkpoint(folder_with_codes)
