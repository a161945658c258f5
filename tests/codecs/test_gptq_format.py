"""The GPTQ codec's tensors: words by hand, the bijection, zero points of both versions, channels in
another order."""

from dataclasses import replace

import pytest
import torch
from corruption import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same, hexes, random_qtensor

from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.codecs import CODECS
from qlab.errors import QlabError

F16 = torch.float16
V1, V2, V2_ORDER = CODECS["gptq"], CODECS["gptq_v2"], CODECS["gptq_v2_desc_act"]
INT4 = Int(4, Tile(1, 32), True, F16)


def unscaled(spec):
    return replace(spec, scale_dtype=None)


def no_lowest(q):
    """The leaf with every zero point above the lowest code, as version 1 needs."""
    return q if q.zeros is None else replace(q, zeros=q.zeros.clamp(min=q.spec.qmin + 1))


@st.composite
def leaves(draw):
    # The last group may not be full.
    bits, group = (draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([None, 8, 32, 48])))
    spec = Int(
        bits, Tile(1, group), draw(st.booleans()), draw(st.sampled_from([F16, torch.bfloat16]))
    )
    q = random_qtensor(
        spec, 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 4)), draw(st.integers(0, 99))
    )
    return q


def canonical_perm(k, group, seed):
    """A random assignment of channels to groups; within a group they ascend."""
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    return torch.cat([part.sort().values for part in order.split(group)])


@settings(max_examples=100)
@given(leaves())
def test_decode_inverts_encode_bit_for_bit(q):
    assert_same(V2.decode("m.q", V2.encode("m.q", q), q.spec), q)
    q = no_lowest(q)
    assert_same(V1.decode("m.q", V1.encode("m.q", q), q.spec), q)


@settings(max_examples=40)
@given(leaves(), st.integers(0, 99))
def test_channels_in_another_order_come_back(q, seed):
    k = q.shape[1]
    q = replace(q, perm=canonical_perm(k, q.spec.tile.cols or k, seed))
    tensors = V2_ORDER.encode("m", q)
    back = V2_ORDER.decode("m", tensors, q.spec)
    assert torch.equal(dense(back), dense(q))
    if q.spec.tile.cols and not torch.equal(q.perm, torch.arange(k)):
        assert_same(back, q)
    if k % (q.spec.tile.cols or k):
        return  # no other group has the size of the last one
    shuffled = replace(
        q,
        codes=q.codes.flip(-1),
        scales=q.scales.flip(-1),
        zeros=q.zeros if q.zeros is None else q.zeros.flip(-1),
        perm=q.perm.flip(-1),
    )  # the same weight, its groups and channels named in reverse
    assert torch.equal(
        dense(V2_ORDER.decode("m", V2_ORDER.encode("m", shuffled), q.spec)), dense(q)
    )


def stream(words, bits, count):
    """The fields of int32 words as one little-endian integer."""
    whole = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words.tolist()))
    return torch.tensor([whole >> (bits * i) & (2**bits - 1) for i in range(count)])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("offset, codec", [(1, V1), (0, V2_ORDER)])
def test_the_formula_of_the_format_gives_the_dense_weight(bits, offset, codec):
    q = no_lowest(random_qtensor(Int(bits, Tile(1, 16), False, F16), 32, 64))
    if codec is V2_ORDER:
        q = replace(q, perm=canonical_perm(64, 16, 7))
    t = codec.encode("m", q)
    W = torch.empty(32, 64, dtype=F16)
    for n in range(32):
        codes = stream(t["m.qweight"][:, n], bits, 64)
        for k in range(64):
            g = int(t["m.g_idx"][k])
            zero = int(stream(t["m.qzeros"][g], bits, 32)[n]) + offset
            W[n, k] = t["m.scales"][g, n] * (int(codes[k]) - zero)
    assert torch.equal(W, dense(q))
    assert torch.equal(dense(codec.decode("m", t, q.spec)), W)


@pytest.mark.parametrize(
    "bits, v1, v2",
    [
        (2, "55555555 55555555", "aaaaaaaa aaaaaaaa"),
        (3, "db6db6db b6db6db6 6db6db6d", "24924924 49249249 92492492"),
        (4, " ".join(["77777777"] * 4), " ".join(["88888888"] * 4)),
        (8, " ".join(["7f7f7f7f"] * 8), " ".join(["80808080"] * 8)),
    ],
)
def test_symmetric_zero_points_have_the_golden_words(bits, v1, v2):
    q = random_qtensor(Int(bits, Tile(1, None), True, F16), 32, 32)
    assert hexes(V1.encode("m", q)["m.qzeros"]) == v1
    assert hexes(V2.encode("m", q)["m.qzeros"]) == v2


@pytest.mark.parametrize(
    "bits, words",
    [
        (2, "e4e4e4e4 e4e4e4e4"),
        (3, "88fac688 c688fac6 fac688fa"),
        (4, "76543210 fedcba98 76543210 fedcba98"),
    ],
)
def test_codes_run_down_the_columns_with_the_golden_words(bits, words):
    codes = (torch.arange(32) % 2**bits - 2 ** (bits - 1)).to(torch.int8).repeat(32, 1)
    tensors = V1.encode(
        "m", QTensor(codes, torch.ones(32, 1, dtype=F16), None, Int(bits, Tile(1, None)))
    )
    assert tensors["m.qweight"].shape == (bits, 32)
    for column in tensors["m.qweight"].mT:
        assert hexes(column) == words


ZERO_AND_FIVES = torch.tensor([[-8], *[[-3]] * 7], dtype=torch.int8)  # unsigned 0 and 5


def test_a_zero_point_of_0_is_written_by_version_2_and_refused_by_version_1():
    q = replace(random_qtensor(Int(4, Tile(1, None), False, F16), 8, 32), zeros=ZERO_AND_FIVES)
    assert hexes(V2.encode("m", q)["m.qzeros"]) == "55555550"
    with pytest.raises(
        QlabError, match=r"^m\.q: 1 of 8 zero points are the lowest code.*write gptq_v2$"
    ):
        V1.encode("m.q", q)


def test_a_borrowed_word_of_version_1_gives_back_every_zero_point():
    q = replace(random_qtensor(Int(4, Tile(1, None), False, F16), 8, 32), zeros=ZERO_AND_FIVES)
    borrowed = {**V2.encode("m", q), "m.qzeros": torch.tensor([[0x4444443F]], dtype=torch.int32)}
    assert_same(V1.decode("m", borrowed, q.spec), q)


@pytest.mark.parametrize("bits, ones", [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_whole_words_less_a_constant_are_version_1_for_any_zero_points(bits, ones):
    q = random_qtensor(Int(bits, Tile(1, 8), False, F16), 32, 64)
    q.zeros[::3] = q.spec.qmin
    tensors = V2.encode("m", q)
    assert_same(V1.decode("m", {**tensors, "m.qzeros": tensors["m.qzeros"] - ones}, q.spec), q)


def test_three_bit_zero_points_of_version_1_wrap_field_by_field():
    q = random_qtensor(Int(3, Tile(1, 8), False, F16), 32, 64)
    # z - 1 mod 8
    lower = replace(q, zeros=torch.where(q.zeros == -4, 3, q.zeros - 1).to(torch.int8))
    assert (q.zeros == -4).any()
    assert_same(V1.decode("m", V2.encode("m", lower), q.spec), q)


@pytest.mark.parametrize("wrong, right", [(V1, V2), (V2, V1)])
def test_a_symmetric_file_read_as_the_other_version_is_refused(wrong, right):
    q = random_qtensor(INT4, 32, 64)
    with pytest.raises(QlabError, match=r"^m\.qzeros is not 8 everywhere.*names the wrong version"):
        wrong.decode("m", right.encode("m", q), q.spec)


def test_trivial_g_idx_is_written_and_may_be_missing_where_the_config_does_not_say_desc_act():
    q = random_qtensor(INT4, 32, 64)
    tensors = V1.encode("m", q)
    assert (
        tensors["m.g_idx"].dtype == torch.int32
        and tensors["m.g_idx"].tolist() == [0] * 32 + [1] * 32
    )
    del tensors["m.g_idx"]
    assert_same(V1.decode("m", tensors, q.spec), q)
    with pytest.raises(QlabError, match=r"^m\.g_idx is missing"):
        CODECS["gptq_desc_act"].decode("m", tensors, q.spec)


def test_an_order_that_readers_would_drop_is_refused():
    q = replace(random_qtensor(INT4, 32, 64), perm=torch.arange(64).flip(0))
    with pytest.raises(
        QlabError,
        match=r"^m: its channels share groups .* readers of gptq drop; write gptq_desc_act$",
    ):
        V1.encode("m", q)
    # The groups are those of g_idx = k // 32.
    within = replace(q, perm=torch.arange(64).view(2, 32).flip(1).flatten())
    assert torch.equal(dense(V1.decode("m", V1.encode("m", within), q.spec)), dense(within))


def test_groups_of_unequal_sizes_are_refused():
    tensors = V1.encode("m", random_qtensor(INT4, 32, 64))
    for channel, group in ((0, 1), (0, -1), (63, 2)):
        g_idx = tensors["m.g_idx"].clone()
        g_idx[channel] = group
        with pytest.raises(QlabError, match="does not give each of 2 groups 32 of 64 channels"):
            V1.decode("m", {**tensors, "m.g_idx": g_idx}, INT4)


# ------------------------------------------------------------------ refusals and damage
@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(spec=Int(5, Tile(1, 32), True, F16)),
            r"has no int5-g32; it holds integers of 2 or 3 or 4 or 8 bits",
        ),
        (
            dict(scales=torch.ones(32, 2)),
            "scales are torch.float32 and GPTQ stores torch.float16; round scales",
        ),
        (
            dict(scales=torch.ones(32, 2), spec=Int(4, Tile(1, 32), True, torch.float32)),
            "has no torch.float32 scales; round them",
        ),
        (
            dict(codes=torch.full((32, 64), 8, dtype=torch.int8)),
            r"codes span \[8, 8\] but int4 holds \[-8, 7\]",
        ),
        (
            dict(
                codes=torch.zeros(32, 64, dtype=torch.int8),
                zeros=torch.ones(32, 2),
                spec=Int(4, Tile(1, 32), False, F16, F16),
            ),
            "no zero points between codes",
        ),
        (
            dict(codes=torch.zeros(4, 64, dtype=torch.int8), scales=torch.ones(4, 2, dtype=F16)),
            "4 x 64 codes of 4 bits do not fill int32",
        ),
        (
            dict(
                codes=torch.zeros(2, 32, 64, dtype=torch.int8),
                scales=torch.ones(2, 32, 2, dtype=F16),
            ),
            r"not \(2, 32, 64\)",
        ),
        (
            dict(scales=torch.ones(1, 1, dtype=F16), spec=Int(4, Tile(None, None))),
            "has no scale per tensor",
        ),
    ],
)
def test_encode_refuses(change, message):
    with pytest.raises(QlabError, match=rf"^m\.q: .*{message}"):
        V1.encode("m.q", replace(random_qtensor(INT4, 32, 64), **change))


def test_refusal_comes_before_any_work():
    assert V1.refusal(unscaled(INT4)) is None
    assert "no run-time operations" in V1.refusal(INT4, (torch.neg,))
    with pytest.raises(QlabError, match="lm_head: GPTQ has no mxfp4"):
        V1.config({"lm_head": parse_spec("mxfp4")})
    with pytest.raises(QlabError, match="none of the 1 modules is quantized"):
        V1.config({"lm_head": None})


@settings(max_examples=200)
@given(st.data())
def test_damaged_tensors_are_refused_or_make_no_difference(data):
    group, bits = data.draw(st.sampled_from([None, 32])), data.draw(st.sampled_from([3, 4]))
    q = no_lowest(random_qtensor(Int(bits, Tile(1, group), data.draw(st.booleans()), F16), 64, 96))
    tensors = data.draw(damaged(V1.encode("m.q", q)))
    try:
        back = V1.decode("m.q", tensors, q.spec)
    except QlabError as error:
        assert str(error).startswith("m.q")
    else:
        assert_same(back, q)
        assert tensors.keys() == V1.encode("m.q", q).keys() - {"m.q.g_idx"}
