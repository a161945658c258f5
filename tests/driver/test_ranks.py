"""Several ranks write the bytes that one process writes, and end with a sentence when one of them
is gone, fails or sees something else."""

import gc
import os
import signal

import pytest
import torch
from model_folders import contents, random_tokens
from quick import QUICK
from ranks import LENGTH, run_ranks
from torch.multiprocessing.reductions import StorageWeakRef

import qlab.files.atomic
from qlab.algebra.spec import parse_spec
from qlab.algebra.statistic import Stat
from qlab.algebra.stats import Moment
from qlab.algebra.transform import chain, each_weight, rules
from qlab.driver import batches
from qlab.driver.parts import MOST, Parts
from qlab.driver.quantize import quantize
from qlab.driver.ranks import Ranks
from qlab.errors import QlabError, ToldElsewhere
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant
from qlab.process.sendable import packed, unpacked
from qlab.process.watched import Lost

SPEC = parse_spec("int4-g16")
METHODS = {
    **QUICK,
    "smoothquant_gptq": lambda spec: chain(smoothquant(0.3), gptq(spec)),
    "nvfp4": lambda spec: gptq(parse_spec("nvfp4")),
}
CASES = [
    *[("llama", name) for name in ("rtn", "awq", "loaq-refined", "smoothquant_gptq")],
    *[("llama", name) for name in ("gptaq", "nvfp4", "auto_round")],
    ("qwen3_moe", "gptq"),
]


def written(cases, folder, offload=None):
    """Every case's output, of windows that are a batch each; gptq's are in parts of several."""
    batches.BATCH_TOKENS = LENGTH
    for source, name in cases:
        samples = MOST + 1 if name == "gptq" else 5
        data = random_tokens(source, samples=samples, length=LENGTH)
        recipe, out = METHODS[name](SPEC), folder / f"{source.name}-{name}"
        quantize(open_checkpoint(source), recipe, data, out, offload=offload)


@pytest.fixture
def by_windows(monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)


def of_rank(rank, cases, folder):
    written(cases, folder, folder.with_name("away"))


def test_one_two_and_three_ranks_write_the_same_bytes(saved, tmp_path, by_windows):
    cases = [(saved(family), name) for family, name in CASES]
    written(cases, tmp_path / "alone")
    for world, some in ((2, [cases[2], cases[-1]]), (3, cases)):
        folder = tmp_path / str(world)
        assert run_ranks(tmp_path, world, of_rank, some, folder) == [None] * world
        assert len(list(folder.iterdir())) == len(some)
        for out in folder.iterdir():
            assert contents(out) == contents(tmp_path / "alone" / out.name), (world, out.name)


# ------------------------------------------------------------------ a rank that is gone
RECIPE = rules({"*.down_proj": gptq(SPEC), "*": rtn(SPEC)})


def dies(rank, source, out, dying, count):
    """The dying rank kills itself at its `count`-th message or, where it writes, its `count`-th
    rename."""
    batches.BATCH_TOKENS = LENGTH
    seen = 0

    def at_last(do):
        def counted(*arguments):
            nonlocal seen
            seen += 1
            if rank == dying and seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*arguments)

        return counted

    if dying:
        Ranks._moved = at_last(Ranks._moved)
    else:
        qlab.files.atomic.os.replace = at_last(os.replace)
    data = random_tokens(source, samples=5, length=LENGTH)
    quantize(open_checkpoint(source), RECIPE, data, out)


@pytest.mark.parametrize("world, dying, count", [(3, 2, 20), (2, 0, 4)])
def test_a_rank_that_is_gone_ends_all_and_the_run_goes_on_with_another_number(
    saved, tmp_path, by_windows, world, dying, count
):
    source = saved("llama")
    data = random_tokens(source, samples=5, length=LENGTH)
    model = open_checkpoint(source)
    whole = contents(quantize(model, RECIPE, data, tmp_path / "whole").path)
    said = run_ranks(tmp_path, world, dies, source, tmp_path / "out", dying, count)
    assert said.pop(dying) is None and len(said) == world - 1
    for error in said:
        assert type(error) is Lost and str(error).startswith(f"rank {dying} of {world} is gone")
    assert not (tmp_path / "out").exists()
    resumed = quantize(model, RECIPE, data, tmp_path / "out", resume=True)
    assert contents(resumed.path) == whole


# ------------------------------------------------------------------ what is refused
def fails(W_ok, stats, spec):
    raise QlabError("it will not do")


def observing(name):
    """A step with a statistic of its own, under a name that all these share."""
    stat = Stat(lambda seen: seen.x_nk.abs().amax().float(), torch.maximum, name="peak")
    return each_weight(name, lambda W_ok, stats, spec: (W_ok, {}), None, {stat})


def refusals(rank, source, folder):
    """What every rank says of ranks that see something else, of one that fails in the work, and of
    statistics that none can tell apart."""
    said = []
    seeds = [dict(seed=rank), dict(), dict()]
    failing = each_weight("failing", fails, None)
    alike = chain(observing("one"), observing("other"), rtn(SPEC))
    recipes = [gptq(SPEC), failing, alike]
    for number, (recipe, seed) in enumerate(zip(recipes, seeds)):
        data = random_tokens(source, samples=2, length=LENGTH, **seed)
        try:
            quantize(open_checkpoint(source), recipe, data, folder / str(number))
        except QlabError as error:
            said.append((type(error), str(error)))
    return said


def test_ranks_that_see_other_data_or_fail_are_told_once(saved, tmp_path):
    first, second = run_ranks(tmp_path, 2, refusals, saved("llama"), tmp_path / "out")
    assert [kind for kind, _ in first] == [QlabError] * 3, first
    assert [kind for kind, _ in second[:2]] == [ToldElsewhere] * 2, second
    assert "different calibration data: rank 1 has" in first[0][1]
    assert "it will not do" in first[1][1] and "it will not do" in second[1][1]
    assert all("have the name 'peak'" in said[2][1] for said in (first, second))


def test_processes_that_no_group_joins_are_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QlabError, match="2 processes were started together"):
        quantize(open_checkpoint(saved("llama")), rtn(SPEC), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ parts, values
@pytest.mark.parametrize("count", [0, 1, 5, 16, 17, 100])
def test_parts_depend_on_the_number_of_batches_alone(count):
    parts = Parts(count)
    assert parts.count <= MOST
    for world in (1, 2, 3, 20):
        shares = [parts.numbers(rank, world) for rank in range(world)]
        assert sorted(i for share in shares for i in share) == list(range(count))
        for share in shares:
            in_parts = {i // parts.size for i in share}
            assert {i for i in range(count) if i // parts.size in in_parts} == set(share)


def test_values_arrive_laid_out_as_they_were():
    t = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
    value = {
        "turned": t.permute(2, 0, 1),
        "repeated": t[0, 0].expand(5, 4),
        "one repeated": torch.zeros(1, dtype=torch.float32).expand(3, 3),
        "part": t[:, 1],
        "number": torch.tensor(True),
        "none": torch.empty(0, 3, dtype=torch.float32),
        "moment": Moment(t.float()[0].T, 3),
    }
    data, tensors = packed([value, t, t])
    stream = iter(tensors)
    arrived, one, other = unpacked(data, lambda place: place.of(next(stream).clone()))
    assert one is other
    for name in value.keys() - {"moment"}:
        assert torch.equal(arrived[name], value[name]) and arrived[name].dtype == value[name].dtype
    assert arrived["turned"].stride() == value["turned"].stride()
    assert arrived["repeated"].stride() == value["repeated"].stride()
    assert arrived["moment"].tokens == 3 and not arrived["moment"].sum_kk.is_contiguous()


def sent_once():
    """The memory of a value's tensor, and of the one that arrived."""
    data, tensors = packed({"moment": Moment(torch.ones(3, 3, dtype=torch.float32), 1)})
    arrived = unpacked(data, lambda place: place.of(tensors[0].clone()))["moment"].sum_kk
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in (tensors[0], arrived)]


def test_nothing_that_was_sent_outlives_its_last_user():
    gc.disable()  # it looks for cycles of references too seldom for matrices
    try:
        assert all(memory.expired() for memory in sent_once())
    finally:
        gc.enable()


def test_what_no_other_process_can_hold_is_refused():
    with pytest.raises(QlabError, match="cannot be sent to other ranks"):
        packed({"op": lambda x: x})
