"""What older releases of compressed-tensors wrote: words without straddling codes, g_idx, 2:4
bitmasks. Read only."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same, random_qtensor
from model_folders import tensors
from safetensors.torch import load_file, save_file

from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.codecs import CODECS
from qlab.codecs.compressed_tensors.config import SPARSE
from qlab.directories.model_free import quantize_files
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

CODEC = CODECS["compressed-tensors"]
HEADER = {"quant_method": "compressed-tensors", "quantization_status": "compressed"}


def words(text):
    return torch.tensor(
        [[int(word, 16) - (int(word, 16) >> 31 << 32) for word in text.split()]], dtype=torch.int32
    )


def settled(text):
    return with_scale_dtype(parse_spec(text), torch.float32)


def test_words_without_straddling_codes_are_golden():
    tensors = {
        "m.weight_packed": words("08fac688 1a23eb1a 2c688fac 0000003e"),
        "m.weight_scale": torch.ones(1, 1),
        "m.weight_shape": torch.tensor([1, 32]),
    }
    assert CODEC.decode("m", tensors, parse_spec("int3-channel")).codes[0].tolist() == [
        i % 8 - 4 for i in range(32)
    ]


def without_straddling(codes, n):
    """Rows of codes, floor(32 / n) to a word, by the definition: code j of a word is worth u << (j
    n)."""
    per_word = 32 // n
    rows = [
        [
            sum((c + 2 ** (n - 1)) << (j * n) for j, c in enumerate(row[i : i + per_word]))
            for i in range(0, len(row), per_word)
        ]
        for row in codes.tolist()
    ]
    return torch.tensor(rows).to(torch.int32)


@settings(max_examples=40)
@given(st.sampled_from([3, 5, 6, 7]), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99))
def test_codes_and_zero_points_of_older_files_are_read(n, o, groups, seed):
    q = random_qtensor(settled(f"int{n}-g32-asym"), o, 32 * groups, seed)
    tensors = CODEC.encode("m", q) | {
        "m.weight_packed": without_straddling(q.codes, n),
        "m.weight_zero_point": without_straddling(q.zeros.mT, n).mT,
    }
    assert_same(CODEC.decode("m", tensors, q.spec), q)


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_channels_with_a_group_index_take_the_scale_of_their_group(o, groups, symmetric, seed):
    q = random_qtensor(settled("int4-g8" if symmetric else "int4-g8-asym"), o, 8 * groups, seed)
    g_idx = torch.arange(8 * groups, dtype=torch.int32)[torch.randperm(8 * groups)] // 8
    decoded = CODEC.decode("m", CODEC.encode("m", q) | {"m.weight_g_idx": g_idx}, q.spec)
    zeros = 0 if symmetric else q.zeros[:, g_idx].float()
    assert torch.equal(dense(decoded), (q.codes.float() - zeros) * q.scales[:, g_idx])


@pytest.mark.parametrize(
    "g_idx", [torch.full((32,), -1, dtype=torch.int32), torch.arange(32, dtype=torch.int32) // 8]
)
def test_a_group_index_that_says_nothing_leaves_no_permutation(g_idx):
    q = random_qtensor(settled("int4-g8"), 4, 32)
    assert_same(CODEC.decode("m", CODEC.encode("m", q) | {"m.weight_g_idx": g_idx}, q.spec), q)


def test_actorder_of_groups_is_read_from_the_config():
    weights = {"num_bits": 4, "type": "int", "group_size": 8, "actorder": "group"}
    config = HEADER | {
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    assert CODEC.specs(config, ["m.weight_packed"]) == {"m": parse_spec("int4-g8")}


def sparse(W):
    """W [o, k] with two of every four set, as the format stores it, by its definition."""
    mask = torch.tensor(
        [
            [
                sum(int(W[i, j + b] != 0) << b for b in range(min(8, W.shape[1] - j)))
                for j in range(0, W.shape[1], 8)
            ]
            for i in range(len(W))
        ],
        dtype=torch.uint8,
    )
    return {
        "m.compressed": W[W != 0].view(len(W), -1),
        "m.bitmask": mask,
        "m.shape": torch.tensor(W.shape).reshape(-1, 1),
    }


def two_of_four(o, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(o, k // 4, 4, generator=generator).argsort(-1)
    return (torch.randn(o, k, generator=generator) + 9) * (order < 2).view(o, k)


def test_a_bitmask_is_golden():
    mask = torch.tensor([[0b10100011, 0b0110]], dtype=torch.uint8)
    tensors = {
        "m.compressed": torch.tensor([[1.0, 2, 3, 4, 5, 6]]),
        "m.bitmask": mask,
        "m.shape": torch.tensor([[1], [12]]),
    }
    assert CODEC.decode("m", tensors, None).tolist() == [[1, 2, 0, 0, 0, 3, 0, 4, 0, 5, 6, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=20)
@given(o=st.integers(1, 9), fours=st.integers(1, 9), seed=st.integers(0, 99))
def test_two_of_four_weights_are_read(dtype, o, fours, seed):
    W = two_of_four(o, 4 * fours, seed).to(dtype)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    assert CODEC.specs(config, ["m.compressed", "m.bitmask", "m.shape", "n.weight"]) == {"m": None}
    assert torch.equal(CODEC.decode("m", sparse(W), None), W)


def test_two_of_four_codes_are_read():
    codes = two_of_four(4, 16).to(torch.float8_e4m3fn)
    whole = {"m.weight": codes, "m.weight_scale": torch.rand(4, 1)}
    stored = sparse(codes.float())
    stored["m.compressed"] = stored["m.compressed"].to(torch.float8_e4m3fn)
    spec = parse_spec("fp8-channel")
    assert_same(
        CODEC.decode("m", stored | {"m.weight_scale": whole["m.weight_scale"]}, spec),
        CODEC.decode("m", whole, spec),
    )
    config = HEADER | {
        "config_groups": {"FP8_DYNAMIC": ["Linear"]},
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    assert CODEC.specs(config, [*stored, "m.weight_scale"]) == {"m": spec}


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("shape", None, "m.shape is missing"),
        ("shape", torch.tensor([4, 18]), r"m.shape \(4, 18\) has no rows of whole fours"),
        ("shape", torch.tensor([4, 1 << 60]), r"m.compressed is .*expected"),
        (
            "compressed",
            torch.ones(4, 7),
            r"m.compressed is .*\(4, 7\), expected torch.float32 \(4, 8\)",
        ),
        ("bitmask", torch.full((4, 2), 255, dtype=torch.uint8), "does not keep two of every four"),
    ],
)
def test_damaged_bitmasks_are_refused(name, tensor, message):
    tensors = sparse(two_of_four(4, 16))
    tensors.pop(f"m.{name}")
    with pytest.raises(QlabError, match=message):
        CODEC.decode("m", tensors | ({} if tensor is None else {f"m.{name}": tensor}), None)


def test_bitmasks_that_the_config_does_not_speak_of_are_refused():
    with pytest.raises(
        QlabError, match=r"m\.compressed is in the files, and quantization_config names no spec"
    ):
        CODEC.specs(HEADER | {"config_groups": {}}, ["m.compressed"])


def test_a_model_of_two_of_four_weights_is_quantized_as_the_dense_one(folder, tmp_path):
    whole = load_file(folder / "model.safetensors")
    linears = {
        name.removesuffix(".weight"): t
        for name, t in whole.items()
        if name.endswith("_proj.weight")
    }
    stored = {name: t for name, t in whole.items() if name.removesuffix(".weight") not in linears}
    for path, W in linears.items():
        whole[f"{path}.weight"] = W = two_of_four(*W.shape)
        stored |= {name.replace("m.", f"{path}.", 1): t for name, t in sparse(W).items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    pruned = shutil.copytree(folder, tmp_path / "pruned")
    save_file(stored, pruned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((pruned / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "config_groups": {},
        "sparsity_config": {"format": SPARSE},
    }
    (pruned / "config.json").write_text(json.dumps(config))
    recipe = rtn(parse_spec("int4-g16"))
    ways = {
        "normal": lambda path, out: quantize(open_checkpoint(path), recipe, None, out),
        "free": lambda path, out: quantize_files(path, recipe, out),
    }
    for name, way in ways.items():
        ours, theirs = (
            tensors(way(path, tmp_path / name / path.name).path) for path in (pruned, folder)
        )
        assert ours.keys() == theirs.keys() and all(
            torch.equal(ours[name], theirs[name]) for name in ours
        )
