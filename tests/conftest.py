"""Tiny models as directories on disk, with a real tokenizer and text in its words."""

import gc
import importlib
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools  # noqa: F401  torch's compiler needs it, and behind an import of pip it is refused
import torch
from families import tiny
from hypothesis import HealthCheck, settings
from model_folders import add_tokenizer, prose
from pictures import save_with_processor
from transformers import PretrainedConfig
from transformers.quantizers import auto
from transformers.utils import logging as transformers_logging

from qlab.algebra.tracing import programs

transformers_logging.disable_progress_bar()  # tests read what qlab itself prints
# The models are tiny, and children that tests fork must not inherit half a thread pool.
torch.set_num_threads(1)
# The same examples in every run, however long each takes on a machine that does other things.
same = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
# Twice as many examples as every planted fault takes.
settings.register_profile("tests", max_examples=25, **same)
settings.register_profile("mutants", max_examples=12, **same)
settings.load_profile(os.environ.get("LAWS_PROFILE", "tests"))
os.fsync = lambda handle: None  # no test cuts the power, and disks of others are slow
# Tests open many more models than a user does, and come back to the same.
programs.KEPT = 1024


def pytest_collection_modifyitems(items):
    """Names of tests hold no addresses: workers would not agree on which tests there are."""
    addressed = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if addressed:
        raise pytest.UsageError(f"name the parameters of {addressed[0]} without addresses")


def pytest_collection_finish():
    """What the libraries and the tests are made of stays: the collector need not visit it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What a test draws depends on no test before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(family, dtype, shard_size, **config) -> the directory of such a model, made once."""
    folders: dict[str, Path] = {}

    def save(
        family: str = "llama",
        dtype: torch.dtype = torch.float32,
        shard_size: str = "1GB",
        **overrides,
    ) -> Path:
        key = repr((family, dtype, shard_size, sorted(overrides.items())))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(family)
            tiny(family, **overrides).to(dtype).save_pretrained(
                folders[key], max_shard_size=shard_size
            )
            add_tokenizer(folders[key])
        return folders[key]

    return save


@pytest.fixture
def folder(saved, tmp_path):
    """A tiny model of the test's own, to break."""
    return shutil.copytree(saved("llama"), tmp_path / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """A text file of 4096 words the tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(prose(4096))
    return path


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A llava with a real processor, and a file of samples with real images beside it."""
    pytest.importorskip("PIL")
    directory = tmp_path_factory.mktemp("llava")
    save_with_processor(directory)
    return directory


@pytest.fixture(scope="session")
def shelf(saved, tmp_path_factory) -> Path:
    """What the pages and the docstrings call by name."""
    folder = tmp_path_factory.mktemp("shelf")
    importlib.import_module("pages").fill(folder, saved)
    return folder


@pytest.fixture
def door():
    """qlab.hf is imported, and transformers has its own readers back when the test ends."""
    mappings = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING
    before = [dict(mapping) for mapping in mappings]
    reads = PretrainedConfig.__dict__["get_config_dict"]
    names = "merge_quantization_configs", "supports_quant_method"
    originals = {name: auto.AutoHfQuantizer.__dict__[name] for name in names}
    importlib.import_module("qlab.hf").register()
    yield
    PretrainedConfig.get_config_dict = reads
    for name, function in originals.items():
        setattr(auto.AutoHfQuantizer, name, function)
    for mapping, was in zip(mappings, before):
        mapping.clear()
        mapping.update(was)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(main, *arguments): a command line run in this process -> exit code, what it printed,
    what it complained of."""
    monkeypatch.setenv("COLUMNS", "250")

    def run(main: Callable[[], None], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return end.value.code or 0, printed.out, printed.err

    return run
