"""Converting moves codes between formats and never changes one; what cannot be carried is refused
by name, or rounded on request."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from foreign import directory
from model_folders import bits_equal, change, contents, tensors

from qlab.algebra.qtensor import dense
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import rules
from qlab.codecs import CODECS
from qlab.directories.convert import convert
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn
from qlab.process import ahead

UP = "model.layers.1.mlp.up_proj"


def leaves(path):
    model = open_checkpoint(path)
    return {name: model.leaf(f"{name}.weight") for name in model.quantized}


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """quantized(spec, dtype) -> a directory of RTN's codes."""

    def make(spec: str, dtype=torch.float16):
        out = tmp_path_factory.mktemp("quantized") / spec
        return quantize(
            open_checkpoint(saved("llama", dtype)), rtn(parse_spec(spec)), None, out
        ).path

    return make


@pytest.mark.parametrize("codec", [name for name in CODECS if not CODECS[name].file])
def test_there_and_back_again_gives_the_same_numbers(codec, quantized, tmp_path):
    source = quantized("int4-g32")
    there = convert(source, codec, tmp_path / "there").path
    back = convert(there, "compressed-tensors", tmp_path / "back").path
    before, between, after = leaves(source), leaves(there), leaves(back)
    assert before.keys() == between.keys() == after.keys()
    for name, leaf in before.items():
        assert fingerprint(leaf) == fingerprint(between[name]) == fingerprint(after[name])
        assert torch.equal(dense(leaf, torch.float32), dense(between[name], torch.float32))
    assert leaves(there)[UP].codes.equal(before[UP].codes)


def test_a_symmetric_directory_in_a_format_with_zero_points_and_back(
    four_bits, quantized, tmp_path
):
    source = quantized("int4-g32")
    there = convert(source, four_bits, tmp_path / "there").path
    assert (
        leaves(there)[UP].zeros.eq(0).all()
        and open_checkpoint(there).raw["quantization_config"]["quant_method"] == four_bits
    )
    back = convert(there, "compressed-tensors", tmp_path / "back").path
    assert all(
        fingerprint(leaf) == fingerprint(leaves(back)[name])
        for name, leaf in leaves(source).items()
    )


def test_everything_else_is_carried(four_bits, quantized, tmp_path):
    source = quantized("int4-g32-asym")
    # A file of a format that the new directory does not have.
    (source / "quantize_config.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    out = convert(source, four_bits, tmp_path / "out").path
    shutil.copytree(out, tmp_path / "again.partial")  # of a run that was killed just before its end
    (tmp_path / "again.partial" / ".work").mkdir()
    assert contents(convert(source, four_bits, tmp_path / "again").path) == contents(out)
    old, new = tensors(source), tensors(out)
    plain = [name for name in old if "proj" not in name]
    assert len(plain) > 5 and all(bits_equal(old[name], new[name]) for name in plain)
    kept = {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    } & contents(source).keys()
    assert len(kept) >= 4 and all(contents(source)[name] == contents(out)[name] for name in kept)
    assert "quantize_config.json" not in contents(out)
    record, was = (json.loads((path / "qlab.json").read_text()) for path in (out, source))
    assert record["certificates"] == was["certificates"] and record["changed"] == was["changed"]
    assert record["sites"][UP]["weight_error"] == was["sites"][UP]["weight_error"]
    assert record["job"]["converted_from"] == was["job"]


def test_biases_of_quantized_modules_are_carried(saved, four_bits, tmp_path):
    source = quantize(
        open_checkpoint(saved("qwen2", torch.float16)),
        rtn(parse_spec("int4-g32")),
        None,
        tmp_path / "q",
    ).path
    out = convert(source, four_bits, tmp_path / "out").path
    biases = [name for name in tensors(source) if name.endswith("q_proj.bias")]
    assert len(biases) == 2 and all(
        bits_equal(tensors(source)[name], tensors(out)[name]) for name in biases
    )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_converted_one_by_one(family, saved, tmp_path):
    source = saved(family, torch.float16)
    first = quantize(
        open_checkpoint(source), rtn(parse_spec("int4-g32")), None, tmp_path / "q"
    ).path
    there = convert(first, "awq", tmp_path / "there").path
    back = convert(there, "compressed-tensors", tmp_path / "back").path
    configs = [
        json.loads((path / "config.json").read_text())["quantization_config"]
        for path in (first, back)
    ]
    assert configs[0] == configs[1] and any(
        name.endswith("mlp.gate") for name in configs[1]["ignore"]
    )  # routers too
    assert leaves(first).keys() == leaves(there).keys() and any(
        "experts.1." in name for name in leaves(there)
    )
    assert all(
        fingerprint(leaf) == fingerprint(leaves(there)[name])
        for name, leaf in leaves(first).items()
    )
    assert verify(there, source).faults == []


def test_what_the_specs_alone_forbid_is_refused_before_anything_is_read(
    four_bits, quantized, tmp_path, monkeypatch
):
    source = open_checkpoint(quantized("int8-channel"))
    monkeypatch.setattr(type(source), "tensor", None)
    with pytest.raises(
        QlabError,
        match=(
            r"four-bits cannot hold .*mlp.* and 10 more \(four-bits has 4 bits, not "
            r"8\).*--requantize"
        ),
    ):
        convert(source, four_bits, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_scales_that_would_be_rounded_are_refused_and_named(four_bits, quantized, tmp_path):
    source = quantized("int4-g32", torch.float32)
    with pytest.raises(
        QlabError,
        match=r"four-bits cannot hold .*and 10 more \(float32 scales would be rounded to float16\)",
    ):
        convert(source, four_bits, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rounding_anew_is_an_explicit_act_and_its_error_is_reported(four_bits, quantized, tmp_path):
    source = quantized("int8-channel")
    result = convert(source, four_bits, tmp_path / "out", requantize=parse_spec("int4-g32"))
    assert len(result.requantized) == 14 and all(
        0.02 < error < 0.2 for error in result.requantized.values()
    )
    new, old = leaves(result.path)[UP], leaves(source)[UP]
    W, V = dense(old, torch.float32), dense(new, torch.float32)
    assert result.requantized[UP] == pytest.approx(float((V - W).norm() / W.norm()), rel=1e-6)
    record = json.loads((result.path / "qlab.json").read_text())
    assert record["sites"][UP]["requantized_from"] == "int8-channel" and record["certificates"][UP][
        "hash"
    ] == fingerprint(new)
    assert record["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 32)


def test_rounding_anew_keeps_the_codes_that_fit(four_bits, saved, tmp_path):
    mixed = rules({"*.mlp.*": rtn(parse_spec("int8-channel")), "*": rtn(parse_spec("int4-g32"))})
    model = saved("llama", torch.float16)
    source = quantize(open_checkpoint(model), mixed, None, tmp_path / "q").path
    result = convert(source, four_bits, tmp_path / "out", requantize=parse_spec("int4-g32"))
    assert set(result.requantized) == {name for name in leaves(source) if "mlp" in name}
    kept = [name for name in leaves(source) if "attn" in name]
    assert all(
        fingerprint(leaves(source)[name]) == fingerprint(leaves(result.path)[name]) for name in kept
    )
    # What was rounded anew is certified by its hash: the model was not there.
    verdict = verify(result.path, model)
    assert verdict.faults == [] and all(
        (verdict.sites[name]["certified_error"] is None) == ("mlp" in name)
        for name in verdict.sites
    )
    with pytest.raises(QlabError, match="cannot hold int3-g32 weights"):
        convert(source, four_bits, tmp_path / "no", requantize=parse_spec("int3-g32"))


def test_what_cannot_be_converted_at_all(saved, quantized, tmp_path):
    with pytest.raises(QlabError, match="is not quantized"):
        convert(saved(), "compressed-tensors", tmp_path / "out")
    source = quantized("int4-g32")
    with pytest.raises(
        QlabError, match="the codec 'nothing' is unknown; qlab writes compressed-tensors"
    ):
        convert(source, "nothing", tmp_path / "out")
    with pytest.raises(QlabError, match="choose another output directory"):
        convert(source, "compressed-tensors", source, overwrite=True)
    with pytest.raises(QlabError, match=r"holds the model .*; choose another one"):
        convert(source, "compressed-tensors", Path(source).parent, overwrite=True)
    assert not (tmp_path / "out").exists() and Path(source).is_dir()


@pytest.mark.parametrize(
    "name, words",
    [
        (
            "W8A8",
            r"gptq cannot hold the rounding of inputs .* at model.*_proj \(int8-channel\) and 13 "
            r"more, which would be lost",
        ),
        ("hqq, axis 0", "holds no codes on a grid that qlab has"),
        ("torchao int4", "holds no codes on a grid that qlab has"),
    ],
)
@pytest.mark.parametrize("requantize", [None, "int4-g32"])
def test_what_a_format_does_beside_codes_is_not_dropped(name, words, requantize, tmp_path):
    source = directory(name, tmp_path / name)
    with pytest.raises(QlabError, match=words):
        convert(source, "gptq", tmp_path / "out", requantize=requantize and parse_spec(requantize))
    assert not (tmp_path / "out").exists()


def test_codes_of_another_model_than_the_configurations_are_refused(quantized, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(quantized("int4-g32"), source)
    config = json.loads((source / "config.json").read_text())
    config["intermediate_size"] *= 2
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(QlabError, match=r"holds the codes of .* config\.json describes"):
        convert(source, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_codes_stop_a_conversion_and_leave_nothing(quantized, tmp_path):
    source = quantized("int4-g32")
    single = tmp_path / "single"
    convert(source, "compressed-tensors", single)
    shards = sorted(single.glob("*.safetensors"))
    shards[-1].write_bytes(shards[-1].read_bytes()[:-8])
    with pytest.raises(QlabError, match="truncated"):
        convert(single, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_few_tensors_are_alive_at_once(quantized, tmp_path, monkeypatch):
    source, alive, most = open_checkpoint(quantized("int4-g32")), [], []
    real = type(source).tensor

    def tensor(self, name):
        result = real(self, name)
        alive[:] = [ref for ref in alive if not torch.UntypedStorage._expired(ref)] + [
            result.untyped_storage()._weak_ref()
        ]
        most.append(len(alive))
        return result

    monkeypatch.setattr(type(source), "tensor", tensor)
    monkeypatch.setattr(ahead, "AT_ONCE", 1)  # as large ones are worked on
    convert(source, "compressed-tensors", tmp_path / "out")
    # The tensors of one module, and of the module before while it is replaced.
    assert max(most) <= 6 and len(most) > 40


def test_version_1_of_gptq_takes_zero_points_above_the_lowest_code(saved, quantized, tmp_path):
    source = quantized("int4-g32-asym")
    assert all(int(leaf.zeros.min()) > leaf.spec.qmin for leaf in leaves(source).values())
    there = convert(source, "gptq", tmp_path / "there").path
    assert verify(there, saved("llama", torch.float16)).faults == []
    model = shutil.copytree(saved("llama", torch.float16), tmp_path / "model")
    change(model, model__layers__1__mlp__up_proj__weight=torch.abs)
    lowest = quantize(
        open_checkpoint(model), rtn(parse_spec("int4-g32-asym")), None, tmp_path / "lowest"
    ).path
    with pytest.raises(
        QlabError,
        match=(
            rf"gptq cannot hold {UP} \(256 of 256 zero points are the lowest code.*; write "
            r"gptq_v2\)"
        ),
    ):
        convert(lowest, "gptq", tmp_path / "out")
    words = (
        r"gptq cannot hold int4-g64-asym weights \(.* which rounding to int4-g64-asym may give; "
        r"write gptq_v2 \(--codec\)\)"
    )
    with pytest.raises(QlabError, match=words):
        convert(source, "gptq", tmp_path / "out", requantize=parse_spec("int4-g64-asym"))
    assert not list(tmp_path.glob("out*"))
    assert leaves(convert(lowest, "gptq_v2", tmp_path / "v2").path).keys() == leaves(lowest).keys()


def test_change_is_seen_by_the_fingerprint(quantized):
    leaf = leaves(quantized("int4-g32-asym"))[UP]
    other = [
        replace(leaf, codes=leaf.codes.flip(0)),
        replace(leaf, scales=leaf.scales * 2),
        replace(leaf, zeros=leaf.zeros.flip(0)),
        replace(leaf, perm=torch.arange(leaf.shape[1]).flip(0)),
    ]
    assert len({fingerprint(x) for x in (leaf, *other)}) == 5
    assert fingerprint(replace(leaf, scales=leaf.scales.float())) == fingerprint(leaf)
