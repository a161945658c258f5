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

from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, rules
from qlab.driver import batches, segments, sharing
from qlab.driver.job import CODEC
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.driver.ranks import Ranks
from qlab.errors import QlabError, ToldElsewhere
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.auto_round import Start, auto_round, auto_round_refine
from qlab.methods.gptq import gptq
from qlab.methods.qat import qat
from qlab.methods.rtn import rtn
from qlab.process.sendable import packed
from qlab.process.watched import Lost

SPEC = parse_spec("int4-g16")
LENGTH = 16
LEARNED = auto_round(SPEC, steps=1, windows=3)
RECIPES = {
    "auto_round": LEARNED,
    "refine": chain(gptq(SPEC), auto_round_refine(steps=1, windows=2)),
    # one weight is learned, by one rank, and others take part
    "one": rules({"*.down_proj": LEARNED, "*": rtn(SPEC)}),
    # the first block is learned by none, and its states are asked for
    "last": rules({"*.0.*": rtn(SPEC), "*.down_proj": None, "*": LEARNED}),
    "some": chain(
        rules({"*.q_proj": gptq(SPEC), "*": None}), auto_round_refine(steps=1, windows=2)
    ),
    # others are gathered while it is learned, those behind it on the way back too
    "before": rules({"*.q_proj": auto_round(SPEC, steps=2, windows=2), "*": rtn(SPEC)}),
    "gptq": gptq(SPEC),
    # their inputs are observed behind weights that are sharded
    "behind learned": rules({"*.down_proj": gptq(SPEC), "*": LEARNED}),
    "learned before": chain(
        rules({"*.mlp.*": None, "*": LEARNED}), rules({"*.mlp.*": gptq(SPEC), "*": None})
    ),
    "qat": qat(SPEC, steps=1, windows=2),
}


def data_of(source):
    return random_tokens(source, samples=5, length=LENGTH)


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


def quantized(source, name, out, ranks=1, **options):
    model, data = open_checkpoint(source), data_of(source)
    codec = "gptq" if model.raw["model_type"] == "gpt2" else CODEC
    with of_blocks_alone():
        whole = plan(model, RECIPES[name], data, ranks=ranks, codec=codec).peak_bytes
        memory = None if ranks == 1 else whole - 1
        return quantize(model, RECIPES[name], data, out, codec=codec, memory=memory, **options)


def sending(rank, cases, folder, world):
    """Of each case the plan, and the bytes of tensors that this rank sends."""
    batches.BATCH_TOKENS = LENGTH
    moved, seen = Ranks._moved, []

    def counted(self, value, source, to):
        """Lets the tensors of a message count alone, and neither its words nor its length."""
        before = self.sent_bytes
        found = moved(self, value, source, to)
        if self.rank == source:
            tensors = sum(t.nbytes for t in packed(value)[1])
            self.sent_bytes = before + tensors * (self.world - 1 if to is None else 1)
        seen.append(self)
        return found

    Ranks._moved, found = counted, []
    for source, name in cases:
        planned = quantized(source, name, folder / f"{source.name}-{name}", world).plan
        found.append((planned, seen[-1].sent_bytes))
    return found


@pytest.fixture
def by_windows(monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)


# ------------------------------------------------------------------ the same bytes
CASES = {
    2: [("llama", {}, "refine"), ("qwen3_moe", {"num_hidden_layers": 1}, "auto_round")],
    3: [
        ("llama", {"num_hidden_layers": 1}, "some"),
        ("llama", {"num_hidden_layers": 1}, "before"),
        ("llama", {}, "last"),
        ("gpt2", {"n_layer": 1, "dtype": torch.float16}, "auto_round"),
    ],
}


@pytest.mark.parametrize("world", CASES)
def test_sharded_blocks_become_the_bytes_of_whole_ones_and_send_what_is_planned(
    world, saved, tmp_path, by_windows
):
    cases = [(saved(family, **options), name) for family, options, name in CASES[world]]
    of_ranks = run_ranks(tmp_path, world, sending, cases, tmp_path / "ranks", world)
    for (source, name), *runs in zip(cases, *of_ranks):
        alone = quantized(source, name, tmp_path / "alone" / f"{source.name}-{name}")
        assert contents(tmp_path / "ranks" / alone.path.name) == contents(alone.path), alone.path
        plans, sent = zip(*runs)
        assert all(planned.is_sharded for planned in plans) and not alone.plan.is_sharded
        planned = {name: n * plans[0].blocks for name, n in plans[0].traffic.items()}
        assert sum(planned.values()) == sum(sent), (alone.path, planned, sent)


# ------------------------------------------------------------------ what each rank holds
def holding(rank, source, folder):
    """Of the block: bytes of its weights on this rank behind loading, how many whole ones of its
    feed-forward layer are in memory, and the numbers in the weights that the rank learns."""
    batches.BATCH_TOKENS = LENGTH
    found = {}
    loaded, parameters = segments.load_block, Start.parameters

    def load(skeleton, path, call, **options):
        graph = loaded(skeleton, path, call, **options)
        leaves = [graph.params[site.weight] for site in graph.code.sites]
        shards = [shard for leaf in leaves for shard in leaf.shards]
        shapes = {(192, 64), (64, 192)}  # of no rows, and of nothing else
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

    segments.load_block, Start.parameters = load, learns
    quantized(source, "auto_round", folder / "held", 2)
    return found


def test_a_rank_holds_its_rows_and_learns_its_weights(saved, tmp_path):
    model = saved("llama", num_hidden_layers=1, intermediate_size=192)
    of_ranks = run_ranks(tmp_path, 2, holding, model, tmp_path)
    for found in of_ranks:
        assert found["rows"] == found["all"] / 2 and found["whole"] == 0, found
        assert found["learned"] <= 0.6 * found["all"] / 4, found  # numbers of 4 bytes
    assert sum(found["learned"] for found in of_ranks) == of_ranks[0]["all"] / 4


# ------------------------------------------------------------------ plans, refusals
def test_a_plan_shards_where_whole_blocks_do_not_fit_and_where_it_may(saved):
    source = saved("llama")
    model = open_checkpoint(source)
    may = ["auto_round", "one", "last", "gptq"]
    for name in (*may, "behind learned", "learned before", "qat"):
        shards = name in may
        data, recipe = data_of(source), RECIPES[name]
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
    model, data = open_checkpoint(source), data_of(source)
    with of_blocks_alone():
        sharded = [
            plan(model, RECIPES["auto_round"], data, ranks=ranks, memory=1) for ranks in (2, 4)
        ]
    rows = [each.memory["rows of the block"] for each in sharded]
    assert all(each.is_sharded for each in sharded) and rows[0] == 2 * rows[1]


# ------------------------------------------------------------------ a rank that is gone, or fails
def ends(rank, source, out, fails):
    """Rank 1 fails, or is gone, while a weight of the second block is lent."""
    batches.BATCH_TOKENS = LENGTH
    fetched, seen = sharing.Lent.fetched, []

    def at_last(self, *arguments):
        seen.append(1)
        if rank == 1 and len(seen) == 12:
            if fails:
                raise QlabError("it will not do")
            os.kill(os.getpid(), signal.SIGKILL)
        return fetched(self, *arguments)

    sharing.Lent.fetched = at_last
    quantized(source, "one", out, 2)


def test_a_rank_that_fails_or_is_gone_ends_all_and_one_process_goes_on(saved, tmp_path, by_windows):
    source, out = saved("llama"), tmp_path / "out"
    said, other = run_ranks(tmp_path, 2, ends, source, tmp_path / "failed", True)
    assert "it will not do" in str(said) and type(other) is ToldElsewhere
    (tmp_path / "gone").mkdir()
    said, gone = run_ranks(tmp_path / "gone", 2, ends, source, out, False)
    assert type(said) is Lost and gone is None and not out.exists()
    resumed = quantized(source, "one", out, resume=True)
    assert contents(resumed.path) == contents(quantized(source, "one", tmp_path / "w").path)
