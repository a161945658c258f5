"""AWQ's layouts for matrix-vector kernels: words by hand, and directories that mean what version
gemm means."""

import json

import pytest
import torch
from corruption import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from leaves import assert_same, random_qtensor

from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS, LEGACY_CONFIGS, reader
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.files.tensors import write

F16 = torch.float16
BY_VERSION = pytest.mark.parametrize("version", ["gemv", "gemv_fast", "llm-awq"])
CONFIG = {"quant_method": "awq", "bits": 4, "zero_point": True}


def codec(version, **changes):
    return reader({**CONFIG, "group_size": 128, "version": version, **changes})


def width(groups, group):
    """Words of a row's zero points, as the formats' documentation counts them."""
    multiple = {32: 4, 64: 2}.get(group, 1)
    words = (groups + 7) // 8
    return (words + multiple - 1) // multiple * multiple


def word(nibbles, dtype):
    """One word of these nibbles, the first one lowest."""
    value = sum(int(n) << 4 * i for i, n in enumerate(nibbles))
    return torch.tensor(value).to(dtype)


def written(version, q):
    """The tensors that the formats' own writers make of a leaf, number by number."""
    (o, k), groups = q.shape, q.scales.shape[1]
    u = q.codes.int() + 8
    z = (torch.zeros_like(q.scales, dtype=torch.int8) if q.zeros is None else q.zeros).int() + 8
    w = width(groups, q.spec.tile.cols or k)
    scales = torch.zeros(o, 8 * w, dtype=q.scales.dtype)
    scales[:, :groups] = q.scales
    if version == "gemv":
        zeros = torch.zeros(o, 8 * w, dtype=torch.int32)
        zeros[:, :groups] = z
        pack = lambda x: torch.stack(
            [
                word(x[n, 8 * c : 8 * c + 8], torch.int32)
                for n in range(o)
                for c in range(x.shape[1] // 8)
            ]
        )
        return {
            "m.qweight": pack(u).view(o, -1),
            "m.qzeros": pack(zeros).view(o, -1),
            "m.scales": scales,
        }
    words = torch.zeros(o // 4, k, dtype=torch.int16)
    for n in range(o):
        for c in range(k // 64):
            for h in range(2):
                for a in range(8):
                    first = 64 * c + 32 * h + a
                    columns = [first, first + 8, first + 16, first + 24]
                    words[n // 4, 64 * c + 16 * (n % 4) + 8 * h + a] = word(
                        u[n, columns], torch.int16
                    )
    scaled = torch.zeros_like(scales)
    scaled[:, :groups] = (-(q.scales.float() * z)).to(q.scales.dtype)
    name = "scaled_zeros" if version == "llm-awq" else "qzeros"
    return {
        "m.qweight": words,
        "m.scales": scales.mT.contiguous(),
        f"m.{name}": scaled.mT.contiguous(),
    }


def test_gemv_words_by_hand():
    tensors = {
        "m.qweight": torch.tensor([[0x76543210, 0xFEDCBA98 - (1 << 32)] * 8], dtype=torch.int32),
        "m.qzeros": torch.tensor([[0x7]], dtype=torch.int32),
        "m.scales": torch.eye(1, 8, dtype=F16),
    }
    q = codec("gemv").decode("m", tensors, Int(4, Tile(1, 128), False))
    assert (
        q.codes[0].tolist() == [*range(-8, 8)] * 8
        and q.zeros.tolist() == [[-1]]
        and q.scales.tolist() == [[1.0]]
    )


def test_gemv_fast_words_by_hand():
    # codes floor(k / 2) mod 16 in every row: a word holds columns a, a + 8, a + 16, a + 24
    words = [f"{c:04x}" for pair in ("c840", "d951", "ea62", "fb73") for c in [int(pair, 16)] * 2]
    row = torch.tensor([int(w, 16) for w in words] * 2).to(torch.int16)
    first = torch.eye(8 * 2, 1, dtype=F16).expand(-1, 8)  # one group, and padding
    tensors = {
        "m.qweight": row.repeat(2, 4).view(2, 64),
        "m.scales": 0.5 * first,
        "m.qzeros": -1.5 * first,
    }
    q = codec("gemv_fast").decode("m", tensors, Int(4, Tile(1, 64), False))
    assert (q.codes.int() + 8).tolist() == [[k // 2 % 16 for k in range(64)]] * 8
    assert q.zeros.eq(3 - 8).all() and q.zeros.shape == (8, 1)  # -(0.5 * 3)


@st.composite
def leaves(draw):
    group = draw(st.sampled_from([32, 64, 128, None]))
    spec = Int(4, Tile(1, group), draw(st.booleans()), draw(st.sampled_from([F16, torch.bfloat16])))
    k = 64 * draw(st.integers(1, 3)) if group in (32, 64) else 128 * draw(st.integers(1, 2))
    return random_qtensor(spec, 4 * draw(st.integers(1, 2)), k, draw(st.integers(0, 99)))


@BY_VERSION
@settings(max_examples=20)
@given(q=leaves())
def test_what_the_writers_make_of_a_leaf_is_that_leaf(version, q):
    assert_same(codec(version).decode("m", written(version, q), q.spec), q)


def test_a_group_whose_scale_is_zero_reads_as_zeros():
    q = random_qtensor(Int(4, Tile(1, 64), False, F16), 4, 64)
    tensors = written("gemv_fast", q)
    tensors["m.scales"][:, 1] = tensors["m.qzeros"][:, 1] = 0
    assert codec("gemv_fast").decode("m", tensors, q.spec).zeros[1].item() == 0


@BY_VERSION
def test_a_directory_of_another_version_means_what_gemm_means(version, tmp_path):
    q = random_qtensor(Int(4, Tile(1, 64), False, F16), 16, 128)
    config = {**CONFIG, "group_size": 64}
    for name, tensors, said in (
        ("gemm", CODECS["awq"].encode("m", q), {"version": "gemm"}),
        ("other", written(version, q), {"version": version.upper()}),
    ):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.safetensors", tensors.items())
        (tmp_path / name / "config.json").write_text(
            json.dumps({"quantization_config": config | said})
        )
    gemm, other = (open_checkpoint(tmp_path / name) for name in ("gemm", "other"))
    assert other.quantized == gemm.quantized
    assert_same(other.leaf("m.weight"), gemm.leaf("m.weight"))
    with pytest.raises(QlabError, match=f"qlab reads AWQ {version} and does not write it"):
        other.codec.encode("m", q)


def test_other_ways_to_name_a_version():
    q = random_qtensor(Int(4, Tile(1, 64), False, F16), 4, 64)
    for said in ({"backend": "llm-awq", "version": "gemm"}, {"format": "llm-awq"}):
        said = {**CONFIG, "group_size": 64, **said}
        assert_same(reader(said).decode("m", written("llm-awq", q), q.spec), q)
    legacy = LEGACY_CONFIGS["quant_config.json"](
        {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMV"}
    )
    assert_same(reader(legacy).decode("m", written("gemv", q), q.spec), q)


FIRST = torch.eye(16, 1, dtype=F16).expand(-1, 4)  # the one group of four rows, and padding


@pytest.mark.parametrize(
    "version, change, message",
    [
        (
            "gemv",
            {"m.qzeros": torch.zeros(4, 1, dtype=torch.int32)},
            r"^m\.qzeros is torch.int32 \(4, 1\), expected torch.int32 \(4, 2\)",
        ),
        (
            "gemv_fast",
            {"m.qweight": torch.zeros(1, 32, dtype=torch.int16)},
            r"^m\.qweight \(1, 32\) is not made of 64 columns",
        ),
        ("gemv_fast", {"m.qzeros": 0.3 * FIRST}, r"^m\.qzeros holds no rounded products"),
        (
            "llm-awq",
            {"m.scaled_zeros": FIRST.where(FIRST == 0, torch.nan)},
            r"^m\.scaled_zeros holds NaN or Inf",
        ),
        (
            "llm-awq",
            {"m.qzeros": torch.zeros(16, 4, dtype=F16)},
            r"^m\.qzeros has no place in AWQ llm-awq",
        ),
    ],
)
def test_tensors_that_are_none_of_the_format_are_refused(version, change, message):
    q = random_qtensor(Int(4, Tile(1, 64), False, F16), 4, 64)
    with pytest.raises(QlabError, match=message):
        codec(version).decode("m", written(version, q) | change, q.spec)


@BY_VERSION
def test_groups_and_zero_points_that_the_config_denies_are_refused(version):
    q = random_qtensor(Int(4, Tile(1, 64), False, F16), 4, 64)
    with pytest.raises(QlabError, match=r"^m has zero points other than 8"):
        codec(version).decode("m", written(version, q), Int(4, Tile(1, 64), True, F16))
    with pytest.raises(
        QlabError,
        match=r"^m has groups of 16 for 64 input channels; AWQ .* has groups of 32, 64, 128",
    ):
        codec(version).decode("m", written(version, q), Int(4, Tile(1, 16), False, F16))


@BY_VERSION
@settings(max_examples=40)
@given(data=st.data())
def test_damaged_tensors_are_refused(version, data):
    # of so many groups that no narrower qweight goes with their padded number
    q = random_qtensor(Int(4, Tile(1, 64), False, F16), 8, 1536)
    with pytest.raises(QlabError, match=r"^m[. ]"):
        codec(version).decode("m", data.draw(damaged(written(version, q))), q.spec)
