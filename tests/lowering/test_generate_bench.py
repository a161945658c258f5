"""`python -m qlab.bench generate` on a tiny model: rows, ratios, memory, refusals. No test asserts
seconds."""

import json
from functools import partial

import pytest
import torch
from torch._dynamo.callback import callback_handler

import qlab
from qlab.algebra.spec import parse_spec
from qlab.bench import generate
from qlab.bench.__main__ import main
from qlab.bench.generate import ENGINES, _undo
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import resident_bytes
from qlab.lowering.weights.modules import QuantizedWeight
from qlab.methods.rtn import rtn

PROMPT, NEW = 8, 8  # of every test, so that the compiler finds again what it compiled for another


@pytest.fixture(scope="module")
def directory(saved, tmp_path_factory):
    """Of one block: what compiling takes grows with them, and what is tested does not."""
    out = tmp_path_factory.mktemp("quantized") / "llama"
    model = open_checkpoint(saved("llama", num_hidden_layers=1))
    return qlab.quantize(model, rtn(parse_spec("int4-g32")), None, out).path


@pytest.fixture
def bench(command):
    return partial(command, main, "generate")


def test_engines_side_by_side(bench, directory, tmp_path, monkeypatch):
    """Graphs run as they are made: Inductor compiles them in the tests below."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, options, **how: compiled(f, **how, backend="eager"),
    )
    engines = ["bf16 eager", "qlab eager", "qlab compiled, dense cache"]
    out = tmp_path / "out.json"
    code, printed, said = bench(
        directory,
        "--engines",
        ";".join(engines),
        "--prompt",
        PROMPT,
        "--new",
        NEW,
        "--repeat",
        2,
        "--json",
        out,
    )
    assert code == 0 and all(name in printed for name in engines)
    assert (
        "loading and compiling qlab compiled, dense cache, a prefill of 8 tokens" in said
        and "turn 2 of 2, bf16 eager" in said
    )
    [record] = json.loads(out.read_text())
    assert (record["prompt"], record["new"], record["device"]["type"]) == (PROMPT, NEW, "cpu")
    rows = {row["engine"]: row for row in record["rows"]}
    assert list(rows) == engines
    for row in rows.values():
        assert (
            row["prefill_tokens_per_s"] > 0
            and row["decode_tokens_per_s"] > 0
            and row["peak_rss_bytes"] > 10**7
        )
        assert len(row["prefill_seconds"]) == len(row["decode_seconds"]) == 2
        assert row["ratio"]["bf16 eager"]["decode_tokens_per_s"] == pytest.approx(
            row["decode_tokens_per_s"] / rows["bf16 eager"]["decode_tokens_per_s"]
        )
    resident = {name: row["resident_bytes"] for name, row in rows.items()}
    assert resident["bf16 eager"]["packed"] == 0 and resident["qlab eager"]["dense copies"] == 0
    assert resident["qlab compiled, dense cache"]["dense copies"] > 0
    assert rows["qlab eager"]["weight_bytes"] < rows["bf16 eager"]["weight_bytes"]


def test_nothing_compiles_while_it_is_measured(directory, monkeypatch):
    run, events = generate.run, []
    monkeypatch.setattr(
        generate, "run", lambda engine, ids, new: events.append(new) or run(engine, ids, new)
    )
    monkeypatch.setattr(
        callback_handler, "run_start_callbacks", lambda *_: events.append("compile")
    )
    generate.measure(directory, ["bf16 eager", "qlab compiled"], prompt=PROMPT, new=NEW, repeat=1)
    assert "compile" in events and events[-2:] == [NEW, NEW]


def test_steps_called_from_cpp_give_the_tokens_of_eager_ones(directory, monkeypatch):
    compiled, given = torch.compile, []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **how: (
            given.append(how["options"].get("cpp_wrapper", False)) or compiled(f, **how)
        ),
    )
    ids, said = torch.randint(3, 100, (1, PROMPT), generator=torch.Generator().manual_seed(1)), []
    for engine in [
        generate.prepare(name, directory, PROMPT, NEW, "cpu")
        for name in ("qlab eager", "qlab compiled")
    ]:
        engine.cache.reset()
        with torch.no_grad():
            tokens = [engine.prefill(ids)]
            for _ in range(NEW - 1):
                tokens.append(engine.step(tokens[-1]))
        said.append([int(token) for token in tokens])
    assert said[0] == said[1] and len(set(said[0])) > 1 and given == [False, True]


@pytest.mark.parametrize(
    "arguments, part",
    [
        (
            ["--engines", "llama.cpp"],
            f"engine 'llama.cpp' is unknown; known are {'; '.join(ENGINES)}",
        ),
        (["--new", 1], "measure at least 2, 2 and 1"),
        (["--device", "tpu"], "'tpu' is no device"),
    ],
)
def test_bad_input_is_one_sentence(bench, directory, arguments, part):
    code, out, said = bench(directory, *arguments)
    assert code == 2 and not out and part in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "family, spec", [("mixtral", "nvfp4"), ("qwen2", "fp8-channel"), ("gemma2", "nvfp4")]
)
def test_the_model_beside_it_has_dense_weights_of_the_same_numbers(family, spec, saved, tmp_path):
    path = qlab.quantize(
        open_checkpoint(saved(family)), rtn(parse_spec(spec)), None, tmp_path / "out"
    ).path
    with pytest.warns(UserWarning, match="no kernel takes"):
        model = qlab.lower(path, dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(ids).logits
        _undo(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    assert resident_bytes(model)["packed"] == 0 and not any(
        isinstance(m, QuantizedWeight) for m in model.modules()
    )


def test_a_directory_that_is_not_quantized_is_refused(bench, saved):
    code, _, said = bench(saved())
    assert code == 2 and "is not quantized, so there is nothing to lower" in said
