"""Nothing of the files is left out in silence: blocks that the configuration does not count,
weights of another rank, and weights that the recorded recipe makes another of."""

import json
import re
import shutil

import pytest
import torch
from families import tiny
from model_folders import bits_equal, change, refused, rewrite, tensors
from safetensors.torch import save_file
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from qlab.algebra.scope import Scope, scope_named
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import keep, rules
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn
from qlab.model.skeleton import Skeleton
from qlab.model.uncounted import uncounted

INT4, INT8 = parse_spec("int4-g32"), parse_spec("int8-g32")
UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "qwen3_moe"])
def test_a_block_that_the_config_does_not_count_is_refused(family, saved, tmp_path):
    path = shutil.copytree(saved(family), tmp_path / "model")
    key = "n_layer" if family == "gpt2" else "num_hidden_layers"
    state = tensors(path)
    state |= {
        re.sub(r"\.1\.", ".2.", name, count=1): t.clone()
        for name, t in state.items()
        if re.search(r"(layers|h)\.1\.", name)
    }
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    block = (
        next(name for name in state if re.search(r"(layers|h)\.2\.", name)).partition(".2.")[0]
        + ".2"
    )
    for act in (
        lambda: quantize(open_checkpoint(path), rtn(INT8), None, tmp_path / "out"),
        lambda: read(open_checkpoint(path), None),
    ):
        with pytest.raises(
            Exception,
            match=f"holds the block {re.escape(block)}, and its config.json counts 2 blocks",
        ):
            act()
    assert not (tmp_path / "out").exists()
    rewrite(path / "config.json", lambda config: config.update({key: 3, "layer_types": None}))
    assert uncounted(Skeleton(open_checkpoint(path), torch.float32)) == {}


@pytest.mark.parametrize(
    "name", ["model.layers.2.join.weight", "model.layers.2.self_attn.rotary_emb.inv_freq"]
)
def test_what_holds_more_than_a_block_is_none_and_is_kept_whole(name, folder, tmp_path):
    state = tensors(folder)
    state |= {key.replace(".1.", ".2."): t.clone() for key, t in state.items() if ".1." in key} | {
        name: torch.ones(4, 4)
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    out = quantize(open_checkpoint(folder), rtn(INT8), None, tmp_path / "out").path
    after = tensors(out)
    assert (
        all(bits_equal(after[key], t) for key, t in state.items() if ".2." in key)
        and verify(out, folder).faults == []
    )


@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", UP),
        ("gpt2", "transformer.h.0.mlp.c_fc"),
        ("opt", "model.decoder.layers.1.fc1"),
        ("qwen3_moe", "model.layers.0.mlp.experts.2.up_proj"),
        ("qwen2", "model.layers.0.self_attn.q_proj"),
    ],
)
@pytest.mark.parametrize(
    "turn",
    [
        lambda t: t[None],
        lambda t: t[..., None],
        lambda t: t.reshape(2, len(t) // 2, -1),
        torch.ravel,
    ],
)
def test_a_weight_of_another_rank_is_refused_by_name(family, name, turn, saved, tmp_path):
    path = shutil.copytree(saved(family), tmp_path / "model")
    key = (
        f"{name}.weight"
        if f"{name}.weight" in tensors(path)
        else f"{name.removeprefix('transformer.')}.weight"
    )
    change(path, **{key.replace(".", "__"): lambda t: turn(t).contiguous()})
    refused(
        lambda: quantize(open_checkpoint(path), rtn(INT8), None, tmp_path / "out"),
        key,
        "config.json",
    )
    refused(lambda: quantize_files(path, rtn(INT8), tmp_path / "out"), key, "config.json")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def recipes(saved, tmp_path_factory):
    """recipes(name) -> a directory that a recipe wrote of the model, made once."""
    folders = {}
    recipe = {
        "all": rtn(INT8),
        "some": rules({"*.0.*": rtn(INT8), "*o_proj": keep(), "*": rtn(INT4)}),
    }

    def make(name):
        if name not in folders:
            model = open_checkpoint(saved("llama", torch.float16))
            folders[name] = quantize(
                model, recipe[name], None, tmp_path_factory.mktemp(name) / "out"
            ).path
        return folders[name]

    return make


@pytest.mark.parametrize("name", ["all", "some"])
def test_what_a_recipe_keeps_is_no_fault(name, recipes, original):
    assert (
        verify(recipes(name), original).faults == []
        and verify(recipes(name), original).json()["unlike"] == {}
    )


@pytest.mark.parametrize(
    "name, other, words",
    [
        ("some", "all", "it is int4-g32, and the recorded recipe makes it int8-g32"),
        ("all", "some", "it is int8-g32, and the recorded recipe makes it int4-g32"),
    ],
)
def test_a_block_of_another_recipe_is_a_fault(name, other, words, recipes, original, tmp_path):
    path = shutil.copytree(recipes(name), tmp_path / "mixed")
    job = json.loads((recipes(other) / "qlab.json").read_text())["job"]
    rewrite(path / "qlab.json", lambda record: record.update(job=job))
    faults = verify(path, original).faults
    assert (
        all(fault.startswith("model.layers.1.") for fault in faults)
        and sum(words in fault for fault in faults) == 6
    )


@pytest.mark.parametrize("name, number", [("all", 1), ("some", 0)])
def test_a_block_that_is_not_quantized_is_a_fault(name, number, recipes, original, tmp_path):
    path, mark = shutil.copytree(recipes(name), tmp_path / "half"), f"model.layers.{number}."
    state = {key: t for key, t in tensors(path).items() if not key.startswith(mark)}
    state |= {key: t for key, t in tensors(original).items() if key.startswith(mark)}
    for file in path.glob("*.safetensors*"):
        file.unlink()
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    rewrite(
        path / "qlab.json",
        lambda record: [
            record[section].pop(key)
            for section in ("sites", "certificates")
            for key in list(record[section])
            if key.startswith(mark)
        ],
    )
    faults = verify(path, original).faults
    assert all(
        fault.startswith(mark) and "is not quantized, and the recorded recipe covers it" in fault
        for fault in faults
    )
    # The weight that the recipe keeps is quantized in no other block.
    assert len(faults) == (7 if name == "all" else 6)


def test_a_weight_that_was_chosen_without_a_model_and_is_dense_is_a_fault(original, tmp_path):
    out = quantize_files(original, rtn(INT8), tmp_path / "out").path
    dense, state = tensors(original)[f"{UP}.weight"], tensors(out)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    state = {name: t for name, t in state.items() if not name.startswith(f"{UP}.")} | {
        f"{UP}.weight": dense
    }
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    rewrite(
        out / "qlab.json",
        lambda record: [record[section].pop(UP) for section in ("sites", "certificates")],
    )
    assert (
        f"{UP}: it is not quantized, and the recorded recipe covers it"
        in verify(out, original).faults
    )


@pytest.mark.parametrize(
    "scope",
    [
        Scope(),
        Scope(("*a*", "re:b.*")),
        Scope(("*",), ("c", "*d")),
        Scope((), ("e",)),
        Scope(("*lm_head",), outside=True),
        Scope(outside=True),
    ],
)
def test_a_scope_is_read_back_from_its_name(scope):
    assert scope_named(str(scope)) == scope


def test_what_the_model_does_not_take_is_carried_on_whatever_it_holds(folder, tmp_path):
    state = tensors(folder)
    state["model.layers.0.self_attn.mask"] = torch.full((1, 4, 4), -torch.inf).triu(1)
    state["freqs_cis"] = torch.tensor([1, torch.nan], dtype=torch.complex64)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    opened = open_checkpoint(folder)
    for result in (
        quantize(opened, rtn(INT8), None, tmp_path / "one"),
        quantize_files(opened, rtn(INT8), tmp_path / "two"),
    ):
        out, after = result.path, tensors(result.path)
        assert bits_equal(
            after["model.layers.0.self_attn.mask"], state["model.layers.0.self_attn.mask"]
        )
        assert after["freqs_cis"].dtype == torch.complex64 and verify(out, folder).faults == []
    state["model.norm.weight"][1] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        QlabError, match=r"model\.norm\.weight holds NaN or Inf; repair the checkpoint"
    ):
        quantize(open_checkpoint(folder), rtn(INT8), None, tmp_path / "damaged")


def test_a_linear_that_its_block_never_runs_is_no_fault(monkeypatch, tmp_path):
    start, forward = LlamaDecoderLayer.__init__, LlamaDecoderLayer.forward

    def held_by_all(self, config, layer_idx):
        start(self, config, layer_idx)
        self.adapters = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(2)])
        self.index = layer_idx

    def run(self, hidden_states, **kwargs):
        return forward(self, self.adapters[self.index](hidden_states), **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", held_by_all)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", run)
    tiny("llama").save_pretrained(tmp_path / "model")
    out = quantize(open_checkpoint(tmp_path / "model"), rtn(INT8), None, tmp_path / "out").path
    idle = {"model.layers.0.adapters.1", "model.layers.1.adapters.0"}
    record = json.loads((out / "qlab.json").read_text())
    assert record["unused"].keys() == idle and not record["sites"].keys() & idle
    assert verify(out, tmp_path / "model").faults == []
