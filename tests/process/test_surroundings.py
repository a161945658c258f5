"""Nothing that is set around a call reaches into it, and no call changes what is set: same bytes,
in threads side by side too."""

import ast
import contextlib
import re
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from model_folders import random_tokens, tensors
from torch import nn

import qlab
from qlab.files.checkpoint import open_checkpoint
from qlab.model.skeleton import Skeleton
from qlab.process import surroundings

INT4 = qlab.parse_spec("int4-g32")


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def coarse_products():
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def errors_of_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


AROUND = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.float16),
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
    "deterministic": deterministic,
    "coarse": coarse_products,
    "warnings": errors_of_warnings,
}


def state() -> tuple:
    """What torch keeps for this thread and for the process."""
    threads = torch.get_num_threads(), torch.get_float32_matmul_precision()
    modes = (
        torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
    )
    flags = torch.are_deterministic_algorithms_enabled(), list(warnings.filters)
    rng = torch.get_rng_state().tolist()
    return torch.get_default_dtype(), torch.get_default_device(), threads, modes, flags, rng


@pytest.fixture(scope="module")
def source(saved):
    return saved("llama", torch.bfloat16)


def outcome(source, data, out):
    """Codes, readings and a lowered model's parameters and logits."""
    model = open_checkpoint(source)
    recipe = qlab.METHODS["awq-gptq"](INT4)
    result = qlab.quantize(model, recipe, data, out)
    reading = qlab.evaluate(open_checkpoint(result.path), model, data)
    lowered = qlab.lower(result.path)
    return tensors(out), reading, lowered


@pytest.fixture(scope="module")
def data(source):
    return random_tokens(source)


@pytest.fixture(scope="module")
def plain(source, data, tmp_path_factory):
    return outcome(source, data, tmp_path_factory.mktemp("plain") / "q")


@pytest.mark.parametrize("around", AROUND)
def test_what_is_set_around_a_call_changes_no_byte_and_stays_set(
    source, data, plain, tmp_path, around
):
    with AROUND[around]():
        before = state()
        codes, reading, lowered = outcome(source, data, tmp_path / "q")
        with pytest.raises(qlab.QlabError):
            qlab.lower(source)
        assert state() == before
    assert codes.keys() == plain[0].keys()
    assert all(torch.equal(codes[name], plain[0][name]) for name in codes)
    assert reading == plain[1]
    parameters = zip(lowered.state_dict().values(), plain[2].state_dict().values())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in parameters)
    ids = torch.arange(3, 19)[None]
    assert torch.equal(lowered(ids).logits, plain[2](ids).logits)


def test_calls_in_threads_give_the_same_and_change_nothing_meanwhile(source, data, plain, tmp_path):
    seen, done = set(), threading.Event()

    def watch():  # as code of others that runs beside
        while not done.is_set():
            seen.add((torch.get_default_dtype(), nn.Linear(2, 2).weight.device.type))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(3) as pool:
        quantized = [pool.submit(outcome, source, data, tmp_path / str(i)) for i in range(2)]
        dtypes = [torch.float32, torch.bfloat16] * 3
        built = list(pool.map(lambda dtype: Skeleton(open_checkpoint(source), dtype).model, dtypes))
    done.set()
    watcher.join()
    assert seen == {(torch.float32, "cpu")}
    assert [model.dtype for model in built] == dtypes
    for codes, reading, _ in (job.result() for job in quantized):
        assert all(torch.equal(codes[name], plain[0][name]) for name in plain[0])
        assert reading == plain[1]


def test_an_open_model_is_the_same_after_it_was_used(source):
    model = open_checkpoint(source)
    before = model.config.to_dict()
    Skeleton(model, torch.float32)
    assert model.config.to_dict() == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3).dtype,
        lambda: torch.full((2,), 1.5).dtype,
        lambda: torch.tensor([0.1, 0.2]),
        lambda: torch.arange(5) / 3,
        lambda: torch.arange(300).sqrt(),
        lambda: 1.0 / (10000 ** (torch.arange(0, 8, 2) / 8)),
        lambda: torch.arange(4).float(),
        lambda: torch.arange(4).to(torch.float32),
        lambda: torch.arange(0, 1, 0.3),
        lambda: torch.ones(2).mean(),
        lambda: torch.zeros(2, dtype=torch.float64),
        lambda: nn.Linear(2, 3).weight.dtype,
        lambda: torch.ones(3, dtype=torch.int64) * 0.1,
    ],
)
def test_a_thread_s_own_default_dtype_makes_what_the_process_s_would(make):
    with default_dtype(torch.bfloat16):
        expected = make()
    with surroundings.Floats(torch.bfloat16):
        computed = make()
    same = (
        torch.equal(computed, expected) and computed.dtype == expected.dtype
        if isinstance(computed, torch.Tensor)
        else computed == expected
    )
    assert same, (computed, expected)


def test_no_module_sets_what_the_whole_process_shares():
    setters = (
        r"set_default_d|init_empty_weights|torch\.manual_seed|set_num_threads|fp32_precision "
        r"=|catch_warnings|environ\[.*\] ="
    )
    files = [p for p in Path(qlab.__file__).parent.rglob("*.py") if p.name != "surroundings.py"]
    root = Path(qlab.__file__).parent / "bench"  # which has its process to itself
    files = [p for p in files if root not in p.parents]
    assert not [p.name for p in files if re.search(setters, p.read_text())]


def test_code_of_others_that_changes_the_default_dtype_meanwhile_reaches_into_no_call(
    source, data, plain, tmp_path
):
    done = threading.Event()

    def load():  # as transformers does while it loads a model
        while not done.wait(0.002):
            with default_dtype(torch.bfloat16):
                done.wait(0.004)

    loader = threading.Thread(target=load)
    loader.start()
    try:
        codes, reading, lowered = outcome(source, data, tmp_path / "q")
    finally:
        done.set()
        loader.join()
    assert all(torch.equal(codes[name], plain[0][name]) for name in codes) and reading == plain[1]
    parameters = zip(lowered.state_dict().values(), plain[2].state_dict().values())
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in parameters)


FACTORIES = ("zeros", "ones", "empty", "full", "rand", "randn", "eye", "linspace", "tensor")


def test_every_tensor_that_qlab_makes_is_told_its_dtype():
    untold = []
    for file in Path(qlab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in [
                f"torch.{name}" for name in FACTORIES
            ]:
                told = {keyword.arg for keyword in node.keywords} & {"dtype", None}
                untold += [] if told else [f"{file.name}:{node.lineno}"]
    assert not untold
