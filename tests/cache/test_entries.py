"""Files of entries: golden bytes, many writers, writers that are killed, corrupt files."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from qlab_kernels import cache
from qlab_kernels.config import Config
from qlab_kernels.entries import Table, entry_from, key_of, locked, parse, read, update

GOLDEN = """{"schema": 1, "meta": {"capability": "sm90", "op": "int4_mm", "torch": "2.13.0"},
"entries": {
"bfloat16/g128/symmetric/8192x8192/m16/nvidia-h200/0a1b": {"config": {"bk": 128, "bm": 16, "bn": 64, "kind": "split_k", "split": 4, \
"stages": 4}, "date": "2026-01-01", "device": "NVIDIA H200", "gbps": 1000.0, "source": "measured", "trials": 12, "triton": "3.7.1", \
"us": 20.0}
}}
"""  # noqa: E501


def test_the_file_is_the_golden_one(problem, entry):
    row = replace(entry(torch="2.13.0"), triton="3.7.1")
    table = Table(
        {"op": "int4_mm", "capability": "sm90", "torch": "2.13.0"},
        {key_of(problem(), "0a1b"): row},
    )
    assert table.json() == GOLDEN and parse(GOLDEN) == table


def writer(folder, first, count, started):
    os.environ["QLAB_CACHE_DIR"] = str(folder)
    from qlab_kernels.config import Problem
    from qlab_kernels.entries import Entry

    started.wait()
    for i in range(first, first + count):
        p = Problem("int4_mm", (9, 0), "gpu", "bfloat16", 128, False, 64 * (i + 1), 8192, 16)
        cache.store(
            p,
            Entry(
                Config("split_k", 16, 64, 128, 2),
                float(i + 1),
                1.0,
                1,
                "gpu",
                None,
                "2",
                "measured",
                "2026-01-01",
            ),
        )


def test_eight_processes_lose_no_entry(folder):
    spawn = multiprocessing.get_context("fork")
    started = spawn.Event()
    processes = [spawn.Process(target=writer, args=(folder, 10 * i, 10, started)) for i in range(8)]
    for process in processes:
        process.start()
    started.set()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * 8
    table = read(folder / "int4_mm.sm90.json")
    assert sorted(entry.us for entry in table.entries.values()) == [i + 1.0 for i in range(80)]


KILLED = """
import sys
from qlab_kernels import cache
from qlab_kernels.config import Config, Problem
from qlab_kernels.entries import Entry
for i in range(10**6):
    p = Problem("int4_mm", (9, 0), "gpu", "bfloat16", 128, False, 64 * (i % 200 + 1), 8192, 16)
    config = Config("split_k", 16, 64, 128, 2)
    cache.store(p, Entry(config, float(i + 1), 1.0, 1, "gpu", None, "2", "measured", "2026-01-01"))
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_a_whole_file_and_no_lock(folder, problem, entry):
    done = 0
    for pause in (0.0, 0.003, 0.011):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True
        )
        for _ in range(5):
            done = int(process.stdout.readline())
        time.sleep(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        entries = read(folder / "int4_mm.sm90.json").entries  # ValueError if it were cut
        assert len(entries) > done
    cache.store(problem(), entry())  # the dead writer's lock is gone, and so is what it left
    assert cache.lookup(problem()).source == "user" and not list(folder.glob(".*.tmp"))


def test_a_writer_killed_before_the_rename_changes_nothing(folder, problem, entry, monkeypatch):
    cache.store(problem(), entry())
    before = (folder / "int4_mm.sm90.json").read_bytes()
    pid = os.fork()
    if pid == 0:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        cache.store(problem(m=1), entry())
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert (folder / "int4_mm.sm90.json").read_bytes() == before and list(folder.glob(".*.tmp"))
    cache.store(problem(m=2), entry())
    assert len(read(folder / "int4_mm.sm90.json").entries) == 2 and not list(folder.glob(".*.tmp"))


CORRUPT = {
    "cut": GOLDEN[:200],
    "empty": "",
    "not json": "hello",
    "a list": "[]",
    "binary": "\x00\xff",
    "other schema": GOLDEN.replace('"schema": 1', '"schema": 2'),
    "other operator": GOLDEN.replace("int4_mm", "int4_grouped_mm"),
    "no config": GOLDEN.replace('"config"', '"konfig"'),
    "wrong type": GOLDEN.replace('"bm": 16', '"bm": "16"'),
    "wrong key": GOLDEN.replace("/m16/", "/"),
    "unknown field": GOLDEN.replace('"us"', '"ms": 1, "us"'),
    "too deep": "[" * 10**5,
    "a size of no weight": GOLDEN.replace("/m16/", f"/m{'1' * 400}/"),
    "no time": GOLDEN.replace('"us": 20.0', '"us": NaN'),
    "a time that cannot be": GOLDEN.replace('"us": 20.0', '"us": -1'),
    "a version that is no text": GOLDEN.replace('"triton": "3.7.1"', '"triton": 3'),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_file_is_set_aside_with_a_warning_and_nothing_is_lost(
    folder, problem, entry, kind
):
    folder.mkdir()
    path, other = folder / "int4_mm.sm90.json", folder / "int4_mm.sm80.json"
    cache.store(problem(cc=(8, 0), device="a100"), entry())
    path.write_text(CORRUPT[kind])
    with pytest.warns(UserWarning, match="cannot be read .*it is kept as int4_mm.sm90.json.bad"):
        cache.refresh()
    assert (
        (folder / "int4_mm.sm90.json.bad").read_text() == CORRUPT[kind]
        and not path.exists()
        and other.exists()
    )
    assert (
        cache.lookup(problem(cc=(8, 0), device="a100")).source == "user"
        and cache.lookup(problem()).config
    )
    path.write_text("again")
    with pytest.warns(UserWarning, match="bad1"):
        cache.store(problem(), entry())
    assert (
        cache.lookup(problem()).source == "user"
        and (folder / "int4_mm.sm90.json.bad").read_text() == CORRUPT[kind]
    )


def test_a_change_that_fails_leaves_the_file_and_the_lock(folder, problem, entry):
    cache.store(problem(), entry())
    path = folder / "int4_mm.sm90.json"
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        update(path, lambda entries: 1 / 0)
    assert path.read_bytes() == before
    with locked(path):
        pass


def test_other_fields_of_meta_survive_a_write(folder, problem, entry):
    folder.mkdir()
    (folder / "int4_mm.sm90.json").write_text(GOLDEN.replace('"torch"', '"note": "mine", "torch"'))
    cache.store(problem(m=1), entry(torch="2.14.0"))
    table = read(folder / "int4_mm.sm90.json")
    assert table.meta["note"] == "mine" and {e.torch for e in table.entries.values()} == {
        "2.13.0",
        "2.14.0",
    }


def test_an_entry_takes_from_meta_what_it_lacks_and_nothing_else(entry):
    row = json.loads(json.dumps(entry().json()))
    device = row.pop("device")
    assert entry_from(row, {"device": device, "op": "int4_mm"}) == entry()
    with pytest.raises(ValueError, match="not an entry"):
        entry_from(row, {"op": "int4_mm"})
