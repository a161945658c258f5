"""How run, chat and serve round a model beyond its directory."""

import pytest

import qlab
from qlab.cli.opening import roundings

PLAIN = {"activations": None, "head": None}
FAST = {"activations": "int8", "head": "int8-g32"}


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "out"
    return qlab.open(qlab.quantize(saved("llama"), qlab.rtn("int4-g32"), None, folder).path)


def test_a_quantized_model_on_a_cpu_is_fast_and_others_are_as_they_are(quantized, saved):
    assert roundings(quantized, "cpu", "", "") == FAST
    assert roundings(quantized, "cuda", "", "") == PLAIN
    assert roundings(qlab.open(saved("llama")), "cpu", "", "") == PLAIN


def test_what_is_said_is_taken(quantized):
    assert roundings(quantized, "cpu", "none", "") == PLAIN
    assert roundings(quantized, "cpu", "int8", "none") == {"activations": "int8", "head": None}
    assert roundings(quantized, "cpu", "", "int8-channel")["head"] == "int8-channel"
    assert roundings(quantized, "cuda", "", "int4-g32") == {"activations": None, "head": "int4-g32"}


def test_rows_that_groups_do_not_divide_have_a_scale_each(saved, tmp_path):
    odd = saved("llama", hidden_size=48, num_attention_heads=4, num_key_value_heads=2)
    out = qlab.quantize(odd, qlab.rtn("int4-channel"), None, tmp_path / "out").path
    assert roundings(qlab.open(out), "cpu", "", "")["head"] == "int8-channel"
    qlab.lower(out, head="int8-channel", activations="int8")
