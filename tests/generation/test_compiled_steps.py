"""Compiled steps say what eager ones say; their graphs are counted, and no request needs another;
nobody waits for the compiler, and what stays eager is said with its reason."""

import random
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from engines import GREEDY, asked, reference, small
from families import tiny
from model_folders import refused
from pytest import approx
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from qlab.generation import compiled as module
from qlab.generation.sampling import Sampling
from qlab.generation.twins import kinds_of
from qlab.lowering.around.attention import is_plain
from qlab.model.paper import find_blocks

KINDS = {"gemma2": 2, "deepseek_v3": 2}  # sliding and full, dense and of experts


def traced(monkeypatch, backend="eager"):
    """Graphs are made, and run as they are: seconds instead of minutes."""
    made = lookup_backend(backend)
    monkeypatch.setattr(module, "inductor", lambda graph, inputs, options: made(graph, inputs))


@pytest.fixture
def one_bucket(monkeypatch):
    monkeypatch.setattr(module, "buckets", lambda rows: (rows,))


def ready(model, mode, **settings):
    """An engine that has compiled all its buckets."""
    engine = small(model, compile=mode, **settings)
    engine.compiled.wait()
    return engine


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.usefixtures("one_bucket")
def test_compiled_steps_say_what_generate_says_with_a_graph_for_each_kind(family, monkeypatch):
    traced(monkeypatch)
    model, expected = reference(family)
    engine = ready(model, "block", rows=2)
    assert [r.new for r in asked(engine)] == expected
    stats = engine.compiled.stats()
    assert stats["ready"] == stats["buckets"] == (2,) and stats["prompts"] and not stats["eager"]
    assert (stats["graphs"], stats["recompiles"]) == (2 * (KINDS[family] + 1), 0)
    assert engine.pages.available == engine.pages.count


def test_a_whole_step_is_one_graph_for_each_bucket(monkeypatch):
    traced(monkeypatch)
    model, expected = reference("llama")
    engine = ready(model, "model", rows=2)
    assert [r.new for r in asked(engine)] == expected
    stats = engine.compiled.stats()
    assert stats["ready"] == (1, 2) and stats["prompts"]
    assert (stats["graphs"], stats["recompiles"]) == (3, 0)


def test_the_sizes_that_a_graph_is_handed_do_not_count_its_layers(monkeypatch):
    counts = []

    def made(graph, inputs, options):
        counts.append(sum(isinstance(x, torch.SymInt) for x in inputs))
        return graph.forward

    monkeypatch.setattr(module, "inductor", made)
    for layers in (2, 4):
        ready(tiny("llama", num_hidden_layers=layers).eval(), "model", rows=1)
    assert counts[:2] == counts[2:]  # of rows, and of prompts


def test_hundreds_of_mixed_requests_need_no_graph_that_the_warm_up_has_not_made(monkeypatch):
    traced(monkeypatch, "aot_eager")
    engine = ready(tiny("llama").eval(), "block", rows=4, chunk=64)
    draw, requests = random.Random(0), []
    for _ in range(300):
        prompt = [draw.randrange(128) for _ in range(draw.randint(1, 40))]
        sampling = Sampling(max_tokens=draw.randint(1, 5), seed=draw.randrange(100))
        requests.append(engine.submit(prompt, sampling))
        for _ in range(draw.choice((0, 0, 1, 4))):
            engine.step()
    engine.run()
    assert all(r.finish == "length" and len(r.new) == r.sampling.max_tokens for r in requests)
    stats = engine.compiled.stats()
    assert stats["ready"] == (1, 2, 4) and (stats["graphs"], stats["recompiles"]) == (4 * 2, 0)


@pytest.mark.usefixtures("one_bucket")
def test_inductor_compiles_blocks_and_a_second_start_finds_them(monkeypatch, tmp_path):
    """In one bucket a request says the same alone and beside others, up to roundings: the loops of
    a graph sum over positions as many at a time as its longest row has."""
    monkeypatch.setenv("QLAB_CACHE_DIR", str(tmp_path))
    model, expected = reference("llama")
    sampling = replace(GREEDY, logprobs=1)
    found = []
    for _ in range(2):
        counters.clear()
        torch._dynamo.reset()
        engine = ready(model, "block", rows=2, reuse=False)
        together = asked(engine, sampling=sampling)
        assert [r.new for r in together] == expected
        caches = counters["aot_autograd"], counters["inductor"]
        found.append(sum(count[key] for count in caches for key in count if "cache_hit" in key))
    for request in together:
        (alone,) = asked(engine, [request.prompt], sampling)
        assert alone.new == request.new
        assert [d.logprob for d in alone.drawn] == approx([d.logprob for d in request.drawn], 1e-5)
    stats = engine.compiled.stats()
    assert (stats["graphs"], stats["recompiles"], stats["ready"]) == (4, 0, (2,))
    assert found[0] == 0 and found[1] >= 2
    assert any((tmp_path / "compiled").iterdir())


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("mamba2", "recurrent states"),
        ("bloom", "masks in code of its own"),
        ("gemma4_text", "layers.0 stays eager: it is handed a KVSharingDict"),
    ],
)
def test_what_stays_eager_is_said_with_its_reason(family, why, monkeypatch, capsys):
    traced(monkeypatch)
    model = tiny(family).eval()
    engine = ready(model, "block", rows=1)
    assert why in repr(engine.compiled) and why in capsys.readouterr().err
    assert [r.new for r in asked(engine)] == [r.new for r in asked(small(model))]


def test_blocks_that_differ_in_what_nobody_reads_off_them_stay_eager(monkeypatch):
    traced(monkeypatch)
    model = tiny("llama").eval()
    model.model.layers[1].mlp.register_forward_hook(lambda mlp, args, y: 2 * y)
    engine = ready(model, "block", rows=1)
    assert "stays eager: its blocks differ in more than their tensors" in repr(engine.compiled)
    assert [r.new for r in asked(engine)] == [r.new for r in asked(small(model))]


def test_nobody_waits_for_the_compiler_and_closing_ends_it(monkeypatch):
    waits = threading.Event()

    def slow(graph, inputs, options):
        while not waits.wait(0.01):
            pass

    monkeypatch.setattr(module, "inductor", slow)
    model, expected = reference("llama")
    engine = small(model, compile="block")
    assert [r.new for r in asked(engine)] == expected
    assert engine.compiled.stats()["ready"] == () and engine.compiled._thread.is_alive()
    engine.close()
    assert not engine.compiled._thread.is_alive()


def test_what_another_thread_records_is_nothing_to_a_step(monkeypatch):
    """Torch says of all threads whether one is recording; the next bucket is while it compiles."""
    traced(monkeypatch)
    model, expected = reference("llama")
    engine = ready(model, "block", rows=2)
    recording, leave = threading.Event(), threading.Event()

    def record():
        with FakeTensorMode():
            recording.set()
            leave.wait()

    thread = threading.Thread(target=record)
    thread.start()
    recording.wait()
    try:
        assert [r.new for r in asked(engine)] == expected
        assert is_plain(torch.ones(1, dtype=torch.float32))  # which is left to the kernel
    finally:
        leave.set()
        thread.join()
    stats = engine.compiled.stats()
    assert (stats["recompiles"], stats["ready"], stats["eager"]) == (0, (1, 2), ())


def test_engines_of_one_process_compile_one_after_the_other(monkeypatch):
    traced(monkeypatch)
    gate, alone, kept = threading.Lock(), [], module.kept

    @contextmanager
    def noted():
        alone.append(gate.acquire(blocking=False))
        with kept():
            yield
        if alone[-1]:
            gate.release()

    monkeypatch.setattr(module, "kept", noted)
    engines = [small(tiny("llama").eval(), compile="model", rows=1) for _ in range(2)]
    for engine in engines:
        engine.compiled.wait()
    assert alone == [True] * 4
    assert all(engine.compiled.stats()["ready"] == (1,) for engine in engines)


def test_a_compiled_step_that_fails_or_wants_another_graph_runs_eager_from_then_on(monkeypatch):
    traced(monkeypatch)
    model, expected = reference("llama")
    engine = ready(model, "block", rows=2)

    def failing(*_, **__):
        raise RuntimeError("boom")

    for shape in (module.Shape(rows=2), module.Shape(is_prompt=True)):
        engine.compiled._ready[shape] = module.Bucket(shape=shape, run=failing)
    engine.pool = engine.pool.like(engine.pages.count)
    for slots in engine.pool.tensors():
        slots.requires_grad_()  # what a graph of the warm-up was not made for
    assert [r.new for r in asked(engine)] == expected
    stats = engine.compiled.stats()
    assert stats["ready"] == () and not stats["prompts"] and stats["recompiles"] == 1
    for words in ("steps of 2 rows stay eager: boom", "prompts stay eager: boom"):
        assert words in repr(engine.compiled)


def test_a_bucket_runs_as_it_is_while_the_next_one_is_traced(monkeypatch):
    traced(monkeypatch)
    model, expected = reference("llama")
    engine = ready(model, "block", rows=2)
    monkeypatch.setattr(torch.fx._symbolic_trace, "_is_fx_tracing_flag", True)
    assert [r.new for r in asked(engine)] == expected
    assert engine.compiled.stats()["ready"] == (1, 2) and not engine.compiled.said


def test_blocks_of_one_structure_are_told_from_others():
    """By their classes, shapes and attributes, whatever their number among layers is."""
    for family, kinds in (("llama", [0, 0]), ("gemma2", [0, 1, 0, 1]), ("deepseek_v3", [0, 1, 1])):
        _, blocks = find_blocks(tiny(family))
        assert kinds_of(blocks) == kinds
    blocks["model.layers.2"].mlp.top_k = 1
    assert kinds_of(blocks) == [0, 1, 2]


def test_a_mode_that_is_none_is_refused():
    refused(lambda: small(tiny("llama"), compile="all"), "'all'", "none, block, model")


def test_buckets_are_powers_of_two_and_the_number_of_rows():
    assert [module.buckets(rows) for rows in (1, 2, 6)] == [(1,), (1, 2), (1, 2, 4, 6)]
