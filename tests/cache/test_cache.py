"""Lookups: which layer decides, what `nearest` reaches, what is stale, pure snapshots, and folders
that cannot be written."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlab_kernels import cache, transfer
from qlab_kernels.config import BUCKETS, Config, Problem, heuristic, kernel_revision, legal
from qlab_kernels.entries import (
    CacheError,
    Key,
    Table,
    capability_name,
    file_name,
    key_from,
    key_of,
    update,
)

A, B = Config("split_k", 16, 64, 128, 4, 4, 4), Config("split_k", 16, 128, 128, 2, 4, 3)


def ship(folder, p, entry, kernel="model"):
    update(
        folder / file_name(p.op, p.cc), lambda entries: entries.update({key_of(p, kernel): entry})
    )
    cache.refresh()


def test_every_layer_in_its_order(unshipped, problem, entry, monkeypatch, tmp_path):
    p = problem()
    assert cache.lookup(p) == cache.Found(heuristic(p), "heuristic")
    steps = [
        ("nearest", lambda: ship(unshipped, problem(n=4096), entry(A))),
        ("shipped-capability", lambda: ship(unshipped, problem(device="NVIDIA H100"), entry(B))),
        ("shipped-device", lambda: ship(unshipped, p, entry(A))),
        ("user", lambda: cache.store(p, entry(B))),
        (
            "override",
            lambda: monkeypatch.setenv(cache.OVERRIDE, '{"op": "int4_mm", "kind": "dequant"}'),
        ),
    ]
    for source, step in steps:
        step()
        cache.refresh()
        assert cache.lookup(p).source == source
    assert cache.lookup(p).config == Config("dequant")
    # The override names another operator.
    assert cache.lookup(problem(op="int4_grouped_mm")).source != "override"


def test_an_entry_of_another_device_is_no_more_than_near(unshipped, problem, entry):
    cache.store(problem(device="NVIDIA H100"), entry(A))
    assert cache.lookup(problem(device="NVIDIA H100")).source == "user"
    assert cache.lookup(problem()).source == "nearest"


def test_an_exported_file_overrides(unshipped, problem, entry, monkeypatch, tmp_path):
    cache.store(problem(), entry(A))
    assert transfer.export(tmp_path / "all.json") == 1 and transfer.clear() == 1
    monkeypatch.setenv(cache.OVERRIDE, str(tmp_path / "all.json"))
    cache.refresh()
    assert (cache.lookup(problem()).source, cache.lookup(problem()).config) == ("override", A)
    assert cache.lookup(problem(m=512)).source == "heuristic"


@pytest.mark.parametrize(
    "text",
    [
        '{"kind": "dequant", "tile": 3}',
        "{",
        "[1]",
        "/no/such/file.json",
        '{"op": "int4mm", "kind": "dequant"}',
        '{"kind": "fast"}',
        '{"kind": "split_k", "bm": 16, "bn": 64, "bk": 128, "split": "2"}',
        '{"op": 1, "kind": "dequant"}',
        '{"kind": ' + "[" * 10**5,
    ],
)
def test_an_unreadable_override_is_one_sentence(monkeypatch, text):
    monkeypatch.setenv(cache.OVERRIDE, text)
    with pytest.raises(CacheError, match="neither a config as JSON nor a file") as error:
        cache.refresh()
    assert "\n" not in str(error.value)


def test_an_override_that_does_not_suit_is_refused_and_not_dropped(problem, monkeypatch):
    monkeypatch.setenv(
        cache.OVERRIDE, '{"kind": "split_k", "bm": 16, "bn": 64, "bk": 128, "split": 4}'
    )
    cache.refresh()
    with pytest.raises(CacheError, match="straddles groups of 32"):
        cache.lookup(problem(group=32))


def test_an_illegal_entry_is_passed_over(unshipped, problem, entry):
    # A k tile of 256 straddles groups of 128: wrong scales, and no error.
    wide = Config("split_k", 16, 64, 256, 2, 4, 3)
    assert legal(problem(), wide)
    ship(unshipped, problem(), entry(wide))
    ship(unshipped, problem(n=4096), entry(wide))
    ship(unshipped, problem(k=4096), entry(A))
    looked_up = cache.lookup(problem())
    assert (looked_up.config, looked_up.source) == (A, "nearest")
    with pytest.raises(CacheError, match="is no entry"):
        cache.store(problem(), entry(wide))


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": "float16"},
        {"group": 64},
        {"zeros": True},
        {"cc": (8, 0)},
        {"m": 64},
        {"n": 64, "k": 1024},
    ],
    ids=str,
)
def test_nearest_reaches_no_other_kind_of_problem(unshipped, problem, entry, other):
    ship(unshipped, problem(**other), entry(A if other != {"group": 64} else replace(A, bk=64)))
    assert cache.lookup(problem()).source == "heuristic"


def test_nearest_is_nearest_by_logarithm(unshipped, problem, entry):
    # 8192 is a factor 2 from one and 4 from the other; linearly it is the other way round.
    for n, config in ((16384, A), (2048, B)):
        ship(unshipped, problem(n=n), entry(config))
    assert cache.lookup(problem()).config == A


def test_among_equally_near_ones_the_device_and_the_clock_decide(unshipped, problem, entry):
    ship(unshipped, problem(n=4096, device="NVIDIA H100"), entry(A))
    ship(unshipped, problem(n=16384), entry(B), "model")
    assert cache.lookup(problem()).config == B
    ship(unshipped, problem(k=4096), entry(A), kernel_revision())
    assert cache.lookup(problem()).config == A


def test_experts_are_part_of_the_shape_and_their_rows_of_the_regime(unshipped, problem, entry):
    """128 rows are one for most of 128 experts, and 16 for each of 8."""
    few, many = (partial(problem, op="int4_grouped_mm", experts=e) for e in (8, 128))
    ship(unshipped, few(m=128), entry(replace(A, kind="gemm", split=1)))
    assert cache.lookup(few(m=128)).source == "shipped-device"
    assert (
        cache.lookup(many(m=128)).source == "heuristic"
        and cache.lookup(many(m=2048)).source == "nearest"
    )
    assert heuristic(few(m=1024)).bm > heuristic(many(m=1024)).bm == heuristic(many(m=1)).bm == 16


def test_whole_rows_are_one_kind_whatever_their_length(unshipped, problem, entry):
    assert (
        key_of(problem(group=8192), "r").group
        == key_of(problem(k=4096, group=4096), "r").group
        == "row"
    )
    ship(unshipped, problem(k=4096, group=4096), entry(A))
    assert cache.lookup(problem(group=8192)).source == "nearest"


def test_an_entry_of_an_older_kernel_is_stale_but_used(folder, unshipped, problem, entry):
    for date, config in ("2025-02-01", B), ("2025-01-01", A):
        ship(folder, problem(), entry(config, date=date), f"{date[:7]}")
    looked_up = cache.lookup(problem())
    assert (looked_up.source, looked_up.stale, looked_up.config) == ("user", True, B)  # the newest
    cache.store(problem(), entry(A, date="2024-01-01"))
    assert (cache.lookup(problem()).config, cache.lookup(problem()).stale) == (A, False)


def test_an_entry_of_another_torch_is_stale_and_measured_again_on_request(
    unshipped, problem, entry
):
    cache.store(problem(), entry(A, torch="2.0"))
    assert (
        cache.lookup(problem()).stale
        and cache.lookup(problem()).config == A
        and cache.fresh(problem()) is None
    )
    cache.store(problem(), entry(A))
    assert not cache.lookup(problem()).stale and cache.fresh(problem())


def test_the_model_is_never_stale(unshipped, problem, entry):
    ship(unshipped, problem(), entry(source="modelled", torch="1.0"))
    assert not cache.lookup(problem()).stale


def test_m_counts_as_its_bucket(unshipped, problem, entry):
    cache.store(problem(m=128), entry())
    assert (
        cache.lookup(problem(m=65)).source == "user"
        and cache.lookup(problem(m=64)).source == "nearest"
    )
    assert problem(m=5000).bucket == problem(m=4096).bucket


def test_a_snapshot_is_pure(folder, problem, entry):
    snapshot, before = cache.snapshot(), cache.lookup(problem())
    ship_elsewhere = Table(
        {"op": "int4_mm", "capability": "sm90"}, {key_of(problem(), kernel_revision()): entry()}
    )
    folder.mkdir()
    (folder / "int4_mm.sm90.json").write_text(ship_elsewhere.json())  # as another process would
    assert cache.lookup(problem()) == before == snapshot.lookup(problem())
    assert (
        cache.refresh().lookup(problem()).source == "user" and snapshot.lookup(problem()) == before
    )


def test_the_hash_names_what_lookups_depend_on(unshipped, problem, entry, monkeypatch):
    def changed(step):
        before = cache.snapshot_hash()
        step()
        cache.refresh()
        return cache.snapshot_hash() != before

    assert not changed(lambda: None)
    assert not changed(lambda: cache.lookup(problem()))
    assert changed(lambda: cache.store(problem(), entry()))
    assert changed(lambda: cache.store(problem(), entry(B)))
    assert changed(lambda: ship(unshipped, problem(), entry()))
    assert changed(lambda: monkeypatch.setenv(cache.OVERRIDE, '{"kind": "dequant"}'))
    assert changed(lambda: monkeypatch.setattr(cache, "kernel_revision", lambda op: "another"))


def test_the_cpu_shares_the_cache(problem, entry):
    p = problem(op="int4_linear_cpu", cc="cpu-amx", device="some cpu", m=8)
    assert cache.lookup(p).source == "heuristic"
    cache.store(p, entry(Config("int4pack")))
    assert (
        cache.lookup(p).config == Config("int4pack")
        and (cache.folder() / "int4_linear_cpu.cpu-amx.json").is_file()
    )
    assert cache.lookup(replace(p, dtype="float32")).config == Config("dense")


@given(
    n=st.integers(1, 20000),
    k=st.integers(32, 20000),
    m=st.integers(0, 9000),
    group=st.sampled_from([32, 64, 128, 256, 10**9]),
    zeros=st.booleans(),
    cc=st.sampled_from([(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)]),
)
def test_whatever_is_found_is_legal(n, k, m, group, zeros, cc):
    p = Problem("int4_mm", cc, "any", "float16", group, zeros, n, k, m)
    assert legal(p, cache.lookup(p).config) is None


@given(
    st.builds(
        Key,
        st.sampled_from(["float16", "bfloat16"]),
        st.sampled_from(["row", "g32", "g128"]),
        st.booleans(),
        st.integers(1, 10**6),
        st.integers(1, 10**6),
        st.sampled_from(BUCKETS),
        st.sampled_from(["nvidia-h200", "any"]),
        st.just("0a1b"),
        st.integers(1, 512),
    )
)
def test_keys_round_trip(key):
    assert key_from(str(key)) == key


def test_capabilities_have_names():
    assert [capability_name(cc) for cc in ((9, 0), (12, 0), "cpu-avx2")] == [
        "sm90",
        "sm120",
        "cpu-avx2",
    ]


@pytest.fixture
def read_only(folder):
    """A folder below a file: nobody, not even root, can write there."""
    folder.write_text("in the way")
    return folder


def test_a_read_only_home_still_looks_up_and_keeps_entries_for_the_process(
    read_only, problem, entry
):
    assert cache.lookup(problem()).config
    with pytest.warns(UserWarning, match="cannot be written .*set QLAB_CACHE_DIR"):
        cache.store(problem(), entry(A))
    assert cache.lookup(problem()).source == "user"
    with pytest.raises(CacheError, match="set QLAB_CACHE_DIR to a folder that can be"):
        cache.require_writable()


def test_a_folder_without_permission_reads_as_empty(folder, problem):
    folder.mkdir()
    folder.chmod(0)
    try:
        assert cache.refresh().lookup(problem()).config
    finally:
        folder.chmod(0o700)


def test_a_process_without_a_home_still_looks_up(folder, problem, entry, monkeypatch):
    def nobody(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(CacheError, match="names nobody's home; set the variable"):
        cache.refresh()
    for name in ("QLAB_CACHE_DIR", "QLAB_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache.refresh().lookup(problem()).source == "shipped-capability"
    with pytest.warns(UserWarning, match="cannot be written .* set QLAB_CACHE_DIR"):
        cache.store(problem(), entry(A))


def test_threads_do_not_take_each_others_probes_for_a_folder_that_cannot_be_written(folder):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [cache.require_writable() for _ in range(100)], range(8)))
    assert list(folder.iterdir()) == []


def test_the_folder_follows_the_environment(monkeypatch):
    assert cache.folder() == Path(os.environ["QLAB_CACHE_DIR"])
    monkeypatch.delenv("QLAB_CACHE_DIR")
    monkeypatch.setenv("QLAB_HOME", "/h")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder() == Path("/h/configs")
    monkeypatch.delenv("QLAB_HOME")
    assert cache.folder() == Path("/x/qlab/configs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache/qlab/configs"


def test_a_lookup_loads_neither_triton_nor_a_device():
    code = (
        "import sys; from qlab_kernels import cache, config; import torch; p = "
        "config.Problem('int4_mm', (9, 0), 'x', 'bfloat16', 128, False, 64, 128, 1); "
        "cache.lookup(p); print('triton' in sys.modules, torch.cuda.is_initialized())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


# ---------------------------------------------------------------- all entries at once
def test_what_is_exported_can_be_imported(problem, entry, tmp_path):
    cache.store(problem(), entry(A))
    cache.store(problem(cc=(8, 0), device="NVIDIA A100"), entry(B, date="2026-03-01"))
    assert transfer.export(tmp_path / "all.json") == 2
    cache.store(problem(), entry(B, date="2026-02-01"))  # newer than the exported one
    assert transfer.clear(capability="sm80") == 1
    assert transfer.import_(tmp_path / "all.json") == 1
    assert (
        cache.lookup(problem()).config == B
        and cache.lookup(problem(cc=(8, 0), device="NVIDIA A100")).source == "user"
    )
    rows = [row for row in transfer.listing() if row[0] == "user"]
    assert {row[1] for row in rows} == {"int4_mm.sm80.json", "int4_mm.sm90.json"} and len(rows) == 2
    assert (
        transfer.clear("int4_grouped_mm") == 0
        and transfer.clear("int4_mm") == 2
        and transfer.clear() == 0
    )


@pytest.mark.parametrize(
    "meta",
    [
        {"op": "../../evil", "capability": "sm90"},
        {"op": "int4_mm"},
        {"op": "int4_mm", "capability": "a/b"},
    ],
    ids=str,
)
def test_an_import_cannot_leave_its_folder(tmp_path, meta):
    (tmp_path / "bad.json").write_text(json.dumps([{"schema": 1, "meta": meta, "entries": {}}]))
    with pytest.raises(CacheError, match="is not a file that `qlab cache export` wrote"):
        transfer.import_(tmp_path / "bad.json")
