"""What happens at run time at modules, as compressed-tensors writes it: what is read back is what
was written, in the library's own words."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.transform import TransformConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from qlab.algebra.online import MatMul, Multiply, QuantizeInput, Rotate, matrix_of
from qlab.algebra.spec import Float, Int
from qlab.algebra.tile import Tile
from qlab.codecs import CODECS, quantization_of
from qlab.errors import QlabError
from qlab.methods.hadamard import random_hadamard, random_orthogonal

CODEC = CODECS["compressed-tensors"]
HEADS, WIDTH = 4, 8
ATTENTION, DOWN = "layers.0.attn", "layers.0.down"
# so that the attention is a module around others
WEIGHTS = [f"{ATTENTION}.q_proj.weight", f"{DOWN}.weight"]
H2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]])


def rounding(bits, tile, seed=0):
    spec = Int(bits, tile, True) if bits else Float(4, 3, tile)
    if tile.rows == 1:
        return QuantizeInput(spec)
    count = HEADS if tile.cols else 1
    generator = torch.Generator().manual_seed(seed)
    return QuantizeInput(spec, torch.rand(1, count, generator=generator) + 0.1)


def read_back(modules):
    tensors, rows = CODEC.around.encode(modules)
    config = quantization_of(CODEC, {}, around=CODEC.around.config(rows, [ATTENTION]))
    extras = CODEC.extras(config, [*tensors, *WEIGHTS])
    assert {name for extra in extras for name in extra.tensors} == set(tensors)

    def at(module, place, channels):
        ops = [op for e in extras for op in e.ops(module, place, channels, tensors.__getitem__)]
        return sorted(ops, key=lambda op: isinstance(op, QuantizeInput))

    return config, at


tiles = st.sampled_from([Tile(None, None), Tile(None, WIDTH), Tile(1, 4)])


@settings(max_examples=40)
@given(
    bits=st.sampled_from([0, 4, 8]),
    tile=tiles,
    queries=st.booleans(),
    turned=st.booleans(),
    draw=st.sampled_from([random_hadamard, random_orthogonal]),
    seed=st.integers(0, 99),
)
def test_what_is_read_is_what_was_written(bits, tile, queries, turned, draw, seed):
    generator = torch.Generator().manual_seed(seed)
    R = MatMul(random_hadamard(WIDTH, generator))
    places = {"query": (), "key": (), "value": ()}
    for number, place in enumerate(places):
        turns = (R,) if turned and place != "value" else ()
        rounds = (rounding(bits, tile, seed + number),) if queries or place != "query" else ()
        places[place] = turns + rounds
    modules = {ATTENTION: places, DOWN: {"input": (MatMul(draw(WIDTH, generator)),)}}
    config, at = read_back(modules)
    QuantizationConfig.model_validate(config)
    for module, expected in modules.items():
        for place, ops in expected.items():
            there = at(module, place, WIDTH)
            assert len(there) == len(ops)
            for one, other in zip(there, ops):
                if matrix_of(other) is not None:
                    torch.testing.assert_close(matrix_of(one), matrix_of(other), rtol=1e-6, atol=0)
                    continue
                assert one.spec == other.spec
                assert other.scales is None or torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("n", [12, 24, 96, 1536])
def test_a_hadamard_matrix_is_read_back_bit_for_bit(n):
    """Of all but 12 the quotient of a root that was rounded before is another number."""
    turn = MatMul(random_hadamard(n, torch.Generator().manual_seed(0)))
    _, at = read_back({DOWN: {"input": [turn]}})
    (read,) = at(DOWN, "input", n)
    assert torch.equal(read.M_nn, turn.M_nn)


def test_golden_words():
    """R4 of two channels and an fp8 cache, written down by hand."""
    scale = torch.tensor([[0.5]])
    cached = QuantizeInput(Float(4, 3, Tile(None, None)), scale)
    tensors, rows = CODEC.around.encode(
        {ATTENTION: {"key": (cached,), "value": (cached,)}, DOWN: {"input": (MatMul(H2 / 2**0.5),)}}
    )
    group = "rotated_input_of_layers_0_down"
    assert {name: (t.dtype, t.tolist()) for name, t in tensors.items()} == {
        f"{ATTENTION}.k_scale": (torch.float32, [0.5]),
        f"{ATTENTION}.v_scale": (torch.float32, [0.5]),
        f"{DOWN}.{group}_input.weight": (torch.bfloat16, [[1.0, 1.0], [1.0, -1.0]]),
    }
    said = CODEC.around.config(rows, [ATTENTION])
    assert said == {
        "kv_cache_scheme": {
            "dynamic": False,
            "group_size": None,
            "num_bits": 8,
            "strategy": "tensor",
            "symmetric": True,
            "type": "float",
        },
        "transform_config": {
            "config_groups": {
                group: {
                    "apply": [
                        {"ignore": [], "inverse": False, "location": "input", "targets": [DOWN]},
                        {
                            "ignore": [],
                            "inverse": True,
                            "location": "weight_input",
                            "targets": [DOWN],
                        },
                    ],
                    "head_dim": 2,
                    "precision": "torch.float32",
                    "randomize": False,
                    "requires_grad": False,
                    "type": "random-hadamard",
                }
            }
        },
    }
    theirs = TransformConfig.model_validate(said["transform_config"])
    assert theirs.config_groups[group].head_dim == 2


def test_a_matrix_that_modules_of_a_block_share_is_written_once():
    R = random_orthogonal(WIDTH, torch.Generator().manual_seed(0))
    names = [f"layers.0.{kind}" for kind in "qkv"]
    tensors, rows = CODEC.around.encode({name: {"input": (Rotate(R),)} for name in names})
    (group,) = CODEC.around.config(rows, [])["transform_config"]["config_groups"].values()
    assert len(tensors) == 1 and group["type"] == "random-matrix"
    assert [place["targets"] for place in group["apply"][::2]] == [[name] for name in names]


def test_a_matrix_that_is_nearly_of_signs_is_stored_as_it_is():
    """By a ten-thousandth, which a Hadamard matrix of bfloat16 signs would lose."""
    near = MatMul(TURN.M_nn + 1e-4 * torch.eye(WIDTH))
    tensors, rows = CODEC.around.encode({DOWN: {"input": (near,)}})
    assert rows[DOWN]["input"][0]["rotated"] == "random-matrix"
    assert all(torch.equal(stored, near.M_nn) for stored in tensors.values())


KV8 = rounding(8, Tile(None, WIDTH))
TURN = MatMul(random_hadamard(WIDTH, torch.Generator().manual_seed(1)))
OTHER = MatMul(random_hadamard(WIDTH, torch.Generator().manual_seed(2)))
ANY = MatMul(random_orthogonal(WIDTH, torch.Generator().manual_seed(1)))
# of +-1 / sqrt(n) as Hadamard matrices are, whose rows are all one
FLAT = MatMul(torch.full((WIDTH, WIDTH), WIDTH**-0.5))


@pytest.mark.parametrize(
    "places, words",
    [
        ({"key": (KV8,)}, "not key alone"),
        ({"key": (KV8,), "value": (rounding(4, Tile(None, WIDTH)),)}, "alike"),
        ({"query": (TURN,)}, "together, by one matrix"),
        ({"query": (TURN,), "key": (OTHER,)}, "together, by one matrix"),
        ({"query": (TURN,), "key": (ANY,)}, "turns queries and keys by Hadamard matrices"),
        ({"query": (FLAT,), "key": (FLAT,)}, "turns queries and keys by Hadamard matrices"),
        ({"query": (ANY,), "key": (ANY,)}, "turns queries and keys by Hadamard matrices"),
        ({"value": (TURN,)}, "no place for MatMul"),
        ({"key": (KV8, TURN), "value": (KV8,)}, "turns a value once and then rounds it"),
        ({"input": (TURN, TURN)}, "turns a value once"),
        ({"input": (MatMul(torch.stack([TURN.M_nn] * 2)),)}, "and here are 2"),
        ({"output": (KV8,)}, "turns a value once"),
        ({"enter": (TURN,)}, "no place for MatMul"),
        ({"input": (Multiply(torch.ones(WIDTH)),)}, "turns a value once"),
    ],
)
def test_what_the_format_does_not_hold_is_refused(places, words):
    assert words in CODEC.around.refusal(places)
    with pytest.raises(QlabError, match=f"^{ATTENTION}: .*{words}"):
        CODEC.around.encode({ATTENTION: places})


@pytest.mark.parametrize(
    "modules, words",
    [
        (
            {"a": {"key": (KV8,), "value": (KV8,)}},
            "^b does not round its keys and values as a does",
        ),
        (
            {
                name: {"key": (op,), "value": (op,)}
                for name, op in (("a", KV8), ("b", rounding(4, Tile(None, WIDTH))))
            },
            "^a and b round keys and values in different ways",
        ),
    ],
)
def test_what_no_configuration_says_of_all_attentions_is_refused(modules, words):
    _, rows = CODEC.around.encode(modules)
    with pytest.raises(QlabError, match=words):
        CODEC.around.config(rows, ["a", "b"])


@pytest.mark.parametrize(
    "edit, words",
    [
        (torch.neg, "expected positive scales"),
        (lambda t: t.expand(3), "expected positive scales"),
        (torch.Tensor.int, "expected positive scales"),
    ],
)
def test_damaged_scales_are_refused_by_name(edit, words):
    cached = rounding(8, Tile(None, None))
    tensors, rows = CODEC.around.encode({ATTENTION: {"key": (cached,), "value": (cached,)}})
    config = quantization_of(CODEC, {}, around=CODEC.around.config(rows, [ATTENTION]))
    [extra] = CODEC.extras(config, [*tensors, *WEIGHTS])
    with pytest.raises(QlabError, match=f"^{ATTENTION}.k_scale is .*{words}"):
        extra.ops(ATTENTION, "key", WIDTH, lambda name: edit(tensors[name]))


ARGS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}


def read_group(args=None, targets=("re:.*attn$",), **more):
    names = [*WEIGHTS, f"{ATTENTION}.q_scale"]
    group = {"targets": [*targets], "input_activations": ARGS | (args or {}), "weights": None}
    config = {"quant_method": "compressed-tensors", "config_groups": {"a": group}, **more}
    assert CODEC.specs(config, names) == {}
    return CODEC.extras(config, names)


@pytest.mark.parametrize("targets", [["re:.*attn$"], ["LlamaAttention"], [ATTENTION]])
def test_a_group_of_attention_modules_is_read_and_scales_that_lack_are_named(targets):
    [extra] = read_group(targets=targets)
    assert extra.tensors == (f"{ATTENTION}.q_scale",)
    assert extra.missing == (f"{ATTENTION}.k_scale", f"{ATTENTION}.v_scale")


@pytest.mark.parametrize(
    "args, more, words",
    [
        ({"strategy": "token", "dynamic": True}, {}, "strategy 'token', dynamic True"),
        ({"symmetric": False}, {}, "symmetric False"),
        ({"strategy": ["tensor"]}, {}, "strategy"),
        ({"dynamic": "local", "strategy": "group", "group_size": 8}, {}, "dynamic 'local'"),
        ({"num_bits": 3}, {}, "num_bits 3"),
        ({"scale": 1}, {}, "unknown key 'scale'"),
        ({}, {"kv_cache_scheme": ARGS}, "qlab reads one of them"),
    ],
)
def test_groups_of_attentions_that_qlab_does_not_compute_are_refused(args, more, words):
    with pytest.raises(QlabError, match=f"^config group a .*{words}"):
        read_group(args, **more)


def test_scales_of_a_second_attention_in_a_module_have_no_place():
    whole, groups = rounding(8, Tile(None, None)), rounding(4, Tile(1, 4))
    for ops in ((whole, "key", "value"), (groups, "query", "key", "value")):
        places = dict.fromkeys(ops[1:], (ops[0],))
        assert CODEC.around.encode({ATTENTION: places})
        with pytest.raises(QlabError, match=r"attn#2: several attentions run in one module"):
            CODEC.around.encode({f"{ATTENTION}#2": places})
    assert CODEC.around.encode({f"{ATTENTION}#2": {"key": (groups,), "value": (groups,)}})
