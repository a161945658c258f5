"""A block for which no rank has room is sharded over all of them, to the same bytes."""

import gc
import os
import signal
from contextlib import contextmanager

import psutil
import pytest
import torch
from model_folders import contents, random_tokens
from ranks import run_ranks

import qlab.methods.auto_round as auto_round_module
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, rules
from qlab.driver import batches, segments, sharing
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.errors import QlabError, ToldElsewhere
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.auto_round import auto_round, auto_round_refine
from qlab.methods.gptq import gptq
from qlab.methods.qat import qat
from qlab.methods.rtn import rtn
from qlab.process.watched import Lost

SPEC = parse_spec("int4-g16")
LENGTH = 16
RECIPES = {
    "auto_round": auto_round(SPEC, steps=2, windows=3),
    "refine": chain(gptq(SPEC), auto_round_refine(steps=1, windows=2)),
    "gptq": gptq(SPEC),
    "rtn": rtn(SPEC),
    # one weight is learned, by one rank, and others take part
    "one": rules({"*.down_proj": auto_round(SPEC, steps=1, windows=2), "*": rtn(SPEC)}),
    "qat": qat(SPEC, steps=1, windows=2),
}


def data_of(source, name):
    return None if name == "rtn" else random_tokens(source, samples=5, length=LENGTH)


@contextmanager
def of_blocks_alone():
    """Plans of processes that take nothing by themselves: what they bound is what they count."""

    class Nothing:
        rss = 0

        def memory_info(self):
            return self

    real, psutil.Process = psutil.Process, Nothing
    try:
        yield
    finally:
        psutil.Process = real


def budget_of(model, name, data, ranks):
    """Bytes for which a whole block is too much."""
    return plan(model, RECIPES[name], data, ranks=ranks).peak_bytes - 1


def quantized(source, name, out, ranks=1, **options):
    model, data = open_checkpoint(source), data_of(source, name)
    with of_blocks_alone():
        memory = None if ranks == 1 else budget_of(model, name, data, ranks)
        return quantize(model, RECIPES[name], data, out, memory=memory, **options)


def written(rank, cases, folder, world):
    batches.BATCH_TOKENS = LENGTH
    return [
        quantized(source, name, folder / f"{source.name}-{name}", world).plan.is_sharded
        for source, name in cases
    ]


@pytest.fixture
def by_windows(monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)


# ------------------------------------------------------------------ the same bytes
CASES = [
    *[("llama", name) for name in ("auto_round", "one", "refine", "gptq", "rtn")],
    *[("qwen3_moe", name) for name in ("auto_round", "rtn")],
    ("gpt2", "auto_round"),
]


def test_sharded_blocks_become_the_bytes_of_whole_ones(saved, tmp_path, by_windows):
    cases = [(saved(family), name) for family, name in CASES]
    assert not any(written(0, cases, tmp_path / "1", 1))
    for world, some in ((2, cases), (3, [*cases[:2], cases[-1]])):
        found = run_ranks(tmp_path, world, written, some, tmp_path / str(world), world)
        assert found == [[True] * len(some)] * world
        for source, name in some:
            out = f"{source.name}-{name}"
            assert contents(tmp_path / str(world) / out) == contents(tmp_path / "1" / out), out


# ------------------------------------------------------------------ what each rank holds
def holding(rank, source, folder):
    """Of the first block: bytes of its weights on this rank behind loading and, of the same shapes,
    how many whole ones are in memory; the numbers in the weights that the rank learns."""
    batches.BATCH_TOKENS = LENGTH
    found = {}
    loaded, parameters = segments.load_block, auto_round_module.Start.parameters

    def load(skeleton, path, call, **options):
        graph = loaded(skeleton, path, call, **options)
        leaves = [graph.params[site.weight] for site in graph.code.sites]
        shards = [shard for leaf in leaves for shard in leaf.shards]
        shapes = {tuple(leaf.shape) for leaf in leaves}
        gc.collect()
        whole = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        found.setdefault("rows", sum(shard.nbytes for shard in shards))
        found.setdefault("all", sum(4 * leaf.shape.numel() for leaf in leaves))
        whole = [t for t in whole if tuple(t.shape) in shapes and t.untyped_storage().nbytes()]
        found.setdefault("whole", len([t for t in whole if not t.is_meta]))
        return graph

    def learns(start):
        found["learned"] = found.get("learned", 0) + start.W_ok.numel()
        return parameters(start)

    segments.load_block, auto_round_module.Start.parameters = load, learns
    quantized(source, "auto_round", folder / "held", 2)
    return found


def test_a_rank_holds_its_rows_and_learns_its_weights(saved, tmp_path):
    of_ranks = run_ranks(tmp_path, 2, holding, saved("llama"), tmp_path)
    for found in of_ranks:
        assert found["rows"] == found["all"] / 2 and found["whole"] == 0, found
        assert found["learned"] <= 2 * 0.6 * found["all"] / 4, found  # of two blocks
    assert sum(found["learned"] for found in of_ranks) == 2 * of_ranks[0]["all"] / 4


# ------------------------------------------------------------------ plans, refusals
def test_a_plan_shards_where_whole_blocks_do_not_fit_and_where_it_may(saved):
    source = saved("llama")
    model = open_checkpoint(source)
    for name, shards in (("auto_round", True), ("gptq", True), ("qat", False)):
        data, recipe = data_of(source, name), RECIPES[name]
        with of_blocks_alone():
            whole = plan(model, recipe, data, ranks=4)
            roomy = plan(model, recipe, data, ranks=4, memory=whole.peak_bytes)
            tight = plan(model, recipe, data, ranks=4, memory=whole.peak_bytes - 1)
        assert not whole.is_sharded and not roomy.is_sharded and tight.is_sharded == shards
        assert (tight.peak_bytes < whole.peak_bytes) == shards
        with pytest.raises(QlabError, match="on each of 4 ranks and the budget is"):
            tight.check(tight.peak_bytes - 1)


def test_more_ranks_hold_less_each(saved):
    source = saved("qwen3_moe")
    model, data = open_checkpoint(source), data_of(source, "auto_round")
    with of_blocks_alone():
        sharded = [
            plan(model, RECIPES["auto_round"], data, ranks=ranks, memory=1) for ranks in (2, 4)
        ]
    rows = [each.memory["rows of the block"] for each in sharded]
    assert all(each.is_sharded for each in sharded) and rows[0] == 2 * rows[1]


# ------------------------------------------------------------------ a rank that is gone, or fails
def ends(rank, source, out, fails):
    """Rank 1 fails, or is gone, while weights are lent."""
    batches.BATCH_TOKENS = LENGTH
    fetched, seen = sharing.Lent.fetched, []

    def at_last(self, *arguments):
        seen.append(1)
        if rank == 1 and len(seen) == 100:
            if fails:
                raise QlabError("it will not do")
            os.kill(os.getpid(), signal.SIGKILL)
        return fetched(self, *arguments)

    sharing.Lent.fetched = at_last
    quantized(source, "auto_round", out, 2)


def test_a_rank_that_fails_or_is_gone_ends_all_and_one_process_goes_on(saved, tmp_path, by_windows):
    source, out = saved("llama"), tmp_path / "out"
    said, other = run_ranks(tmp_path, 2, ends, source, tmp_path / "failed", True)
    assert "it will not do" in str(said) and type(other) is ToldElsewhere
    said, gone = run_ranks(tmp_path, 2, ends, source, out, False)
    assert type(said) is Lost and gone is None and not out.exists()
    resumed = quantized(source, "auto_round", out, resume=True)
    assert contents(resumed.path) == contents(quantized(source, "auto_round", tmp_path / "w").path)
