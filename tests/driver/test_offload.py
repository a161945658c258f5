"""What is kept beside the output lies in the folder that the user names, and changes no byte."""

import errno
import gc
from dataclasses import replace

import pytest
import torch
from model_folders import contents, random_tokens, refused
from torch.multiprocessing.reductions import StorageWeakRef

from qlab.algebra import rounding, stats
from qlab.algebra.bind import bind
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.driver import away, batches
from qlab.driver.away import Away
from qlab.driver.parts import MOST
from qlab.driver.quantize import quantize
from qlab.driver.rehearsal import rehearse
from qlab.files import offload
from qlab.files.carry import Carry
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptaq import gptaq
from qlab.methods.gptq import gptq
from qlab.methods.grid import weighted_mse
from qlab.methods.rtn import rtn
from qlab.process.sendable import flat_of

SPEC = parse_spec("int4-g16")


@pytest.fixture
def job(saved, tmp_path):
    """job(name, recipe, **options): a run into that folder."""
    path = saved("llama", num_hidden_layers=3)
    model, data = open_checkpoint(path), random_tokens(path, 2, 8)
    return lambda name, recipe, **options: quantize(model, recipe, data, tmp_path / name, **options)


@pytest.fixture
def entered(monkeypatch):
    """The numbers of the blocks whose states are read to go into them, each once."""
    numbers, read = [], Carry.read

    def noting(carry):
        number = int(carry.path.stem.rpartition("-")[2])
        if number not in numbers:
            numbers.append(number)
        return read(carry)

    monkeypatch.setattr(Carry, "read", noting)
    return numbers


@pytest.fixture
def written(monkeypatch):
    """The folders into which hidden states are written."""
    folders, write = [], Carry.write

    def noting(carry, batches):
        folders.append(carry.path.parent)
        write(carry, batches)

    monkeypatch.setattr(Carry, "write", noting)
    return folders


def test_states_lie_where_they_are_offloaded_to_and_nothing_depends_on_it(job, written, tmp_path):
    plain = job("plain", gptq(SPEC)).path
    written.clear()
    offloaded = job("offloaded", gptq(SPEC), offload=tmp_path / "new" / "states").path
    assert contents(plain) == contents(offloaded)
    assert len(written) == 3 and {folder.parent for folder in written} == {tmp_path / "new/states"}
    assert not list((tmp_path / "new" / "states").iterdir())


@pytest.fixture
def parts(monkeypatch):
    """Windows in batches of which a part has several, and the names of what goes away."""
    monkeypatch.setattr(batches, "BATCH_TOKENS", 8)
    names, put = [], Away.__setitem__

    def noting(away, key, value):
        names.append(key[1])
        put(away, key, value)

    monkeypatch.setattr(Away, "__setitem__", noting)
    return names


@pytest.mark.parametrize(
    "family, method, inputs",
    [
        ("llama", gptaq, "quantized"),
        ("llama", gptq, "reference"),
        ("qwen3_moe", gptq, "quantized"),
    ],
)
def test_totals_are_offloaded_between_parts_and_nothing_depends_on_it(
    family, method, inputs, saved, parts, tmp_path
):
    path = saved(family, num_hidden_layers=1)
    model, data = open_checkpoint(path), random_tokens(path, 2 * MOST + 1, 8)
    run = lambda name, **options: quantize(
        model, method(SPEC), data, tmp_path / name, inputs=inputs, **options
    )
    plain = run("plain")
    assert not parts
    assert contents(run("away", offload=tmp_path / "off").path) == contents(plain.path)
    assert sorted(set(parts)) == plain.plan.statistics and not list((tmp_path / "off").iterdir())


@pytest.mark.parametrize(
    "windows, offloaded, most",
    [(MOST, False, 2), (MOST, True, 1), (2 * MOST + 1, False, 2), (2 * MOST + 1, True, 1)],
)
def test_sums_grow_in_place_and_one_is_in_memory_where_they_are_offloaded(
    windows, offloaded, most, saved, parts, tmp_path, monkeypatch
):
    made, held = set(), []

    def noting(make, matrix_of):
        def noted(*arguments):
            found = make(*arguments)
            matrix = matrix_of(found)
            if matrix is not None and matrix.ndim == 2:  # no strip
                made.add(StorageWeakRef(matrix.untyped_storage()))
            held.append(sum(not one.expired() for one in made))
            return found

        return noted

    itself = lambda matrix: matrix
    monkeypatch.setattr(away, "STRIP", 100)
    monkeypatch.setattr(stats, "gram", noting(stats.gram, itself))
    monkeypatch.setattr(away, "_read", noting(away._read, itself))
    in_moment = lambda value: getattr(value, "sum_kk", None)
    monkeypatch.setattr(rounding, "_copy", noting(rounding._copy, in_moment))
    path = saved("llama", num_hidden_layers=1)
    model, data = open_checkpoint(path), random_tokens(path, windows, 8)
    gc.disable()  # what only a cycle holds is held
    try:
        quantize(model, gptq(SPEC), data, tmp_path / "out", offload=tmp_path if offloaded else None)
    finally:
        gc.enable()
    assert max(held) == most


@pytest.mark.parametrize(
    "broken, words",
    [
        ("full", ("No space left on device", "free some space")),
        ("cut", ("was cut while it was in use", "--resume")),
    ],
)
def test_a_disk_that_loses_statistics_is_said_and_the_run_goes_on(
    broken, words, saved, parts, tmp_path, monkeypatch
):
    path = saved("llama", num_hidden_layers=2)
    model, off = open_checkpoint(path), tmp_path / "off"
    data = random_tokens(path, MOST + 1, 8)
    run = lambda name, **options: quantize(model, gptq(SPEC), data, tmp_path / name, **options)
    plain, sent, back = run("plain").path, away.packed, away.unpacked
    written = []

    def filling(value):
        written.append(value)
        if len(written) == 50 and broken == "full":  # in the second block
            raise OSError(errno.ENOSPC, "No space left on device")
        return sent(value)

    def cutting(words, receive):
        if len(written) == 50 and broken == "cut":
            for file in off.glob("qlab-statistics-*/*.bin"):
                file.write_bytes(b"")
        return back(words, receive)

    monkeypatch.setattr(away, "packed", filling)
    monkeypatch.setattr(away, "unpacked", cutting)
    refused(lambda: run("out", offload=off), str(off), *words)
    assert list((tmp_path / "out.partial").glob("*.safetensors"))  # of the first block
    assert contents(run("out", offload=off, resume=True).path) == contents(plain)
    assert not list(off.glob("*.states"))


def test_what_is_away_is_laid_out_as_it_was_and_a_file_that_was_cut_is_said(tmp_path):
    values = Away(tmp_path)
    t = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    values["turned"], values["other"] = (t.T, 3), t
    assert torch.equal(values["turned"][0], t.T) and values["turned"][0].stride() == t.T.stride()
    values["other"] = 2 * t
    assert torch.equal(values["other"], 2 * t) and list(values) == ["turned", "other"]
    (file,) = tmp_path.glob("*/1.bin")
    file.write_bytes(b"")
    refused(lambda: values["other"], str(file), "was cut")
    place = replace(flat_of(t[:0])[0], device=torch.device("meta"))
    with file.open("rb") as opened:
        assert away._read(opened, place).is_meta  # where it was, which need not be the processor's
    file.unlink()
    refused(lambda: values["other"], str(file), "cannot be read (No such file or directory)")
    values["other"] = t
    del values["other"]
    assert len(values) == 1 and not file.exists()
    values["third"] = 3 * t
    del values["turned"]
    values["fourth"] = 4 * t
    assert torch.equal(values["third"], 3 * t) and torch.equal(values["fourth"], 4 * t)


def test_blocks_that_wait_for_a_measurement_are_offloaded_too(job, tmp_path, monkeypatch):
    folders, scratch = [], offload.scratch

    def noting(kind, folder):
        folders.append((kind, folder))
        return scratch(kind, folder)

    monkeypatch.setattr("qlab.driver.kept.scratch", noting)
    recipe = chain(rtn(SPEC), bind("look", lambda model: 0, lambda value: ()))
    job("bound", recipe, offload=tmp_path / "off")
    assert folders == [("kept", tmp_path / "off"), ("states", tmp_path / "off")]


class _FullDisk:
    """A disk that is full when the hidden states behind a block are written."""

    def __init__(self, monkeypatch, block):
        self.full, write = True, Carry.write

        def writing(carry, batches):
            def failing():
                for i, batch in enumerate(batches):
                    if self.full and f"-{block:05d}" in carry.path.name and i:
                        raise OSError(errno.ENOSPC, "No space left on device")
                    yield batch

            write(carry, failing())

        monkeypatch.setattr(Carry, "write", writing)


def test_a_full_disk_is_said_in_a_sentence_and_the_run_goes_on_from_there(
    saved, tmp_path, monkeypatch, entered
):
    path = saved("llama", num_hidden_layers=3)
    model, off = open_checkpoint(path), tmp_path / "off"
    data = random_tokens(path, 600, 8)  # several batches
    run = lambda name, **options: quantize(
        model, rtn(SPEC, weighted_mse), data, tmp_path / name, **options
    )
    plain = run("plain").path
    disk = _FullDisk(monkeypatch, 2)
    refused(lambda: run("out", offload=off), str(off), "No space left on device", "free some space")
    (states,) = off.iterdir()
    assert [file.name for file in states.iterdir()] == ["carry-quantized-00001.bin"]
    disk.full = False
    entered.clear()
    assert contents(run("out", offload=off, resume=True).path) == contents(plain)
    assert entered == [1, 2] and not list(off.iterdir())


@pytest.mark.parametrize(
    "place, reason",
    [
        ("out", "lies in the output directory"),
        ("out/inside", "lies in the output directory"),
        ("file", "the folder of hidden states"),
    ],
)
def test_a_folder_that_cannot_be_offloaded_to_is_refused(place, reason, job, tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: job("out", gptq(SPEC), offload=tmp_path / place), reason)


def test_a_rehearsal_runs_the_first_blocks_and_leaves_nothing(saved, tmp_path):
    path = saved("llama", num_hidden_layers=3)
    model, off = open_checkpoint(path), tmp_path / "off"
    found = rehearse(model, gptq(SPEC), random_tokens(path, 2, 8), blocks=2, offload=off)
    assert len(found.seconds) == 2 and found.blocks == 3 and not list(off.iterdir())
    first, second = found.seconds
    assert found.whole == pytest.approx(found.start + first + 2 * second)
    assert found.peak_rss_bytes > 0 and "2 of 3" in found.summary()["blocks"]
    refused(lambda: rehearse(model, rtn(SPEC), blocks=4), "of a model that has 3")
    bound = chain(rtn(SPEC), bind("look", lambda model: 0, lambda value: ()))
    refused(lambda: rehearse(model, bound, blocks=1), "measures the whole model")
