"""A directory is held to its grid, its certificates and the model it came from; each kind of damage is named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from directories import change, random_tokens
from families import tiny
from safetensors.torch import load_file, save_file

from qlab.certificate import off_grid
from qlab.convert import convert
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods import METHODS
from qlab.methods.rtn import rtn
from qlab.model_free import quantize_files
from qlab.qtensor import QTensor
from qlab.quantize import quantize
from qlab.spec import parse_spec
from qlab.transform import at, chain, outside
from qlab.verify import verify

SPEC = parse_spec("int4-g32")
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def original(saved):
    return saved("llama", torch.float16)


@pytest.fixture(scope="module")
def made(original, tmp_path_factory):
    """made(method) -> a directory that the method wrote of the model."""
    written = {}

    def make(method: str):
        if method not in written:
            out = tmp_path_factory.mktemp("made") / method
            data = None if method == "rtn" else random_tokens(original)
            written[method] = quantize(open_checkpoint(original), METHODS[method](SPEC), data, out).path
        return written[method]

    return make


@pytest.fixture
def copy(made, tmp_path):
    """A copy of RTN's directory to break."""
    return shutil.copytree(made("rtn"), tmp_path / "copy")


def edit(path, name, function):
    """Change one tensor of a directory of several files; None drops it."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            new = function(tensors.pop(name))
            if new is not None:
                tensors[name] = new
            save_file(tensors, file)
            index = json.loads((path / "model.safetensors.index.json").read_text())
            if new is None:
                del index["weight_map"][name]
                (path / "model.safetensors.index.json").write_text(json.dumps(index))
            return
    raise AssertionError(name)


def rewrite(file, function):
    """Change a JSON file in place."""
    value = json.loads(file.read_text())
    function(value)
    file.write_text(json.dumps(value))


def flip(words):
    changed = words.clone()
    changed.view(-1)[0] ^= 1
    return changed


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_what_qlab_wrote_is_what_it_claims_to_be(method, made, original):
    verdict = verify(made(method), original)
    assert verdict.faults == [] and verdict.certified and len(verdict.sites) == 14
    assert all(row["weight_error"] == pytest.approx(row["certified_error"], rel=1e-4) for row in verdict.sites.values())
    changed = {name for name, why in verdict.changed.items() if why}
    assert (method == "awq") == bool(changed) and changed == set(verdict.changed)  # scales folded into norms, on record


@pytest.mark.parametrize("name, function, words", [
    (f"{UP}.weight_packed", flip, f"{UP}: its codes, scales or zero points are not the certified ones"),
    (f"{UP}.weight_scale", lambda s: s * 1.01, "are not the certified ones"),
    (f"{UP}.weight_scale", lambda s: s * float("inf"), f"{UP}.weight_scale holds NaN or Inf"),
    (f"{UP}.weight_scale", lambda s: None, "weight_scale is missing"),
    (f"{UP}.weight_packed", lambda w: w[:-1], "weight_packed is torch.int32"),
    (f"{UP}.weight_shape", lambda s: s.flip(0), UP),
    ("model.norm.weight", lambda w: w + 0.01, "model.norm.weight differs from the reference and no certificate says why"),
    ("lm_head.weight", lambda w: None, "lm_head.weight is missing"),
    ("model.layers.0.input_layernorm.weight", lambda w: w[:-1], "input_layernorm.weight differs"),
])  # fmt: skip
def test_damage_is_named(name, function, words, copy, original):
    edit(copy, name, function)
    faults = verify(copy, original).faults
    assert len(faults) == 1 and words in faults[0]


def test_a_tensor_too_many_and_a_certificate_without_its_weight(copy, original):
    file = sorted(copy.glob("*.safetensors"))[0]
    save_file(load_file(file) | {"stray": torch.ones(1)}, file)
    assert verify(copy, original).faults == ["stray is not in the reference"]
    record = json.loads((copy / "qlab.json").read_text())
    record["certificates"]["model.layers.9.mlp.up_proj"] = {"sha256": "", "weight_error": 0.1}
    (copy / "qlab.json").write_text(json.dumps(record))
    assert "the certified model.layers.9.mlp.up_proj is missing" in verify(copy, original).faults


@pytest.mark.parametrize("edit_of, words", [
    (lambda row: row.update(sha256="0" * 64), "are not the certified ones"),
    (lambda row: row.update(weight_error=1.001 * row["weight_error"]), "its weight error against the reference is"),
    (lambda row: row.update(weight_error=float("nan")), "its weight error against the reference is"),
    (lambda row: row.update(largest_step=1.001 * row["largest_step"]), "its largest error in steps against the reference is"),
    (lambda row: row.update(made_of="nothing.weight"), "has no tensor nothing.weight"),
    (None, "it has no certificate"),
])  # fmt: skip
def test_a_certificate_that_was_edited_is_found(edit_of, words, copy, original):
    record = json.loads((copy / "qlab.json").read_text())
    if edit_of is None:
        del record["certificates"][UP]
    else:
        edit_of(record["certificates"][UP])
    (copy / "qlab.json").write_text(json.dumps(record))
    faults = verify(copy, original).faults
    assert len(faults) == 1 and faults[0].startswith(f"{UP}: ") and words in faults[0]


def test_another_model_is_not_the_one_it_was_made_from(made, saved):
    faults = verify(made("rtn"), saved("llama", torch.float16, seed=1)).faults
    assert sum("it was made from another model" in fault for fault in faults) == 14
    assert any("model.norm.weight differs" in fault for fault in faults)


def test_the_reference_may_be_sharded_differently(made, saved):
    assert verify(made("rtn"), saved("llama", torch.float16, shard_size="60KB")).faults == []


def test_without_certificates_grids_and_the_reference_are_still_checked(copy, original):
    (copy / "qlab.json").unlink()
    verdict = verify(copy, original)
    assert not verdict.certified and verdict.faults == [] and verdict.sites[UP]["certified_error"] is None
    assert 0.02 < verdict.sites[UP]["weight_error"] < 0.2
    edit(copy, "model.norm.weight", lambda w: w + 0.01)
    edit(copy, f"{UP}.weight_scale", lambda s: s * float("nan"))
    verdict = verify(copy, original)
    assert verdict.changed == {"model.norm.weight": None} and [UP in fault for fault in verdict.faults] == [True]


def test_a_reference_of_another_shape(made, tmp_path):
    tiny("llama", intermediate_size=96).to(torch.float16).save_pretrained(tmp_path)
    faults = verify(made("rtn"), tmp_path).faults
    assert any(f"{UP}: its shape is (128, 64) and the reference's (96, 64)" in fault for fault in faults)


def test_what_cannot_be_verified(original, made, tmp_path):
    with pytest.raises(QlabError, match="is not quantized"):
        verify(original, original)
    with pytest.raises(QlabError, match="is not a model directory"):
        verify(made("rtn"), tmp_path / "nothing")
    shutil.copytree(original, tmp_path / "model")
    change(tmp_path / "model", model__layers__0__mlp__up_proj__weight=None)
    assert any("up_proj.weight is not in the reference" in fault for fault in verify(made("rtn"), tmp_path / "model").faults)


def test_the_largest_step_of_a_rounding_is_half_a_step(made):
    rows = json.loads((made("rtn") / "qlab.json").read_text())["sites"].values()
    assert all(0.4 < row["largest_step"] < 0.55 for row in rows)
    assert max(row["largest_step"] for row in json.loads((made("gptq") / "qlab.json").read_text())["sites"].values()) > 0.55


def test_what_lies_off_its_grid():
    codes, spec = torch.zeros(2, 32, dtype=torch.int8), parse_spec("int4-g32-asym")
    good = QTensor(codes, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int8), spec)
    assert off_grid(good) is None
    assert "codes span [8, 8]" in str(off_grid(replace(good, codes=codes + 8)))
    assert "zeros span [-9, -9]" in str(off_grid(replace(good, zeros=good.zeros - 9)))
    assert "scale is NaN or Inf" in str(off_grid(replace(good, scales=good.scales * float("nan"))))
    wide = QTensor(torch.full((2, 32), 448.0).to(torch.float8_e4m3fn), torch.ones(2, 1), None, parse_spec("mxfp4"))
    assert "above 6.0" in str(off_grid(wide))


ROPE = "rope_parameters.rope_theta"


@pytest.mark.parametrize("edited, words", [
    (lambda c: c["rope_parameters"].update(rope_theta=5000), f"config.json has {ROPE} 5000 where the reference has 10000.0"),
    (lambda c: c.update(num_attention_heads=8), "config.json has num_attention_heads 8 where the reference has 4"),
    (lambda c: c.update(rms_norm_eps=1e-5), "config.json has rms_norm_eps 1e-05 where the reference has 1e-06"),
    (lambda c: c.update(hidden_act="gelu"), 'config.json has hidden_act "gelu" where the reference has "silu"'),
    (lambda c: c.update(tie_word_embeddings=True), "config.json has tie_word_embeddings true where the reference has false"),
    (lambda c: c.update(logit_scale=0.5), "config.json has logit_scale 0.5 where the reference has none"),
    (lambda c: c.update(head_dim=None, num_key_value_heads=None), "config.json has num_key_value_heads 4 where the reference has 2"),
])  # fmt: skip
def test_a_configuration_of_another_model_is_named_by_key(edited, words, copy, original):
    rewrite(copy / "config.json", edited)
    assert verify(copy, original).faults == [words]
    assert list(verify(copy, original).json()["config"]) == [words.split()[2]]


@pytest.mark.parametrize("edited", [
    lambda c: c.update(transformers_version="4.0", torch_dtype="float32", _name_or_path="here", use_cache=False, eos_token_id=[2, 3]),
    lambda c: c.pop("dtype"),
    lambda c: c.update(rms_norm_eps=float(torch.tensor(1e-6))),  # through float32, as GGUF files store it
    lambda c: [c.pop(key) for key in ("attention_bias", "hidden_act", "head_dim")],  # transformers' defaults
    lambda c: c.update(rope_theta=c.pop("rope_parameters")["rope_theta"], rope_scaling=None),  # as older releases say it
])  # fmt: skip
def test_another_way_to_say_the_same_configuration_is_no_fault(edited, copy, original):
    rewrite(copy / "config.json", edited)
    assert verify(copy, original).faults == []


def test_a_configuration_that_transformers_refuses_is_compared_as_it_stands(copy, original):
    rewrite(copy / "config.json", lambda c: c.update(num_hidden_layers=10**6, rms_norm_eps=float("nan"), window=None))
    assert [fault.split()[2] for fault in verify(copy, original).faults] == ["num_hidden_layers", "rms_norm_eps"]
    rewrite(copy / "config.json", lambda c: c.pop("mlp_bias"))
    assert "config.json has no mlp_bias where the reference has false" in verify(copy, original).faults
    model = shutil.copytree(original, copy.with_name("model"))
    shutil.copy(copy / "config.json", model)
    assert verify(copy, model).faults == []  # NaN is NaN


@pytest.mark.parametrize("words", ["rope_theta 5000 where the reference has 10000", "no window where the reference has 64",
                                   "rope.factor 8 where the reference has none"])  # fmt: skip
def test_the_configuration_of_an_architecture_that_nobody_knows_is_compared_as_it_stands(words, original, tmp_path):
    model, said = shutil.copytree(original, tmp_path / "model"), {"model_type": "nobody_knows", "rope_theta": 10000, "window": 64}
    (model / "config.json").write_text(json.dumps(said))
    out = quantize_files(model, rtn(SPEC), tmp_path / "out").path
    assert verify(out, model).faults == []
    key, value = words.split()[:2] if not words.startswith("no ") else ("window", None)
    other = {"rope": {"factor": 8}} if "." in key else {key: value and int(value)}
    rewrite(out / "config.json", lambda c: c.update(other))
    assert verify(out, model).faults == [f"config.json has {words}"]


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}


@pytest.mark.parametrize("edited", [
    lambda q: q.update(ignore=[]),
    lambda q: q.update(kv_cache_scheme=INT8),
    lambda q: q["config_groups"]["group_0"].update(input_activations=INT8 | {"strategy": "token"}),
    lambda q: q["config_groups"]["group_0"].update(format="int-quantized"),
])  # fmt: skip
def test_a_quantization_config_that_was_edited_is_found(edited, copy, original):
    rewrite(copy / "config.json", lambda c: edited(c["quantization_config"]))
    faults = verify(copy, original).faults
    assert len(faults) == 1 and "quantization_config of its config.json is not the one that was written with its codes" in faults[0]
    assert verify(copy, original).json()["retold"]
    (copy / "qlab.json").unlink()
    assert verify(copy, original).faults == []  # who could say


@pytest.mark.parametrize("codec", ["compressed-tensors", "awq"])
def test_a_head_that_the_recipe_untied_is_no_fault_of_the_configuration(codec, saved, tmp_path):
    source = saved("llama", torch.float16, tie_word_embeddings=True)
    recipe = chain(rtn(SPEC), at("lm_head", outside(rtn(SPEC))))
    out = quantize(open_checkpoint(source), recipe, None, tmp_path / "out").path
    there = convert(out, codec, tmp_path / "there").path
    anew = convert(out, codec, tmp_path / "anew", requantize=parse_spec("int4-g16")).path
    assert [verify(path, source).faults for path in (out, there, anew)] == [[], [], []]
    plain = quantize(open_checkpoint(source), rtn(SPEC), None, tmp_path / "plain").path
    rewrite(plain / "config.json", lambda c: c.update(tie_word_embeddings=False))  # its head is the embedding still
    assert verify(plain, source).faults == ["config.json has tie_word_embeddings false where the reference has true"]


def test_certificates_that_are_gone_from_the_record_of_a_job_are_missed(made, original, tmp_path):
    written = {"quantize": made("rtn"), "convert": convert(made("rtn"), "awq", tmp_path / "awq").path,
               "model-free": quantize_files(original, rtn(SPEC), tmp_path / "free").path}  # fmt: skip
    written["twice"] = convert(written["convert"], "gptq", tmp_path / "gptq").path
    for name, path in written.items():
        assert verify(path, original).faults == []
        broken = shutil.copytree(path, tmp_path / "broken" / name)
        rewrite(broken / "qlab.json", lambda record: record["certificates"].clear())
        missed = ["its qlab.json has lost its certificates; quantize or convert again, or remove that file"]
        assert verify(broken, original).faults == missed and verify(broken, original).json()["lost"]
        rewrite(broken / "qlab.json", lambda record: record.pop("certificates"))
        assert verify(broken, original).faults == missed
        carried = convert(broken, "compressed-tensors", tmp_path / "carried" / name).path
        assert verify(carried, original).faults == missed


def test_a_directory_of_another_tool_has_none_to_lose_when_it_is_converted(made, original, tmp_path):
    foreign = shutil.copytree(made("rtn"), tmp_path / "foreign")
    (foreign / "qlab.json").unlink()
    there = convert(foreign, "awq", tmp_path / "awq").path
    back = convert(there, "gptq", tmp_path / "gptq").path
    for path in (there, back):
        verdict = verify(path, original)
        assert (path / "qlab.json").is_file() and not verdict.certified and not verdict.lost and verdict.faults == []
