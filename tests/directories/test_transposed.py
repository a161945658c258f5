"""Linears that hold their weight as [k, o] (gpt2's Conv1D): codes are [o, k], in the one format
whose readers look for them there."""

import pytest
import torch
from model_folders import bits_equal, random_tokens, tensors
from quick import WRITTEN
from transformers import AutoModelForCausalLM

from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering.model import lower
from qlab.lowering.weights.modules import QLinear
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

INT4 = parse_spec("int4-g32")
IDS = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore:no int4 kernel on a CPU takes")


@pytest.fixture
def source(saved):
    return saved("gpt2", torch.float16)


@pytest.fixture
def written(source, tmp_path):
    return quantize(
        open_checkpoint(source), gptq(INT4), random_tokens(source), tmp_path / "gptq", codec="gptq"
    ).path


def by_hand(source, written):
    """The source's model in fp32 with every quantized weight replaced by what the codes mean,
    transposed here."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    directory = open_checkpoint(written)
    with torch.no_grad():
        for name in directory.quantized:
            parameter = model.get_parameter(f"{name}.weight")
            W_ok = dense(directory.leaf(f"{name}.weight"), torch.float32)
            assert (
                parameter.shape == W_ok.mT.shape
                and (parameter - W_ok.mT).norm() < 0.2 * parameter.norm()
            )
            parameter.copy_(W_ok.mT)
    return model.eval()


@pytest.mark.parametrize("method", WRITTEN)
def test_every_method_writes_codes_near_the_weight(method, source, tmp_path):
    out = quantize(
        open_checkpoint(source),
        WRITTEN[method](INT4),
        random_tokens(source),
        tmp_path / "out",
        codec="gptq",
    ).path
    written = tensors(out)
    assert (
        written["transformer.h.0.attn.c_attn.qweight"].shape == (64 * 4 // 32, 192)
        and len(open_checkpoint(out).quantized) == 8
    )


@torch.no_grad()
def test_lowered_and_opened_by_transformers_they_compute_the_same(source, written, door):
    expected = by_hand(source, written)(IDS).logits
    lowered = lower(written, dtype=torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32)
    for model in (lowered, opened):
        assert sum(isinstance(m, QLinear) for m in model.modules()) == 8
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_qlab_computes_what_transformers_does(source, written):
    data = random_tokens(source, 2, 16)
    nll = torch.nn.functional.cross_entropy(
        by_hand(source, written)(data.ids).logits[:, :-1].flatten(0, 1), data.ids[:, 1:].flatten()
    )
    assert evaluate(
        open_checkpoint(written), open_checkpoint(source), data
    ).perplexity == pytest.approx(float(nll.exp()), rel=1e-5)


def test_verify_finds_the_certified_weights_and_none_of_another_model(source, written, saved):
    verdict = verify(written, source)
    assert verdict.faults == [] and all(row["weight_error"] < 0.2 for row in verdict.sites.values())
    assert any(
        "was certified as" in fault
        for fault in verify(written, saved("gpt2", torch.float16, seed=1)).faults
    )


def test_formats_whose_readers_skip_them_are_refused(written, source, tmp_path):
    with pytest.raises(
        QlabError,
        match=(
            r"h\.0\.attn\.c_attn and 7 more of .*: awq holds nn\.Linear weights, .* codec gptq "
            r"holds"
        ),
    ):
        convert(written, "awq", tmp_path / "awq")
    with pytest.raises(QlabError, match=r"c_attn, .*: compressed-tensors holds nn\.Linear weights"):
        quantize_files(source, rtn(INT4), tmp_path / "free")
    assert not (tmp_path / "awq").exists() and not (tmp_path / "free").exists()
    back = convert(
        convert(written, "gptq_v2", tmp_path / "v2").path, "gptq", tmp_path / "back"
    ).path
    assert tensors(back).keys() == tensors(written).keys()
    assert all(bits_equal(t, tensors(written)[name]) for name, t in tensors(back).items())


def test_without_a_model_they_get_the_same_codes(source, tmp_path):
    free = quantize_files(source, rtn(INT4), tmp_path / "free", codec="gptq").path
    whole = quantize(
        open_checkpoint(source), rtn(INT4), None, tmp_path / "whole", codec="gptq"
    ).path
    assert (
        all(bits_equal(t, tensors(whole)[name]) for name, t in tensors(free).items())
        and verify(free, source).faults == []
    )
