"""A cache folder of its own for every test, and problems and entries to put into it."""

import importlib

import pytest

from qlab_kernels import cache
from qlab_kernels.config import Config, Problem
from qlab_kernels.entries import Entry, versions


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's folder, empty and not yet made; no override."""
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path / "configs"))
    monkeypatch.delenv(cache.OVERRIDE, raising=False)
    cache.forget()
    cache.refresh()
    yield tmp_path / "configs"
    monkeypatch.undo()
    cache.forget()
    cache._current = None


@pytest.fixture
def unshipped(tmp_path, monkeypatch):
    """A folder in the place of the shipped one."""
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "tuned")
    cache.refresh()
    return tmp_path / "tuned"


@pytest.fixture
def problem():
    def make(
        m=16,
        n=8192,
        k=8192,
        cc=(9, 0),
        device="NVIDIA H200",
        dtype="bfloat16",
        group=128,
        zeros=False,
        op="int4_mm",
        experts=1,
    ):
        return Problem(op, cc, device, dtype, group, zeros, n, k, m, experts)

    return make


@pytest.fixture
def entry():
    triton, torch = versions()

    def make(
        config=None,
        us=20.0,
        source="measured",
        date="2026-01-01",
        device="NVIDIA H200",
        torch=torch,
    ):
        config = config or Config("split_k", 16, 64, 128, 4, 4, 4)
        return Entry(config, us, 1000.0, 12, device, triton, torch, source, date)

    return make


@pytest.fixture
def small_cache(monkeypatch):
    """A machine with a small cache: few copies of every weight."""
    monkeypatch.setattr(
        importlib.import_module("qlab.lowering.tuning.timing"), "last_cache", lambda device: 2**16
    )
    monkeypatch.setattr("qlab.bench.matmul.copy_rate", lambda device: 10.0)
    monkeypatch.setattr("qlab.bench.matmul.matmul_rate", lambda device, dtype: 0.1)


@pytest.fixture
def call(command):
    """call(*arguments, main=...) -> exit code, what was printed, what was said beside it."""
    return lambda *arguments, main=None: command(
        main or importlib.import_module("qlab.cli").main, *arguments
    )
