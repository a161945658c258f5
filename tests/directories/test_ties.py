"""A head is the embedding where the files hold one tensor for both; what they hold apart is
computed with and written apart."""

import json
import shutil

import pytest
import torch
from logits import IDS
from model_folders import change, random_tokens, refused, rewrite, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, outside
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import evaluate, read
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import lower
from qlab.methods.rtn import rtn
from qlab.model.ties import untied

INT8 = parse_spec("int8-g32")
HEADS = rtn(INT8) + outside(at("*lm_head", rtn(INT8)))
FAMILIES = {
    "llama": "model.embed_tokens.weight",
    "opt": "model.decoder.embed_tokens.weight",
    "gpt_neox": "gpt_neox.embed_in.weight",
}
DOORS = {
    "quantize": lambda path, out: quantize(open_checkpoint(path), rtn(INT8), None, out).path,
    "model-free": lambda path, out: (
        quantize_files(path, rtn(INT8), out, exclude=["*embed*", "*lm_head", "*norm*"]).path
    ),
    "converted": lambda path, out: (
        convert(DOORS["quantize"](path, f"{out}-first"), "gptq_v2", out).path
    ),
}


@pytest.fixture
def tied(saved, tmp_path):
    """tied(family, edit) -> a model whose config ties its head, and whose tensors are edit(tensors,
    the embedding's name)."""

    def make(family, edit=lambda state, name: state):
        path = shutil.copytree(
            saved(family, torch.float16, tie_word_embeddings=True), tmp_path / "model"
        )
        state = tensors(path)
        edit(state, FAMILIES[family])
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def head_of_its_own(state, name):
    state["lm_head.weight"] = state[name].flip(0).contiguous()


def written_twice(state, name):
    state["lm_head.weight"] = state[name].clone()


def by_the_heads_name(state, name):
    state["lm_head.weight"] = state.pop(name)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def tie_of(path):
    return json.loads((path / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("way", DOORS)
@pytest.mark.parametrize(
    "family, edit, ties",
    [
        ("llama", head_of_its_own, False),
        ("opt", head_of_its_own, False),
        ("llama", written_twice, True),
        ("llama", by_the_heads_name, True),
    ],
)
def test_every_door_reads_the_head_that_transformers_reads(way, family, edit, ties, tied, tmp_path):
    path = tied(family, edit)
    expected = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    out = DOORS[way](path, tmp_path / "out")
    assert tie_of(out) == ties and verify(out, path).faults == []
    lowered = lower(out, dtype=torch.float32, dense_cache=True)
    lowered.tie_weights()  # as whoever resizes the vocabulary does
    assert (logits(lowered) - expected).norm() < 0.05 * expected.norm()
    separate = lowered.get_output_embeddings().weight is not lowered.get_input_embeddings().weight
    assert separate != ties
    tokens = random_tokens(path, 2, 16)
    assert evaluate(open_checkpoint(out), open_checkpoint(path), tokens).kl < 1e-3


@pytest.mark.parametrize(
    "edit", [head_of_its_own, written_twice, by_the_heads_name, lambda state, name: None]
)
def test_a_head_that_is_rounded_lies_beside_the_embedding(edit, tied, tmp_path, door):
    path = tied("llama", edit)
    out = quantize(open_checkpoint(path), HEADS, None, tmp_path / "out").path
    assert tie_of(out) is False and verify(out, path).faults == []
    expected = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    for model in (
        lower(out, dtype=torch.float32, dense_cache=True),
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32),
    ):
        assert (logits(model) - expected).norm() < 0.05 * expected.norm()
    # Other tools leave it so.
    rewrite(out / "config.json", lambda config: config.update(tie_word_embeddings=True))
    for model in (
        lower(out, dtype=torch.float32, dense_cache=True),
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32),
    ):
        assert (logits(model) - expected).norm() < 0.05 * expected.norm()
    assert tie_of(convert(out, "gptq_v2", tmp_path / "converted").path) is False


@pytest.mark.parametrize("way", [*DOORS, "read", "lower"])
def test_a_head_that_the_files_lack_and_the_config_ties_to_nothing_is_refused(
    way, folder, tmp_path
):
    doors = DOORS | {
        "read": lambda path, out: read(open_checkpoint(path), random_tokens(path, 1, 8))
    }
    if way == "lower":
        folder = quantize_files(folder, rtn(INT8), tmp_path / "made").path
        file = next(
            file for file in folder.glob("*.safetensors") if "lm_head.weight" in tensors(folder)
        )
        save_file(
            {name: t for name, t in tensors(folder).items() if name != "lm_head.weight"}, file
        )
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        doors = {"lower": lambda path, out: lower(path)}
    else:
        change(folder, lm_head__weight=None)
    refused(lambda: doors[way](folder, tmp_path / "out"), str(folder), "lm_head.weight")
    assert not (tmp_path / "out").exists()


def test_a_config_is_untied_wherever_it_says_so():
    here, there = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    assert untied(
        {"text_config": {"size": 1}, "speaker": {"size": 2, **here}, "rope": {}, **here}
    ) == {"text_config": {"size": 1, **there}, "speaker": {"size": 2, **there}, "rope": {}, **there}
