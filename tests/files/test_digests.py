"""A hash says of which kind it is, and one without a name is SHA-256's, as older versions wrote."""

import hashlib
import json

import pytest
from blake3 import blake3
from model_folders import random_tokens, refused

from qlab.algebra.spec import parse_spec
from qlab.directories.model_free import quantize_files
from qlab.directories.verify import verify
from qlab.driver.quantize import quantize
from qlab.files import ownership, record
from qlab.files.certificate import fingerprint, hash_of
from qlab.files.checkpoint import open_checkpoint
from qlab.files.digests import BLOCK, digest_of, hasher
from qlab.files.ownership import damaged, foreign
from qlab.files.writer import Writer
from qlab.methods.awq import awq
from qlab.methods.rtn import rtn

OLD = ""  # as a hash without a name


@pytest.mark.parametrize("size", [0, 1, BLOCK, 2 * BLOCK + 3])
def test_a_file_has_the_hash_of_its_bytes(size, tmp_path):
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    assert digest_of(tmp_path / "file") == f"blake3:{blake3(data[:size]).hexdigest()}"
    assert digest_of(tmp_path / "file", OLD) == hashlib.sha256(data[:size]).hexdigest()


def test_a_hash_of_an_unknown_kind_is_refused():
    refused(lambda: hasher("md5:0"), "the hash 'md5:0' is of the kind 'md5'", "the version of qlab")


def test_a_record_with_such_a_hash_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("b")
    monkeypatch.setattr(ownership, "written_files", lambda folder: {"a": "md5:0"})
    refused(lambda: ownership.damaged(tmp_path), "is of the kind 'md5'", "the version of qlab")


@pytest.fixture
def old(saved, tmp_path):
    """A directory with the hashes of an older version, and its model."""
    model = saved("llama")
    data = random_tokens(model, 2, 8)
    spec = parse_spec("int4-g16")
    out = quantize(open_checkpoint(model), awq(spec), data, tmp_path / "new").path
    made, known = open_checkpoint(out), json.loads((out / "qlab.json").read_text())
    for module, row in known["certificates"].items():
        assert row["hash"] == fingerprint(made.leaf(f"{module}.weight"))
        row["sha256"] = fingerprint(made.leaf(f"{module}.weight"), OLD)
        del row["hash"]
    assert known["changed"]
    known["changed"] = {name: hash_of(made.leaf(name), OLD) for name in known["changed"]}
    written = {name: digest_of(out / name, OLD) for name in known["written"]}
    said_of_itself = {key: value for key, value in known.items() if key != "written"}
    text = json.dumps(said_of_itself, sort_keys=True).encode()
    known["written"] = written | {"qlab.json": hashlib.sha256(text).hexdigest()}
    (out / "qlab.json").write_text(json.dumps(known))
    return out, model


def test_hashes_of_older_versions_still_prove_what_they_proved(old):
    out, model = old
    assert verify(out, model).faults == [] and foreign(out) is None and damaged(out) == {}
    shard = sorted(out.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert damaged(out) == {shard.name: "is not what was written"}
    assert f"{shard.name}, which was changed" in foreign(out)
    assert len(verify(out, model).faults) == 1


def test_what_an_older_version_began_is_another_job(saved, tmp_path):
    """Its versions name no package of the new hash, so that no two kinds are mixed."""
    model, out, recipe = saved("llama"), tmp_path / "out", rtn(parse_spec("int4-g16"))
    with pytest.MonkeyPatch.context() as older:
        older.setattr(record, "PACKAGES", tuple(set(record.PACKAGES) - {"blake3"}))
        older.setattr(Writer, "finish", lambda *_: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            quantize_files(model, recipe, out)
    refused(lambda: quantize_files(model, recipe, out, resume=True), "belongs to another job")
