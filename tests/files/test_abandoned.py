"""Temporary files of writers that died can be removed, and those of others stay."""

import fcntl
import os
import signal

import pytest
from killing import KILLED, finish, start

from qlab.errors import QlabError
from qlab.files.atomic import atomically, remove_abandoned


def test_what_a_killed_writer_left_is_removed(tmp_path):
    file = tmp_path / "report [1].json"

    def die(temporary):
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    assert finish(start(lambda: atomically(file, die))) == KILLED
    assert len(list(tmp_path.iterdir())) == 1
    remove_abandoned(file)
    atomically(file, lambda temporary: temporary.write_text("whole"))
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "whole"


def test_what_another_writes_at_the_moment_is_left_alone(tmp_path):
    file, other = tmp_path / "report.json", tmp_path / ".report.json.1.2.tmp"
    with other.open("w") as going:
        fcntl.flock(going, fcntl.LOCK_EX)
        remove_abandoned(file)
        atomically(file, lambda temporary: temporary.write_text("whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, file.name]


def test_a_disk_that_refuses_removal_too_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(QlabError, match=r"report.json cannot be written \(Read-only"):
        atomically(tmp_path / "report.json", lambda temporary: temporary.write_text("whole"))
