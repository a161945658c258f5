"""Triton's interpreter and its compiler, in processes that all tests of kernels share."""

import os
import pickle

import cases
import numpy
import pytest
import triton
from packaging.version import Version


@pytest.fixture(scope="session")
def interpreter():
    """The process in which the kernels of the package are interpreted."""
    refuse_old()
    with cases.interpreter() as pool:
        yield pool


@pytest.fixture(scope="session")
def faulty():
    """faulty(path, function, *arguments) -> what the function gives by the sources in `path`."""
    refuse_old()
    with cases.interpreter() as pool:

        def run(path, function, *arguments):
            call = pickle.dumps((function, *arguments))
            return pool.submit(cases.planted_in, str(path), call).result()

        yield run


@pytest.fixture(scope="session")
def compilers(tmp_path_factory):
    """Processes that compile kernels, on this worker's share of the cores."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    cores = max(1, len(os.sched_getaffinity(0)) // workers)
    with cases.compilers(cores, str(tmp_path_factory.mktemp("triton"))) as pool:
        yield pool


def refuse_old():
    old = Version(triton.__version__) < Version("3.7")
    if old and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip(
            "the interpreter of Triton 3.6 fails with numpy 2.4 and newer: install numpy<2.4 "
            "beside it"
        )
