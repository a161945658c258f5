"""GGUF files written by the gguf package: codes by hand, weights as transformers reads them, files
that are damaged."""

import gguf
import numpy as np
import pytest
import torch
from families import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import unpacked
from transformers import AutoModelForCausalLM

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.codecs.gguf import tensors
from qlab.errors import QlabError

KINDS = gguf.GGMLQuantizationType
OURS = {
    "self_attn.q_proj": KINDS.Q4_0,
    "self_attn.k_proj": KINDS.Q8_0,
    "self_attn.v_proj": KINDS.Q4_1,
    "mlp.up_proj": KINDS.Q4_0,
    "mlp.down_proj": KINDS.F16,
    "mlp.gate_proj": KINDS.BF16,
}
ARCH, MODEL = "llama", dict(num_key_value_heads=2, num_attention_heads=4)


def leaves(path, names):
    return {name: leaf for name, _, leaf in tensors(path, names)}


def interleaved(W, heads):
    """The rows of q and k as the format has them: the first row of a head, the first of its second
    half, and so on."""
    half = W.shape[0] // heads // 2
    return torch.stack(
        [W[(2 * h + part) * half + i] for h in range(heads) for i in range(half) for part in (0, 1)]
    )


def write(path, model, arch=ARCH, more=None):
    writer, config = gguf.GGUFWriter(path, arch), model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(config.vocab_size)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, W in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            module.rpartition(".")[2]
        )
        W = interleaved(W, heads) if heads and arch == "llama" else W
        stored = next((k for part, k in OURS.items() if module.endswith(part)), KINDS.F32)
        data = (
            W.numpy().astype(np.float16)
            if stored == KINDS.F16
            else gguf.quantize(W.numpy(), stored)
        )
        writer.add_tensor(f"{table.get_name(module)}.{kind}", data, raw_dtype=stored)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model():
    return tiny("llama", **MODEL)


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write(path, model)
    return path


def test_weights_are_those_that_transformers_reads(model, file):
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **unpacked()
    ).state_dict()
    decoded = leaves(file, list(model.state_dict()))
    assert decoded.keys() == model.state_dict().keys()
    for name, leaf in decoded.items():
        assert torch.equal(dense(leaf, torch.float32), loaded[name]), name
    kinds = {
        name: str(leaf.spec) if isinstance(leaf, QTensor) else leaf.dtype
        for name, leaf in decoded.items()
        if ".0." in name
    }
    assert (
        kinds["model.layers.0.self_attn.q_proj.weight"] == "int4-g32"
        and kinds["model.layers.0.mlp.up_proj.weight"] == "int4-g32"
    )
    assert kinds["model.layers.0.self_attn.k_proj.weight"] == "int8-g32"
    assert kinds["model.layers.0.self_attn.v_proj.weight"] == torch.float32


def one_tensor(path, data, kind, name="blk.0.ffn_up.weight", blocks=1):
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(blocks)
    writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return leaves(path, ["model.layers.0.mlp.up_proj.weight"])["model.layers.0.mlp.up_proj.weight"]


def test_blocks_hold_codes_as_by_hand(tmp_path):
    half = bytes([0x00, 0x38])  # 0.5 as float16
    # Low nibbles 0 to 15, high ones 1.
    q4 = np.frombuffer(half + bytes(range(0x10, 0x20)), dtype=np.uint8)[None]
    leaf = one_tensor(tmp_path / "q4.gguf", q4, KINDS.Q4_0)
    assert leaf.codes.tolist() == [[*range(-8, 8), *[-7] * 16]]
    assert leaf.scales.tolist() == [[0.5]] and leaf.spec == Int(4, Tile(1, 32), True, torch.float16)
    q8 = np.frombuffer(half + bytes([0x80, 0xFF, 0, 0x7F] * 8), dtype=np.uint8)[None]
    assert one_tensor(tmp_path / "q8.gguf", q8, KINDS.Q8_0).codes.tolist() == [
        [-128, -1, 0, 127] * 8
    ]


D, M = bytes([0x00, 0x38]), bytes([0x00, 0x34])  # 0.5 and 0.25 as float16
# a block of 256 by hand -> its values: 32 at a time, repeated over the block
BY_HAND = {
    # a byte of scales: low nibble 1, which d multiplies, high nibble 2, which dmin multiplies;
    # codes 0, 1, 2, 3 from the low bits up
    "Q2_K": (bytes([0x21] * 16 + [0xE4] * 64) + D + M, [-0.5, 0.0, 0.5, 1.0]),
    # scales 33 - 32 in low nibbles and high pairs of bits; a bit of the mask that is not set takes
    # 4 off
    "Q3_K": (bytes([0xFF] * 32 + [0xE4] * 64 + [0x11] * 8 + [0xAA] * 4) + D, [0.0, 0.5, 1.0, 1.5]),
    "Q3_K without its mask": (
        bytes([0x00] * 32 + [0xE4] * 64 + [0x11] * 8 + [0xAA] * 4) + D,
        [-2.0, -1.5, -1.0, -0.5],
    ),
    # scales 1 and mins 2, the last four of either in the nibbles of the last four bytes; codes 0
    # and 3
    "Q4_K": (D + M + bytes([1] * 4 + [2] * 4 + [0x21] * 4 + [0x30] * 128), [-0.5, 1.0]),
    "Q5_K": (
        D + M + bytes([1] * 4 + [2] * 4 + [0x21] * 4 + [0xFF] * 32 + [0x30] * 128),
        [7.5, 9.0],
    ),  # every fifth bit: 16 more
    # low nibbles 15 of the first 64, high ones 0 of the others, above them pairs of bits 0, 1, 2,
    # 3; 32 is taken off
    "Q6_K": (bytes([0x0F] * 128 + [0xE4] * 64 + [1] * 16) + D, [-8.5, -0.5, 0.0, 8.0]),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_k_quants_have_their_values_by_hand(case, tmp_path):
    block, values = BY_HAND[case]
    leaf = one_tensor(
        tmp_path / "k.gguf", np.frombuffer(block * 2, dtype=np.uint8)[None], KINDS[case.split()[0]]
    )
    assert leaf.view(16, 32).tolist() == [[value] * 32 for value in (values * 16)[:16]]


def test_k_quants_are_dequantized_by_the_package(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (3, 144), dtype=np.uint8)
    # Scales that are finite.
    data[:, 0:4] = np.frombuffer(np.array([0.5, 0.25], dtype=np.float16).tobytes(), dtype=np.uint8)
    leaf = one_tensor(tmp_path / "k.gguf", data, KINDS.Q4_K)
    assert leaf.shape == (3, 256) and torch.equal(
        leaf, torch.from_numpy(gguf.dequantize(data, KINDS.Q4_K))
    )


def test_scaled_rotary_frequencies_are_refused(model, tmp_path):
    write(tmp_path / "model.gguf", model, more={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    with pytest.raises(
        QlabError, match=r"model\.gguf holds rope_freqs\.weight: its rotary frequencies are scaled"
    ):
        leaves(tmp_path / "model.gguf", list(model.state_dict()))


def test_what_does_not_belong_together_is_refused(model, file, tmp_path):
    names = list(model.state_dict())
    with pytest.raises(
        QlabError, match=r"model\.gguf has no tensor for model\.layers\.0\.other\.weight"
    ):
        leaves(file, [*names, "model.layers.0.other.weight"])
    with pytest.raises(
        QlabError,
        match=r"model\.gguf holds blk\.0\.attn_k\.weight, for which the model has no parameter",
    ):
        leaves(file, [name for name in names if "layers.0.self_attn.k_proj" not in name])
    write(tmp_path / "gemma.gguf", model, "gemma2")
    with pytest.raises(
        QlabError, match=r"architecture 'gemma2'; qlab reads llama, qwen2, qwen3: convert it"
    ):
        leaves(tmp_path / "gemma.gguf", names)


@pytest.mark.parametrize("blocks", [0, 2, 2**31])
def test_a_file_has_blocks_and_no_more_than_tensors(blocks, tmp_path):
    one = np.zeros((1, 32), dtype=np.float32)
    with pytest.raises(QlabError, match=f"it has {blocks} blocks and holds 1 tensors; download"):
        one_tensor(tmp_path / "one.gguf", one, KINDS.F32, blocks=blocks)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_holds_other_numbers(data, model, file, tmp_path):
    whole = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            # Header, names and shapes come first in the file.
            whole[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.gguf").write_bytes(whole)
    try:
        decoded = leaves(tmp_path / "damaged.gguf", list(model.state_dict()))
    except QlabError:
        return
    assert decoded.keys() == model.state_dict().keys()
