"""What the operating system refuses is one sentence too: permissions, full disks, closed pipes,
Ctrl-C. Nothing is half-written."""

import os
import shutil
import sys
import warnings
from functools import partial

import pytest
from model_folders import contents, refused

import qlab
import qlab.cli
from qlab.errors import QlabError, warn
from qlab.files import workplace, writer
from qlab.files.checkpoint import Checkpoint, open_checkpoint
from qlab.process.progress import progress

INT8 = qlab.rtn("int8-g16")


@pytest.fixture
def call(command):
    return partial(command, qlab.cli.main)


@pytest.fixture
def forbidden(monkeypatch):
    """forbidden(path): whoever runs this may neither read nor write it."""
    real = os.access

    def forbid(path):
        monkeypatch.setattr(
            os,
            "access",
            lambda p, mode: os.path.realpath(p) != os.path.realpath(path) and real(p, mode),
        )

    return forbid


def test_an_error_of_the_system_is_a_sentence_at_every_door(folder, tmp_path, call, monkeypatch):
    lost = tmp_path / "lost"
    out = str(tmp_path) + ("/" + "c" * 190) * 30
    refused(
        lambda: qlab.quantize(folder, INT8, None, out, resume=True),
        "File name too long",
        "check the path",
    )

    def fails(*_):
        raise PermissionError(13, "Permission denied", str(lost))

    monkeypatch.setattr(Checkpoint, "fingerprint", fails)
    refused(
        lambda: qlab.quantize(folder, INT8, None, tmp_path / "q"),
        str(lost),
        "cannot be used (Permission denied)",
    )
    code, out, said = call(
        "quantize", folder, "--method", "rtn", "--spec", "int8-g16", "--out", tmp_path / "q"
    )
    assert (
        code == 2
        and not out
        and said.startswith(f"qlab: {lost} cannot be used")
        and len(said.splitlines()) == 1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error, words", [(RecursionError(), "nested deeper"), (MemoryError(), "too little memory")]
)
def test_what_python_itself_runs_out_of_is_a_sentence(folder, call, monkeypatch, error, words):
    from qlab.directories import inspect as inspection

    def fails(*_):
        raise error

    monkeypatch.setattr(inspection, "inspect", fails)
    code, _, said = call("inspect", folder)
    assert code == 2 and words in said and len(said.splitlines()) == 1


def test_files_that_go_into_the_output_are_asked_for_before_the_work(
    folder, tmp_path, forbidden, monkeypatch
):
    forbidden(folder / "tokenizer.json")
    monkeypatch.setattr(writer.Writer, "write_shard", None)  # fails where it is called
    for run in (qlab.quantize, lambda m, r, d, out: qlab.quantize_files(m, r, out)):
        refused(
            lambda run=run: run(folder, INT8, None, tmp_path / "q"),
            "tokenizer.json may not be read",
        )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_output_that_may_not_be_replaced_is_refused_before_the_work(folder, tmp_path, forbidden):
    quantized = qlab.quantize(folder, INT8, None, tmp_path / "q").path
    before = contents(tmp_path)
    forbidden(quantized)
    refused(
        lambda: qlab.quantize(folder, qlab.rtn("int4-g16"), None, quantized, overwrite=True),
        "q may not be written to",
    )
    assert contents(tmp_path) == before


def test_a_file_that_may_not_be_read_is_not_called_damaged(folder, monkeypatch):
    from pathlib import Path

    real = Path.open

    def opened(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(
        QlabError, match=r"model.safetensors cannot be read \(Permission denied\); check the path"
    ) as refusal:
        open_checkpoint(folder)
    assert "truncated" not in str(refusal.value)


def test_ctrl_c_is_a_line_and_an_exit_code(folder, tmp_path, call, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workplace.Workplace, "put_in_place", stop)
    job = ["quantize", folder, "--method", "rtn", "--spec", "int8-g16", "--out", tmp_path / "q"]
    code, out, said = call(*job)
    assert (
        code == 130
        and not out
        and said.splitlines()[-1].startswith(
            "qlab: stopped before its end; quantize and convert go on"
        )
    )
    monkeypatch.undo()
    assert qlab.quantize(folder, INT8, None, tmp_path / "q", resume=True).path.is_dir()


def test_output_that_nobody_takes_ends_without_a_traceback(folder, tmp_path):
    for device, ends in (("/dev/full", 2), (None, 1)):
        read, write = os.pipe()
        os.close(read)
        child = os.fork()
        if child == 0:  # a process of its own, whose output is closed
            os.dup2(os.open(device, os.O_WRONLY) if device else write, 1)
            errors = os.open(tmp_path / "errors", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(errors, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["qlab", "inspect", str(folder)]
            try:
                qlab.cli.main()
            except SystemExit as end:
                os._exit(end.code)
            os._exit(99)
        os.close(write)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == ends
        said = (tmp_path / "errors").read_text()
        assert "Traceback" not in said and ("No space left" in said) == (device is not None)


def test_progress_goes_on_where_nobody_listens(monkeypatch):
    class Closed:
        def write(self, text):
            raise BrokenPipeError

        def flush(self):
            raise BrokenPipeError

        isatty = staticmethod(lambda: False)

    monkeypatch.setattr(sys, "stderr", Closed())
    assert list(progress([1, 2], "working")) == [1, 2]


@pytest.mark.parametrize(
    "place", ["-", "/dev/stdout", "/dev/stderr", "/dev/fd/1", "/proc/self/fd/1"]
)
def test_a_report_is_a_file_and_no_terminal(folder, call, place):
    code, out, said = call("inspect", folder, "--json", place)
    assert (
        code == 2
        and not out
        and f"--json {place} is no file" in said
        and "such as report.json" in said
    )


def test_a_warning_is_one_line_of_whoever_called(saved):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn("a\nname \x1b[31mred")
    assert str(caught[0].message) == r"a\nname \x1b[31mred" and caught[0].filename == __file__
    with pytest.warns(UserWarning, match="no kernel") as caught:
        quantized = qlab.quantize(saved(), qlab.rtn("mxfp4"), None, saved().parent / "mx").path
        qlab.lower(quantized)
    shutil.rmtree(quantized)
    assert [warning.filename for warning in caught if "no kernel" in str(warning.message)] == [
        __file__
    ]
