"""Ranks search for the scales of a block at one time: inputs that turn one after the other have one
owner, and its choice is told to all."""

import importlib

import pytest
import torch
from model_folders import contents, random_tokens
from ranks import LENGTH, run_ranks

from qlab.algebra.gauge import gauge
from qlab.algebra.groups import chained
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain
from qlab.driver import batches
from qlab.driver.owners import owners_of
from qlab.driver.quantize import quantize
from qlab.driver.sites import trace_all
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.awq import awq, awq_scale
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.methods.smoothquant import smoothquant
from qlab.methods.sparsegpt import sparsegpt
from qlab.model.skeleton import Skeleton

AWQ = importlib.import_module("qlab.methods.awq")  # the function has its name in qlab.methods
SPEC = parse_spec("int4-g16")
RECIPES = {
    "awq": awq(SPEC),
    "awq-gptq": chain(awq_scale(SPEC), gptq(SPEC)),
    # second moments are there before channels are scaled, on ranks that do not scale them
    "pruned": chain(sparsegpt(0.5), smoothquant(0.3), gptq(SPEC)),
}


# ------------------------------------------------------------------ who owns what
CHAINS = {
    "llama": [{"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}],
    "gpt2": [{"c_attn", "c_proj"}, {"c_fc"}, {"c_proj"}],  # nothing takes a scale behind GELU
    "qwen3_moe": [
        {"q_proj", "k_proj", "v_proj", "o_proj"},
        {"gate", "gate_up_proj", "down_proj"},
    ],
}


@pytest.mark.parametrize("family", CHAINS)
def test_what_reads_a_wire_and_makes_the_next_one_turns_on_one_rank(family, saved):
    skeleton = Skeleton(open_checkpoint(saved(family)), torch.float32)
    code = next(iter(trace_all(skeleton, random_tokens(saved(family))).values()))
    names = [{path.rpartition(".")[2] for path in chain} for chain in chained(code)]
    assert sorted(map(sorted, names)) == sorted(map(sorted, CHAINS[family]))
    shapes = {site: (64, 64) for site in code.sites}
    owner = owners_of(code, shapes, ranks=2, one_by_one=False, fused=False)
    found = [{owner.turns[path] for path in chain} for chain in chained(code)]
    assert all(len(ranks) == 1 for ranks in found) and set.union(*found) == {0, 1}


# ------------------------------------------------------------------ the same bytes
def searching(rank, cases, folder):
    """Of each case how many scales this rank searched for."""
    batches.BATCH_TOKENS = LENGTH
    search, searched = AWQ.search, []
    AWQ.search = lambda *given: (searched.append(1), search(*given))[1]
    found = []
    try:
        for source, name, inputs in cases:
            searched.clear()
            data = random_tokens(source, samples=5, length=LENGTH)
            out = folder / f"{source.name}-{name}-{inputs}"
            quantize(open_checkpoint(source), RECIPES[name], data, out, inputs=inputs)
            found.append(len(searched))
    finally:
        AWQ.search = search
    return found


def test_ranks_search_for_some_scales_each_and_write_the_bytes_of_one_process(
    saved, tmp_path, monkeypatch
):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)
    llama = saved("llama", torch.bfloat16, num_hidden_layers=1)
    mixture = saved("qwen3_moe", num_hidden_layers=1)
    cases = [
        (llama, "awq-gptq", "reference"),
        (mixture, "awq", "quantized"),
        (llama, "pruned", "quantized"),
    ]
    alone = dict(zip(cases, searching(0, cases, tmp_path / "alone")))
    for world, some in ((2, cases[:2]), (3, cases[2:])):
        found = run_ranks(tmp_path, world, searching, some, tmp_path / str(world))
        assert [sum(of_case) for of_case in zip(*found)] == [alone[case] for case in some]
        assert all(all(of_rank) for of_rank in found) or world == 3, found
        for source, name, inputs in some:
            out = f"{source.name}-{name}-{inputs}"
            assert contents(tmp_path / str(world) / out) == contents(tmp_path / "alone" / out), out


# ------------------------------------------------------------------ what is refused
def looking_elsewhere(rank, source, folder):
    """A step that makes a scale of a weight which another rank turns."""

    def choose(turn):
        W_ok = turn.graph.params["mlp.up_proj.weight"]
        return torch.full((turn.size,), 2.0) * float(W_ok.abs().max().clamp(1, 1))

    recipe = chain(gauge("looks", "*.o_proj:in", choose), rtn(SPEC))
    try:
        quantize(open_checkpoint(source), recipe, None, folder / "out")
    except QlabError as error:
        return str(error)


def test_a_step_that_reads_what_another_rank_turns_is_refused(saved, tmp_path):
    source = saved("llama", num_hidden_layers=1)
    said = run_ranks(tmp_path, 2, looking_elsewhere, source, tmp_path)
    assert all("makes model.layers.0.self_attn.o_proj depend on weights" in e for e in said), said
