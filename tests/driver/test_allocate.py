"""Bits within a budget: which rounding each weight gets."""

import itertools

import pytest
import torch
from model_folders import random_tokens, refused
from transformers import AutoModelForCausalLM

from qlab import allocate, apply, evaluate, fisher, kl_of_each, plan, quantize
from qlab.algebra.graph import by_source
from qlab.algebra.grid import encode, minmax
from qlab.algebra.leaf import dense
from qlab.algebra.scope import matches, pattern_of
from qlab.algebra.spec import parse_spec, with_scale_dtype
from qlab.algebra.transform import at, chain, keep, rules
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn
from qlab.methods.sensitivity import fused

SPECS = [parse_spec(text) for text in ("int2-g16", "int4-g16", "int8-g16")]
CHOICES = [rtn(spec) for spec in SPECS]


def opened(saved, family="llama", dtype=torch.bfloat16):
    source = saved(family, dtype)
    return open_checkpoint(source), random_tokens(source, 2, 16)


def rows_of(value):
    return {name: row["spec"] for name, row in value.plan.sites.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_budget_is_kept_and_fused_weights_are_chosen_together(family, saved):
    model, data = opened(saved, family)
    value = apply(model, allocate(CHOICES, 5.3), data)
    rows = value.plan.sites
    rounded = {name: row for name, row in rows.items() if row["spec"]}
    sizes = {name: torch.Size(row["shape"]).numel() for name, row in rounded.items()}
    bits = sum(row["bits_per_weight"] * sizes[name] for name, row in rounded.items())
    assert 4.5 < bits / sum(sizes.values()) <= 5.3
    assert len({row["spec"] for row in rounded.values()}) > 1
    for path, block in value.segments():
        for sites in [*by_source(block.code.sites).values(), *fused(block).values()]:
            specs = {rows[f"{path}.{s.path}"]["spec"] for s in sites if not s.router}
            assert len(specs) <= 1, (path, [s.path for s in sites])


def test_what_costs_most_gets_most_bits(saved, tmp_path):
    """By costs of one's own; and the choice is the least of all there are."""
    model, data = opened(saved)
    seen = {}

    def costs(whole, specs):
        def of_segment(table, path, graph):
            for i, site in enumerate(graph.sites):
                weight = 1.0 + i + 10 * path.endswith("1")
                table[graph.where(site)] = [weight * 4.0**-spec.bits for spec in specs]
            return table

        seen.update(whole.fold(of_segment, {}))
        return seen

    recipe = at("*.mlp.*", allocate(CHOICES, 4.7, costs))
    written = quantize(
        model, chain(recipe, at("*.self_attn.*", rtn(SPECS[2]))), data, tmp_path / "o"
    )
    specs = {name: row["spec"] for name, row in written.sites.items() if ".mlp." in name}
    assert specs.keys() == seen.keys()
    groups = [
        [n for n in seen if f"{b}.mlp" in n and ("down" in n) == d] for b in "01" for d in (0, 1)
    ]
    sizes = {name: 64 * 128 for name in seen}

    def totals(options):
        chosen = {name: c for group, c in zip(groups, options, strict=True) for name in group}
        bits = sum(sizes[n] * (SPECS[c].bits + 1) for n, c in chosen.items())
        return bits / sum(sizes.values()), sum(seen[n][c] for n, c in chosen.items())

    every = map(totals, itertools.product(range(3), repeat=4))
    least = min(cost for bits, cost in every if bits <= 4.7)
    names = [str(spec) for spec in SPECS]
    taken = sum(seen[name][names.index(spec)] for name, spec in specs.items())
    assert taken == pytest.approx(least)


@pytest.mark.parametrize("sensitivity", [fisher, kl_of_each])
def test_measured_sensitivities_beat_the_opposite_choice(sensitivity, saved):
    """Rounding what was measured as cheap loses less than rounding what was measured as dear."""
    model, data = opened(saved, dtype=torch.float32)

    def opposite(whole, specs):
        costs = sensitivity(whole, specs)
        return {name: [1 / (cost + 1e-12) for cost in row] for name, row in costs.items()}

    by_measure, by_opposite = (
        apply(model, allocate([rtn(SPECS[0]), keep()], 20, costs), data)
        for costs in (sensitivity, opposite)
    )
    assert evaluate(by_measure, model, data).kl < evaluate(by_opposite, model, data).kl


def test_fisher_is_half_the_squared_gradients_times_the_squared_errors(saved):
    """By the gradients of transformers' own loss, window by window."""
    model, data = opened(saved, dtype=torch.float32)
    seen = []

    def measured(whole, specs):
        seen.append(fisher(whole, specs))
        return seen[0]

    list(apply(model, allocate(CHOICES, 5, measured), data).segments())
    reference = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    name = "model.layers.1.self_attn.o_proj"
    W = reference.get_submodule(name).weight
    error = (
        dense(encode(minmax, W.detach(), with_scale_dtype(SPECS[0], torch.float32))) - W.detach()
    )
    expected = 0.0
    for ids in data.ids:
        reference.zero_grad()
        reference(ids[None], labels=ids[None]).loss.backward()
        expected += float((W.grad.square() * error.square()).sum()) / 2 / len(data.ids)
    assert seen[0][name][0] == pytest.approx(expected, rel=1e-3)


def test_choices_may_need_data_and_stand_behind_other_steps(saved):
    model, data = opened(saved)
    choices = [gptq(SPECS[0]), gptq(SPECS[1])]
    value = apply(model, rules({"*.down_proj": rtn(SPECS[2]), "*": allocate(choices, 4)}), data)
    assert set(rows_of(value).values()) == {"int2-g16", "int4-g16", "int8-g16"}
    assert all(block.notes for _, block in value.segments())


def test_a_pattern_matches_its_names_alone():
    names = ["a.1.b", "a.10.b", "a.2.c.3"]
    pattern = pattern_of(names)
    assert all(matches(pattern, name) for name in names)
    assert not any(
        matches(pattern, name) for name in ["a.11.b", "a.2.b", "a.1.bc", "axb", "a.2.c.4"]
    )


@pytest.mark.parametrize(
    "recipe, says",
    [
        (lambda: allocate(CHOICES, 2), "3.000 bits per weight and the budget is 2"),
        (lambda: allocate(CHOICES, 5, lambda m, s: {}), "gives no 3 numbers for"),
        (lambda: allocate(CHOICES, True), "bits is True"),
        (lambda: allocate([], 3), "give a list of recipes"),
        (lambda: allocate([rtn("int4-g32"), rtn], 3), r"choices\[1\] is rtn"),
        (lambda: allocate([chain(*CHOICES)], 3), "give recipes that round to one grid each"),
    ],
)
def test_what_cannot_be_chosen_is_refused(recipe, says, saved):
    model, data = opened(saved)
    with pytest.raises(QlabError, match=says):
        list(apply(model, recipe(), data).segments())


def test_costs_that_are_no_numbers_are_refused(saved):
    model, data = opened(saved)

    def nans(whole, specs):
        table = fisher(whole, specs)
        return {name: [float("nan")] * len(specs) for name in table}

    with pytest.raises(QlabError, match="return finite numbers"):
        list(apply(model, allocate(CHOICES, 5, nans), data).segments())


def test_what_no_choice_allows_is_refused_by_the_plan(saved):
    """With the sentence of the run, which would measure first."""
    model, data = opened(saved, dtype=torch.float32)

    def unmeasured(whole, specs):
        raise AssertionError("this comes after refusals")

    def asked(recipe, **options):
        return lambda: plan(model, recipe, data, **options)

    least = "the smallest choices of allocate take 4.000 bits per weight and the budget is 2.5"
    refused(asked(allocate(CHOICES, 2.5, unmeasured)), least)
    refused(lambda: apply(model, allocate(CHOICES, 2.5, unmeasured), data), least)
    narrow = rules({"*.mlp.*": allocate(CHOICES, 2.5, unmeasured), "*": rtn(SPECS[2])})
    refused(asked(narrow), least)
    scales = "GPTQ has no torch.float32 scales"
    wide = [rtn(with_scale_dtype(spec, torch.float32)) for spec in SPECS]
    refused(asked(allocate(wide, 5, unmeasured), codec="gptq"), scales)
    refused(asked(allocate([rtn(parse_spec("int4-g24")), keep()], 5, unmeasured)), "groups of 24")
    assert plan(model, allocate([*CHOICES, keep()], 5, unmeasured), data)
