"""A directory is held to its grid, its certificates and the model it came from; each kind of damage
is named."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from families import tiny
from model_folders import change, rewrite
from safetensors.torch import load_file, save_file

from qlab.algebra.qtensor import QTensor
from qlab.algebra.spec import parse_spec
from qlab.directories.convert import convert
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.errors import QlabError
from qlab.files.certificate import off_grid
from qlab.methods.rtn import rtn

SPEC = parse_spec("int4-g32")
UP = "model.layers.1.mlp.up_proj"


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


def flip(words):
    changed = words.clone()
    changed.view(-1)[0] ^= 1
    return changed


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq"])
def test_what_qlab_wrote_is_what_it_claims_to_be(method, quantized_by, original):
    verdict = verify(quantized_by(method), original)
    assert verdict.faults == [] and verdict.certified and len(verdict.sites) == 14
    assert all(
        row["weight_error"] == pytest.approx(row["certified_error"], rel=1e-4)
        for row in verdict.sites.values()
    )
    changed = {name for name, why in verdict.changed.items() if why}
    # Scales folded into norms are on record.
    assert (method == "awq") == bool(changed) and changed == set(verdict.changed)


@pytest.mark.parametrize(
    "name, function, words",
    [
        (
            f"{UP}.weight_packed",
            flip,
            f"{UP}: its codes, scales or zero points are not the certified ones",
        ),
        (f"{UP}.weight_scale", lambda s: s * 1.01, "are not the certified ones"),
        (f"{UP}.weight_scale", lambda s: s * float("inf"), f"{UP}.weight_scale holds NaN or Inf"),
        (f"{UP}.weight_scale", lambda s: None, "weight_scale is missing"),
        (f"{UP}.weight_packed", lambda w: w[:-1], "weight_packed is torch.int32"),
        (f"{UP}.weight_shape", lambda s: s.flip(0), UP),
        (
            "model.norm.weight",
            lambda w: w + 0.01,
            "model.norm.weight differs from the reference and no certificate says why",
        ),
        ("lm_head.weight", lambda w: None, "lm_head.weight is missing"),
        (
            "model.layers.0.input_layernorm.weight",
            lambda w: w[:-1],
            "input_layernorm.weight differs",
        ),
    ],
)
def test_damage_is_named(name, function, words, copy, original):
    edit(copy, name, function)
    faults = verify(copy, original).faults
    assert len(faults) == 1 and words in faults[0]


@pytest.mark.parametrize("name", ["lm_head.weight", "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.bfloat16])
def test_a_cast_that_loses_what_a_tensor_means_is_a_fault_and_a_wider_float_is_none(
    name, dtype, copy, original
):
    edit(copy, name, lambda t: t.float())
    assert verify(copy, original).faults == []
    edit(copy, name, lambda t: t.to(dtype))
    assert verify(copy, original).faults == [
        f"{name} differs from the reference and no certificate says why"
    ]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_tensor_of_eight_bits_that_nothing_explains_is_refused(dtype, copy, original):
    edit(copy, "model.norm.weight", lambda t: t.to(dtype))
    with pytest.raises(QlabError, match=r"holds model\.norm\.weight"):
        verify(copy, original)


def test_a_tensor_too_many_and_a_certificate_without_its_weight(copy, original):
    file = sorted(copy.glob("*.safetensors"))[0]
    save_file(load_file(file) | {"stray": torch.ones(1)}, file)
    assert verify(copy, original).faults == ["stray is not in the reference"]
    record = json.loads((copy / "qlab.json").read_text())
    record["certificates"]["model.layers.9.mlp.up_proj"] = {"hash": "", "weight_error": 0.1}
    (copy / "qlab.json").write_text(json.dumps(record))
    assert "the certified model.layers.9.mlp.up_proj is missing" in verify(copy, original).faults


@pytest.mark.parametrize(
    "edit_of, words",
    [
        (lambda row: row.update(hash="blake3:" + "0" * 64), "are not the certified ones"),
        (
            lambda row: row.update(weight_error=1.001 * row["weight_error"]),
            "its weight error against the reference is",
        ),
        (
            lambda row: row.update(weight_error=float("nan")),
            "its weight error against the reference is",
        ),
        (
            lambda row: row.update(largest_step=1.001 * row["largest_step"]),
            "its largest error in steps against the reference is",
        ),
        (lambda row: row.update(made_of="nothing.weight"), "has no tensor nothing.weight"),
        (None, "it has no certificate"),
    ],
)
def test_a_certificate_that_was_edited_is_found(edit_of, words, copy, original):
    record = json.loads((copy / "qlab.json").read_text())
    if edit_of is None:
        del record["certificates"][UP]
    else:
        edit_of(record["certificates"][UP])
    (copy / "qlab.json").write_text(json.dumps(record))
    faults = verify(copy, original).faults
    assert len(faults) == 1 and faults[0].startswith(f"{UP}: ") and words in faults[0]


def test_another_model_is_not_the_one_it_was_made_from(quantized_by, saved):
    faults = verify(quantized_by("rtn"), saved("llama", torch.float16, seed=1)).faults
    assert sum("it was made from another model" in fault for fault in faults) == 14
    assert any("model.norm.weight differs" in fault for fault in faults)


def test_the_reference_may_be_sharded_differently(quantized_by, saved):
    assert (
        verify(quantized_by("rtn"), saved("llama", torch.float16, shard_size="60KB")).faults == []
    )


def test_without_certificates_grids_and_the_reference_are_still_checked(copy, original):
    (copy / "qlab.json").unlink()
    verdict = verify(copy, original)
    assert (
        not verdict.certified
        and verdict.faults == []
        and verdict.sites[UP]["certified_error"] is None
    )
    assert 0.02 < verdict.sites[UP]["weight_error"] < 0.2
    edit(copy, "model.norm.weight", lambda w: w + 0.01)
    edit(copy, f"{UP}.weight_scale", lambda s: s * float("nan"))
    verdict = verify(copy, original)
    assert verdict.changed == {"model.norm.weight": None} and [
        UP in fault for fault in verdict.faults
    ] == [True]


def test_a_reference_of_another_shape(quantized_by, tmp_path):
    tiny("llama", intermediate_size=96).to(torch.float16).save_pretrained(tmp_path)
    faults = verify(quantized_by("rtn"), tmp_path).faults
    assert any(
        f"{UP}: its shape is (128, 64) and the reference's (96, 64)" in fault for fault in faults
    )


def test_what_cannot_be_verified(original, quantized_by, tmp_path):
    with pytest.raises(QlabError, match="is not quantized"):
        verify(original, original)
    with pytest.raises(QlabError, match="is not a model directory"):
        verify(quantized_by("rtn"), tmp_path / "nothing")
    shutil.copytree(original, tmp_path / "model")
    change(tmp_path / "model", model__layers__0__mlp__up_proj__weight=None)
    assert any(
        "up_proj.weight is not in the reference" in fault
        for fault in verify(quantized_by("rtn"), tmp_path / "model").faults
    )


def test_the_largest_step_of_a_rounding_is_half_a_step(quantized_by):
    rows = json.loads((quantized_by("rtn") / "qlab.json").read_text())["sites"].values()
    assert all(0.4 < row["largest_step"] < 0.55 for row in rows)
    assert (
        max(
            row["largest_step"]
            for row in json.loads((quantized_by("gptq") / "qlab.json").read_text())[
                "sites"
            ].values()
        )
        > 0.55
    )


def test_what_lies_off_its_grid():
    codes, spec = torch.zeros(2, 32, dtype=torch.int8), parse_spec("int4-g32-asym")
    good = QTensor(codes, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int8), spec)
    assert off_grid(good) is None
    assert "codes span [8, 8]" in str(off_grid(replace(good, codes=codes + 8)))
    assert "zeros span [-9, -9]" in str(off_grid(replace(good, zeros=good.zeros - 9)))
    assert "scale is NaN or Inf" in str(off_grid(replace(good, scales=good.scales * float("nan"))))
    wide = QTensor(
        torch.full((2, 32), 448.0).to(torch.float8_e4m3fn),
        torch.ones(2, 1),
        None,
        parse_spec("mxfp4"),
    )
    assert "above 6.0" in str(off_grid(wide))


def test_certificates_that_are_gone_from_the_record_of_a_job_are_missed(
    quantized_by, original, tmp_path
):
    written = {
        "quantize": quantized_by("rtn"),
        "convert": convert(quantized_by("rtn"), "awq", tmp_path / "awq").path,
        "model-free": quantize_files(original, rtn(SPEC), tmp_path / "free").path,
    }
    written["twice"] = convert(written["convert"], "gptq", tmp_path / "gptq").path
    for name, path in written.items():
        assert verify(path, original).faults == []
        broken = shutil.copytree(path, tmp_path / "broken" / name)
        rewrite(broken / "qlab.json", lambda record: record["certificates"].clear())
        missed = [
            "its qlab.json has lost its certificates; quantize or convert again, or remove that "
            "file"
        ]
        assert verify(broken, original).faults == missed and verify(broken, original).json()["lost"]
        rewrite(broken / "qlab.json", lambda record: record.pop("certificates"))
        assert verify(broken, original).faults == missed
        rewrite(broken / "qlab.json", lambda record: record.update(job={}))
        assert verify(broken, original).faults == missed
        broken = shutil.copytree(path, tmp_path / "broken" / f"{name} again")
        rewrite(broken / "qlab.json", lambda record: record.pop("certificates"))
        carried = convert(broken, "compressed-tensors", tmp_path / "carried" / name).path
        assert verify(carried, original).faults == missed


def test_a_directory_of_another_tool_has_none_to_lose_when_it_is_converted(
    quantized_by, original, tmp_path
):
    foreign = shutil.copytree(quantized_by("rtn"), tmp_path / "foreign")
    (foreign / "qlab.json").unlink()
    there = convert(foreign, "awq", tmp_path / "awq").path
    back = convert(there, "gptq", tmp_path / "gptq").path
    for path in (there, back):
        verdict = verify(path, original)
        assert (
            (path / "qlab.json").is_file()
            and not verdict.certified
            and not verdict.lost
            and verdict.faults == []
        )
