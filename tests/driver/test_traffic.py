"""A plan says what ranks send each other: byte for byte the numbers that pass between them."""

from collections import Counter

import pytest
import torch.distributed as dist
from model_folders import random_tokens
from ranks import LENGTH, run_ranks

import qlab.driver.ranks
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import keep, rules
from qlab.driver import batches
from qlab.driver.plan import plan
from qlab.driver.quantize import quantize
from qlab.driver.ranks import Ranks
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.process.sendable import packed

SAMPLES = 5
WORDS = 4096  # bytes of a message at most that are no numbers: names, shapes, notes of one step
INT4 = parse_spec("int4-g16")
RECIPES = {
    "gptq": gptq(INT4),
    "asymmetric": gptq(parse_spec("int4-g16-asym")),
    "rtn": rtn(INT4),
    "some": rules({"*.o_proj": keep(), "*.mlp.*": rtn(INT4), "*": gptq(INT4)}),
}
CASES = [
    ("llama", "gptq"),
    ("llama", "asymmetric"),
    ("llama", "rtn"),
    ("llama", "some"),
    ("qwen3_moe", "gptq"),
]


def data_of(source):
    return random_tokens(source, samples=SAMPLES, length=LENGTH)


def sending(rank, cases, folder):
    """Of each case what this rank sends: numbers, other bytes, messages, and all of them as the
    collectives see them; and what the run says."""
    batches.BATCH_TOKENS = LENGTH
    moved = Ranks._moved
    sent = Counter()

    def receivers(to):
        return dist.get_world_size() - 1 if to is None else 1

    def counted(self, value, source, to):
        if rank == source:
            words, tensors = packed(value)
            sent["numbers"] += receivers(to) * sum(t.nbytes for t in tensors)
            sent["words"] += receivers(to) * len(words)
            sent["messages"] += receivers(to)
        return moved(self, value, source, to)

    class Counting:
        """torch.distributed, whose sends are counted."""

        def __getattr__(self, name):
            return getattr(dist, name)

        def broadcast(self, flat, source, group):
            sent["passed"] += receivers(None) * flat.nbytes * (rank == source)
            return dist.broadcast(flat, source, group=group)

        def send(self, flat, to, group):
            sent["passed"] += flat.nbytes
            return dist.send(flat, to, group=group)

    Ranks._moved, qlab.driver.ranks.dist = counted, Counting()
    found = []
    for source, name in cases:
        sent.clear()
        model = open_checkpoint(source)
        data = None if name == "rtn" else data_of(source)
        result = quantize(model, RECIPES[name], data, folder / f"{source.name}-{name}")
        found.append((Counter(sent), result.sent_bytes_per_block))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_send_the_bytes_that_are_planned(world, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)
    cases = [(saved(family), name) for family, name in CASES]
    of_ranks = run_ranks(tmp_path, world, sending, cases, tmp_path / "out")
    for (source, name), *runs in zip(cases, *of_ranks):
        sent = sum((counts for counts, _ in runs), Counter())
        data = None if name == "rtn" else data_of(source)
        planned = plan(open_checkpoint(source), RECIPES[name], data, ranks=world)
        assert sum(planned.traffic.values()) * planned.blocks == sent["numbers"], (name, sent)
        # a length comes before each message
        assert sent["passed"] == sent["numbers"] + sent["words"] + 8 * sent["messages"]
        assert sent["words"] < WORDS * sent["messages"]
        (said,) = {said for _, said in runs}  # before the last messages
        assert sent["numbers"] < said * planned.blocks <= sent["passed"], (name, said)
