"""Tuning with an injected clock and an injected measure: how often it measures, what wins, when it
stops, who may tune."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from qlab_kernels import cache
from qlab_kernels.config import Config, candidates
from qlab_kernels.cost import prune, rank
from qlab_kernels.entries import CacheError, locked
from qlab_kernels.tune import ROUNDS, tune


class Bench:
    """A device that does not exist: `times` maps configs to microseconds, others cost `usual`;
    every repetition takes a tick."""

    def __init__(self, times=None, usual=100.0, tick=0.0):
        self.times, self.usual, self.tick, self.now, self.calls = times or {}, usual, tick, 0.0, []

    def __call__(self, config, reps):
        self.calls.append((config, reps))
        self.now += self.tick * reps
        us = self.times.get(config, self.usual)
        if isinstance(us, BaseException):
            raise us
        return us

    def clock(self):
        return self.now


def test_halving_goes_3_10_50(problem):
    kept = prune(problem())
    bench = Bench({c: 100.0 + i for i, c in enumerate(kept)})
    entry = tune(problem(), bench, 1e9)
    assert [reps for _, reps in bench.calls] == [3] * len(kept) + [10] * 4 + [50] * 2
    assert entry.config == kept[0] and (entry.us, entry.trials, entry.source) == (
        100.0,
        len(kept),
        "measured",
    )
    assert entry.torch == torch.__version__ and entry.gbps == pytest.approx(
        34.6e6 / 100 * 1e-3, rel=0.03
    )


def test_the_fastest_wins_wherever_the_model_ranked_it(problem):
    for config in prune(problem()):
        assert tune(problem(), Bench({config: 50.0}), 1e9, retune=True).config == config


def test_a_second_start_measures_nothing(problem):
    bench = Bench()
    first = tune(problem(), bench, 1e9)
    cache.refresh()
    again = Bench()
    assert tune(problem(), again, 1e9) == first and again.calls == []
    assert cache.lookup(problem()).source == "user" and not cache.lookup(problem()).stale
    # m=9 and m=16 share a bucket.
    assert tune(problem(m=9), again, 1e9) == first and again.calls == []
    assert tune(problem(), again, 1e9, retune=True) and again.calls


def test_what_is_known_needs_neither_lock_nor_a_folder_to_write(problem, monkeypatch):
    tune(problem(), Bench(), 1e9)
    monkeypatch.setattr(cache, "require_writable", lambda: 1 / 0)
    assert tune(problem(), Bench(), 1e9)


def test_lookups_never_measure(problem):
    bench = Bench()
    for m in (1, 16, 4096):
        assert cache.lookup(problem(m=m)).config
    assert bench.calls == [] and not cache.folder().exists()


def test_an_older_kernel_is_tuned_anew(problem, monkeypatch):
    tune(problem(), Bench(), 1e9)
    monkeypatch.setattr(cache, "kernel_revision", lambda op: "newer")
    cache.refresh()
    assert cache.lookup(problem()).stale
    bench = Bench()
    tune(problem(), bench, 1e9)
    assert bench.calls and not cache.lookup(problem()).stale


def test_the_budget_ends_it_with_the_best_so_far(problem):
    kept = prune(problem())
    bench = Bench({kept[2]: 50.0}, tick=1.0)
    entry = tune(problem(), bench, 12.0, clock=bench.clock)
    assert len(bench.calls) == 4 and entry.config == kept[2]  # three ticks each
    bench = Bench(tick=1.0)
    # One configuration alone would have no rival.
    assert tune(problem(m=1), bench, 0.0, clock=bench.clock) and len(bench.calls) == 2


def test_it_stops_at_the_floor(problem):
    kept = prune(problem())
    bench = Bench({kept[1]: 10.2})
    assert tune(problem(), bench, 1e9, floor_us=10.0).config == kept[1] and len(bench.calls) == 2


def test_it_stops_when_ten_repetitions_leave_a_clear_leader(problem):
    kept = prune(problem())
    bench = Bench({kept[0]: 50.0})
    tune(problem(), bench, 1e9)
    assert {reps for _, reps in bench.calls} == {3, 10}


class Broken(Exception):
    """Triton's own errors derive from Exception alone."""


def test_candidates_that_fail_lose_and_are_not_tried_again(problem):
    kept = prune(problem())
    broken = {c: Broken("out of resource") for c in kept[:5]}
    bench, said = Bench(broken), []
    assert tune(problem(), bench, 1e9, said=said.append).config in kept[5:]
    assert sum(c in broken for c, _ in bench.calls) == 5
    assert [t.failure for t in said[:5]] == ["Broken: out of resource"] * 5


def test_one_that_fails_later_loses_too(problem):
    def measure(config, reps):
        if reps > ROUNDS[0][0]:
            raise RuntimeError("too hot")
        return 5.0

    assert tune(problem(), measure, 1e9).us == 5.0


def test_when_none_runs_it_says_why_and_keeps_nothing(problem):
    everything = {c: ValueError("no such device") for c in candidates(problem())}
    with pytest.raises(
        CacheError,
        match="none of 16 candidates ran for n=8192, k=8192, m=16: ValueError: no such device",
    ):
        tune(problem(), Bench(everything), 1e9)
    assert cache.fresh(problem()) is None


def test_an_interrupt_is_not_a_slow_candidate(problem):
    with pytest.raises(KeyboardInterrupt):
        tune(problem(), Bench({prune(problem())[0]: KeyboardInterrupt()}), 1e9)


def test_the_model_prunes_before_anything_is_timed(problem):
    bench = Bench()
    tune(problem(m=64), bench, 1e9, keep=6)
    timed = [c for c, reps in bench.calls if reps == 3]
    assert len(timed) == 6 < len(candidates(problem(m=64)))
    assert {c.kind for c in timed} == {"split_k", "gemm", "dequant"}
    assert timed[0] == rank(problem(m=64))[0][1]


def test_a_folder_that_cannot_be_written_is_refused_before_measuring(folder, problem):
    folder.write_text("in the way")
    bench = Bench()
    with pytest.raises(CacheError, match="nothing that is tuned could be kept"):
        tune(problem(), bench, 1e9)
    assert bench.calls == []


def test_only_one_process_tunes_and_the_others_use_what_it_found(folder, problem):
    """The child holds the tuning lock until it stored its result; the parent waits for it and
    measures nothing."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:

        def slow(config, reps):
            if not slow.said:
                os.write(write_end, b"x")
                slow.said = True
                signal.sigtimedwait([signal.SIGUSR1], 0.5)
            return 7.0

        slow.said = False
        tune(problem(), slow, 1e9)
        os._exit(0)
    os.read(read_end, 1)
    bench = Bench()
    with pytest.raises(CacheError, match="another process has been tuning"):
        tune(problem(), bench, 1e9, wait_s=0.0)
    assert tune(problem(), bench, 1e9).us == 7.0 and bench.calls == []
    assert os.waitpid(pid, 0)[1] == 0


def test_measuring_does_not_block_those_who_store(folder, problem, entry):
    def measure(config, reps):
        cache.store(problem(n=4096), entry())
        with locked(folder / "int4_mm.sm90.json"):
            return 1.0

    assert tune(problem(), measure, 1e9)


def test_nothing_is_tuned_while_a_graph_is_traced_or_recorded(problem, monkeypatch):
    bench = Bench()
    for module, name in (
        (torch.compiler, "is_compiling"),
        (torch.cuda, "is_current_stream_capturing"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            patch.setattr(module, name, lambda: True)
            with pytest.raises(CacheError, match="tune before"):
                tune(problem(), bench, 1e9)
    assert bench.calls == []


def test_the_cpus_kinds_are_timed_both(problem):
    p = replace(problem(m=1), op="int4_linear_cpu", cc="cpu-amx")
    bench = Bench({Config("dense"): 5.0})
    assert tune(p, bench, 1e9).config == Config("dense") and {c.kind for c, _ in bench.calls} == {
        "int4pack",
        "dense",
    }
    assert cache.lookup(p).source == "user"
