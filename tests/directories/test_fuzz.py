"""Directories corrupted at random end in one QlabError, never in a wrong weight that verification
misses, or a crash."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from qlab.algebra.spec import parse_spec
from qlab.codecs import CODECS
from qlab.directories.convert import convert
from qlab.directories.inspect import inspect
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.rtn import rtn

FORMATS = ["compressed-tensors", "gptq", "gptq_v2", "awq"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=8), v, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def formats(saved, tmp_path_factory):
    """A tiny model in every format that qlab writes."""
    folder, source = tmp_path_factory.mktemp("formats"), saved("llama", torch.float16)
    first = quantize(
        open_checkpoint(source), rtn(parse_spec("int4-g32-asym")), None, folder / FORMATS[0]
    ).path
    return {
        codec: first if codec == FORMATS[0] else convert(first, codec, folder / codec).path
        for codec in FORMATS
    }


@pytest.fixture
def copied(formats, tmp_path):
    def copy(codec):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        return shutil.copytree(formats[codec], tmp_path / "broken")

    return copy


def leaves(path):
    model = open_checkpoint(path)
    return {module: model.leaf(f"{module}.weight") for module in model.quantized}


def one_sentence(error):
    return "\n" not in str(error) and len(str(error)) < 2000


def test_every_codec_is_here():
    of_directories = [name for name in CODECS if not CODECS[name].file]
    assert {name.removesuffix("_desc_act") for name in of_directories} <= set(FORMATS)


@pytest.mark.parametrize("codec", FORMATS)
def test_flipped_bytes_are_refused_or_seen_by_verify(codec, formats, copied, saved):
    @given(data=st.data())
    def corrupted(data):
        path = copied(codec)
        file = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
        whole = bytearray(file.read_bytes())
        at = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, min(2000, len(whole) - 1)))
        before, whole[at] = whole[at], data.draw(st.integers(0, 255))
        file.write_bytes(whole)
        try:
            faults = verify(path, saved("llama", torch.float16)).faults
        except QlabError as error:
            assert one_sentence(error)
        else:
            assert faults or before == whole[at] or same_numbers(path, formats[codec])

    corrupted()


def same_numbers(path, original):
    """Whether every number of the two directories is the same: a byte of padding or of a name in
    the metadata may differ."""
    ours, theirs = open_checkpoint(path), open_checkpoint(original)
    if ours.stored.keys() != theirs.stored.keys() or ours.quantized != theirs.quantized:
        return False
    plain = [name for name in ours.stored if name.rpartition(".")[0] not in ours.quantized]
    was = leaves(original)
    return all(torch.equal(ours.tensor(name), theirs.tensor(name)) for name in plain) and all(
        fingerprint(leaf) == fingerprint(was[module]) for module, leaf in leaves(path).items()
    )


@pytest.mark.parametrize("codec", FORMATS)
def test_any_value_in_a_configuration_is_read_or_refused(codec, formats, copied):
    config = json.loads((formats[codec] / "config.json").read_text())
    keys = sorted(config["quantization_config"])

    @given(key=st.sampled_from(keys), value=JSON, drop=st.booleans())
    def changed(key, value, drop):
        broken = {**config["quantization_config"], key: value}
        if drop:
            del broken[key]
        path = copied(codec)
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": broken}))
        try:
            inspect(path)
            decoded = leaves(path)
        except QlabError as error:
            assert one_sentence(error)
        else:
            assert all(
                leaf.shape in ((64, 64), (32, 64), (128, 64), (64, 128))
                for leaf in decoded.values()
            )

    changed()


def test_any_value_in_a_groups_weights_is_read_or_refused(formats, copied):
    codec = "compressed-tensors"
    config = json.loads((formats[codec] / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]

    @given(key=st.sampled_from(sorted(group["weights"])), value=JSON)
    def changed(key, value):
        path = copied(codec)
        group_0 = {**group, "weights": {**group["weights"], key: value}}
        broken = {**config["quantization_config"], "config_groups": {"group_0": group_0}}
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": broken}))
        try:
            leaves(path)
        except QlabError as error:
            assert one_sentence(error)

    changed()


@given(value=JSON)
def test_any_quantization_config_at_all(value, formats, tmp_path_factory):
    path = tmp_path_factory.mktemp("any")
    for file in formats["awq"].iterdir():
        (path / file.name).symlink_to(file)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").unlink()
    for quantization in (
        value,
        {"quant_method": "gptq", "bits": value, "group_size": value},
        {"quant_method": value},
    ):
        (path / "config.json").write_text(
            json.dumps(config | {"quantization_config": quantization})
        )
        try:
            inspect(path)
        except QlabError as error:
            assert one_sentence(error)


@pytest.mark.parametrize("section", ["sites", "certificates", "changed", "job", "bits_per_weight"])
def test_any_value_in_the_record(section, copied, saved):
    site = "model.layers.0.mlp.up_proj"
    keys = ("spec", "shape", "weight_error", "tokens", "loss", "hash", "bits_per_weight")
    row = st.fixed_dictionaries({}, optional=dict.fromkeys(keys, JSON))

    @given(value=JSON | st.dictionaries(st.sampled_from([site, "other"]), JSON | row, max_size=2))
    def written(value):
        path = copied("awq")
        record = json.loads((path / "qlab.json").read_text())
        (path / "qlab.json").write_text(json.dumps({**record, section: value}))
        acts = inspect, lambda path: verify(path, saved("llama", torch.float16)).faults, printed
        for act in acts:
            try:
                act(path)
            except QlabError as error:
                assert one_sentence(error)

    written()


def printed(path):
    with (console := Console()).capture():
        console.print(inspect(path))


@pytest.mark.parametrize("name", ["config.json", "qlab.json", "model.safetensors.index.json"])
def test_json_files_of_any_content(name, copied, saved):
    @given(value=JSON | st.text(max_size=20).map(str.encode) | st.binary(max_size=20))
    def written(value):
        path = copied("awq")
        (path / name).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
        for look in (inspect, lambda path: verify(path, saved("llama", torch.float16))):
            try:
                look(path)
            except QlabError as error:
                assert one_sentence(error)

    written()
