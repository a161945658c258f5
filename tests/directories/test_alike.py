"""Two spellings of one model are one model to verify, whichever of them was quantized; what differs
in it is a fault in both."""

import shutil

import pytest
import torch
from model_folders import tensors
from safetensors.torch import save_file

from qlab.algebra.spec import parse_spec
from qlab.directories.model_free import KEPT, quantize_files
from qlab.directories.verify import verify
from qlab.methods.rtn import rtn

INT8 = parse_spec("int8-g16")
NEWER = {
    "llama": {"model.": ""},  # as the model without its head is saved
    "qwen2_vl": {"model.": "model.language_model.", "visual.": "model.visual."},
    "llava": {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.lm_head.": "lm_head.",
    },
}


def spelled(name, renamings):
    return next(
        (new + name.removeprefix(old) for old, new in renamings.items() if name.startswith(old)),
        name,
    )


def fused(state):
    """Experts as transformers holds them, [e, o, k]."""
    names = [name for name in state if ".experts." in name]
    parts = {name: state.pop(name) for name in names}
    for owner in sorted({name.partition(".experts.")[0] for name in names}):
        gate, up, down = (
            torch.stack([parts[f"{owner}.experts.{e}.{kind}_proj.weight"] for e in range(4)])
            for kind in ("gate", "up", "down")
        )
        state[f"{owner}.experts.gate_up_proj"], state[f"{owner}.experts.down_proj"] = (
            torch.cat([gate, up], 1),
            down,
        )


@pytest.fixture
def two(saved, tmp_path):
    """two(family, edit) -> a model as transformers saves it, and the same one with its tensors
    edited."""

    def make(family, edit):
        one, other = saved(family, torch.float16), tmp_path / "other"
        shutil.copytree(one, other)
        state = tensors(one)
        edit(state)
        save_file(state, other / "model.safetensors", metadata={"format": "pt"})
        return one, other

    return make


def assert_alike(one, other, tmp_path, exclude=KEPT):
    for number, (source, reference) in enumerate([(one, other), (other, one)]):
        out = quantize_files(source, rtn(INT8), tmp_path / f"out{number}", exclude=exclude).path
        assert verify(out, source).faults == [] and verify(out, reference).faults == []


@pytest.mark.parametrize("family", NEWER)
def test_names_of_another_generation_are_no_faults(family, two, tmp_path):
    def rename(state):
        for name in list(state):
            state[spelled(name, NEWER[family])] = state.pop(name)

    one, other = two(family, rename)
    assert tensors(one).keys() != tensors(other).keys()
    assert_alike(one, other, tmp_path, KEPT)


@pytest.mark.parametrize("exclude", [KEPT, (*KEPT, "*experts*")])
def test_experts_in_one_tensor_and_one_by_one_are_the_same(exclude, two, tmp_path):
    assert_alike(*two("qwen3_moe", fused), tmp_path, exclude)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ],
)
def test_another_number_under_another_name_is_a_fault(name, two, tmp_path):
    def rename_and_change(state):
        state[name] = state[name] + 0.5
        for old in list(state):
            state[old.removeprefix("model.")] = state.pop(old)

    one, other = two("llama", rename_and_change)
    out = quantize_files(one, rtn(INT8), tmp_path / "out").path
    (fault,) = verify(out, other).faults
    assert fault.startswith(name.removesuffix(".weight"))


@pytest.mark.parametrize(
    "source, reference",
    [("once", "twice"), ("twice", "once"), ("as the head", "once"), ("twice", "as the head")],
)
def test_a_tied_head_may_be_written_down_or_not(source, reference, saved, tmp_path):
    original = saved("llama", torch.float16, tie_word_embeddings=True)
    state, embedding = tensors(original), "model.embed_tokens.weight"
    files = {
        "once": state,
        "twice": state | {"lm_head.weight": state[embedding].clone()},
        "as the head": {n: t for n, t in state.items() if n != embedding}
        | {"lm_head.weight": state[embedding]},
    }
    for label, of in files.items():
        shutil.copytree(original, tmp_path / label)
        save_file(of, tmp_path / label / "model.safetensors", metadata={"format": "pt"})
    out = quantize_files(tmp_path / source, rtn(INT8), tmp_path / "out").path
    assert verify(out, tmp_path / reference).faults == []


def test_a_head_that_is_not_the_embedding_is_a_fault(saved, tmp_path):
    original, other = saved("llama", torch.float16, tie_word_embeddings=True), tmp_path / "other"
    shutil.copytree(original, other)
    state = tensors(original)
    save_file(
        state | {"lm_head.weight": state["model.embed_tokens.weight"].flip(0).contiguous()},
        other / "model.safetensors",
    )
    out = quantize_files(other, rtn(INT8), tmp_path / "out").path
    (out / "qlab.json").unlink()  # as if another tool had made it
    assert verify(out, original).faults == ["lm_head.weight is not in the reference"]
