"""Every tensor keeps the dtype and the bits that it has in the files, and is computed with in the
dtype that transformers gives it."""

import json
import shutil

import pytest
import torch
from logits import IDS
from model_folders import bits_equal, change, random_tokens, refused, tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from qlab.algebra.absorb import folds
from qlab.algebra.graph import by_origin
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, outside
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import lower
from qlab.methods.awq import awq
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.model.loading import load_block, load_outside
from qlab.model.running import record_blocks
from qlab.model.skeleton import Skeleton

INT8 = parse_spec("int8-g16")
DRAW = torch.Generator().manual_seed(0)


@pytest.fixture
def mixed(saved, tmp_path):
    """mixed(family, most, others, change) -> a model in dtype `most` whose vectors in blocks are
    change(t) in dtype `others`."""

    def make(family, most, others, change=lambda t: t + torch.rand(t.shape, generator=DRAW)):
        path = shutil.copytree(saved(family, most), tmp_path / "mixed")
        state = tensors(path)
        vectors = {
            name: t
            for name, t in state.items()
            if t.ndim == 1 and any(part.isdigit() for part in name.split("."))
        }
        state |= {name: change(t.double()).to(others) for name, t in vectors.items()}
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return path, {name: state[name] for name in vectors}

    return make


@pytest.mark.parametrize(
    "family, most, others, method",
    [
        ("llama", torch.bfloat16, torch.float32, rtn),
        ("qwen2", torch.bfloat16, torch.float64, gptq),
        (
            "deepseek_v3",
            torch.bfloat16,
            torch.float32,
            rtn,
        ),  # a buffer too: the correction bias of its routers
        ("opt", torch.float16, torch.bfloat16, gptq),
        ("mistral", torch.float32, torch.float16, rtn),
    ],
)
def test_what_no_step_changed_has_the_bits_of_the_files(
    family, most, others, method, mixed, tmp_path
):
    path, vectors = mixed(family, most, others)
    result = quantize(open_checkpoint(path), method(INT8), random_tokens(path), tmp_path / "out")
    after = tensors(result.path)
    assert all(bits_equal(after[name], t) for name, t in vectors.items())
    assert (
        json.loads((result.path / "qlab.json").read_text())["changed"] == {}
        and verify(result.path, path).faults == []
    )


def block_of(skeleton, index, decoded=False):
    load_outside(skeleton, with_head=False)
    _, calls = record_blocks(skeleton, IDS)
    path = list(skeleton.blocks)[index]
    return load_block(skeleton, path, calls[path], decoded)


@pytest.mark.parametrize("others", [torch.float32, torch.float16, torch.float64])
def test_a_fold_is_computed_from_the_bits_of_the_files_and_rounded_once_to_their_dtype(
    others, mixed
):
    path, vectors = mixed("opt", torch.bfloat16, others)
    skeleton = Skeleton(open_checkpoint(path), torch.bfloat16)
    graph = block_of(skeleton, 0, decoded=True)
    for origin, sites in by_origin(graph.sites).items():
        if origin not in (places := folds(graph.code)):
            continue
        m_k = torch.rand(graph.weight_ok(sites[0]).shape[-1], generator=DRAW) + 0.5
        fold = places[origin]
        leaves = fold.apply(graph, m_k := fold.tie(m_k))
        for name in {fold.producer.weight, fold.producer.bias} & {
            n for n, leaf in graph.params.items() if leaf.ndim == 1
        }:
            vector = vectors[skeleton.names.file_name(f"{graph.path}.{name}")]
            exact = torch.promote_types(others, torch.float32)
            t = torch.ones(len(vector)).index_copy(0, fold.index_k, m_k)
            expected = (vector.to(exact) * t).to(others)
            assert torch.equal(leaves[name].to(others), expected), name
            assert fold.producer.rows or leaves[name].dtype == others
        if not fold.producer.rows:
            before, after = (
                t[fold.index_k].to(exact)
                for t in (graph.params[fold.producer.weight], leaves[fold.producer.weight])
            )
            # The scale that is scored is the one that is stored.
            assert torch.equal(fold.stored(graph, m_k), (after / before).float())


def test_what_a_method_folded_is_on_record_and_the_rest_is_the_files(mixed, tmp_path):
    path, vectors = mixed("qwen2", torch.bfloat16, torch.float32)
    out = quantize(open_checkpoint(path), awq(INT8), random_tokens(path), tmp_path / "out").path
    after, said = tensors(out), json.loads((out / "qlab.json").read_text())["changed"]
    assert said and said.keys() == {
        name for name, t in vectors.items() if not bits_equal(after[name], t)
    }
    assert all(
        after[name].dtype == torch.float32
        and not torch.equal(after[name], after[name].bfloat16().float())
        for name in said
    )
    assert verify(out, path).faults == []


def test_a_number_that_float16_does_not_hold_is_computed_with_in_float32(mixed, tmp_path):
    path, vectors = mixed("llama", torch.float16, torch.bfloat16, lambda t: t * 1e5)
    out = quantize(open_checkpoint(path), gptq(INT8), random_tokens(path), tmp_path / "out").path
    assert all(bits_equal(tensors(out)[name], t) for name, t in vectors.items())
    assert json.loads((out / "qlab.json").read_text())["job"]["dtype"] == "torch.float32"


def held_by(model):
    return {name: t.dtype for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "family, always, in_float16",
    [
        ("deepseek_v3", (), ()),  # its class names the routers' weights and correction biases
        ("llama", ("input_layernorm",), ("mlp.down_proj", "self_attn.*_proj")),
        ("gpt2", ("ln_1.bias", "wpe"), ("ln_f",)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_transformers_holds_in_float32_is_held_so(
    family, always, in_float16, dtype, saved, monkeypatch, tmp_path
):
    source = saved(family, torch.bfloat16)
    kind = type(AutoModelForCausalLM.from_pretrained(source))
    if always:
        monkeypatch.setattr(kind, "_keep_in_fp32_modules_strict", list(always))
        monkeypatch.setattr(kind, "_keep_in_fp32_modules", list(in_float16))
    expected = held_by(AutoModelForCausalLM.from_pretrained(source, dtype=dtype))
    skeleton = Skeleton(open_checkpoint(source), dtype)
    assert held_by(skeleton.model) == expected
    assert dtype == torch.float32 or len(set(expected.values())) == 2


def test_a_lowered_model_and_the_blocks_of_a_reading_hold_it_so(saved, tmp_path):
    source = saved("deepseek_v3", torch.bfloat16)
    out = quantize_files(source, rtn(parse_spec("int8-g32")), tmp_path / "out").path
    expected = held_by(AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16))
    lowered = lower(out)
    dtypes = {name: dtype for name, dtype in held_by(lowered).items() if name in expected}
    assert torch.float32 in dtypes.values() and dtypes.items() <= expected.items()
    graph = block_of(Skeleton(open_checkpoint(out), torch.bfloat16), -1)
    dense = {
        name: leaf.dtype for name, leaf in graph.params.items() if isinstance(leaf, torch.Tensor)
    }
    assert torch.float32 in dense.values()
    assert all(
        dtype == expected[f"{graph.path}.{name}"]
        for name, dtype in dense.items()
        if f"{graph.path}.{name}" in expected
    )


@pytest.mark.parametrize("others", [torch.float32, torch.float64, torch.float16])
def test_every_door_stores_the_scales_of_one_model_in_one_dtype(others, saved, tmp_path):
    path = shutil.copytree(saved("llama", torch.bfloat16), tmp_path / "model")
    names = ["lm_head.weight", "model.layers.0.self_attn.k_proj.weight"]
    change(path, **{name.replace(".", "__"): lambda t: t.to(others) for name in names})
    recipe, opened = chain(rtn(INT8), outside(rtn(INT8))), open_checkpoint(path)
    one = quantize(opened, recipe, None, tmp_path / "one", codec="gptq_v2")
    two = quantize_files(
        opened, rtn(INT8), tmp_path / "two", codec="gptq_v2", exclude=("*embed*", "*norm*")
    )
    solved, free = tensors(one.path), tensors(two.path)
    assert {t.dtype for name, t in solved.items() if name.endswith(".scales")} == {torch.bfloat16}
    assert solved.keys() == free.keys() and all(
        bits_equal(t, free[name]) for name, t in solved.items()
    )


@pytest.mark.parametrize(
    "family, name",
    [
        ("llama", "model.layers.1.mlp.up_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("llama", "model.norm.weight"),
    ],
)
def test_a_number_that_the_dtype_of_the_run_does_not_hold_is_refused_by_name(
    family, name, door, saved, tmp_path
):
    path = shutil.copytree(saved(family, torch.bfloat16), tmp_path / "model")
    change(path, **{name.replace(".", "__"): lambda t: t.index_fill(0, torch.tensor([1]), 1e5)})
    opened, data = open_checkpoint(path), random_tokens(path)
    words = (
        rf"{name} holds 9\.98e\+04, and torch\.float16 numbers end at 6\.55e\+04; run the model in "
        r"bfloat16 or float32"
    )
    # In float32, as nothing else was asked for.
    result = quantize(opened, gptq(INT8), data, tmp_path / "out")
    acts = [lambda: read(opened, data, torch.float16)]
    if name.endswith(("bias", "norm.weight")):
        acts.append(lambda: lower(result.path, dtype=torch.float16))
    if name.endswith("norm.weight"):
        acts.append(lambda: AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float16))
    if "layers" in name:
        acts.append(
            lambda: quantize(opened, gptq(INT8), data, tmp_path / "again", dtype=torch.float16)
        )
    for act in acts:
        refused(act, *words.replace("\\", "").split("; "))
    assert not (tmp_path / "again").exists()
