"""A measurement of the whole model whose value becomes the next part of a recipe."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from families import tiny
from killing import KILLED, dying, finish, start
from model_folders import contents, random_tokens

import qlab
from qlab.algebra.bind import digest
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, keep, rules
from qlab.driver.apply import apply
from qlab.driver.quantize import compare, quantize
from qlab.driver.write import write
from qlab.errors import QlabError
from qlab.evaluation.logits import logits
from qlab.evaluation.perplexity import evaluate
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

INT4, INT8 = parse_spec("int4-g16"), parse_spec("int8-channel")
FAMILIES = ["llama", "gpt2", "qwen3_moe"]


def opened(saved, family="llama", dtype=torch.float32):
    source = saved(family, dtype)
    return open_checkpoint(source), random_tokens(source, 3, 16)


def measuring(fn, front=(), then=lambda value: keep()):
    return chain(front, qlab.bind("measured", fn, then))


def measured(fn, model, data, front=()):
    """What fn returns of the model behind the steps in front."""
    values = []

    def measure(seen):
        values.append(fn(seen))

    assert apply(model, measuring(measure, front), data).resolved
    return values[0]


def directly(family, data):
    """The gradients of the summed losses in the model as transformers builds it."""
    model = tiny(family).float().requires_grad_()
    for ids in data.ids:
        F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.grad for name, p in named if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(family, saved):
    model, data = opened(saved, family)
    seen, around = {}, {}

    def measure(whole):
        def add(of):
            for name, g in of.leaves.items():
                full = f"{of.path}.{name}"
                seen[full] = seen.get(full, 0) + g

        around.update({n: t.clone().requires_grad_() for n, t in whole.around.items()})
        return whole.vjp(whole.nll, sink=add, around=around)

    losses = measured(measure, model, data)
    expected = directly(family, data)
    tied = model.config.get_text_config().tie_word_embeddings
    seen |= {name: t.grad for name, t in around.items() if not (tied and t.shape[0] == 128)}
    blocks = {name for name in expected if ".layers." in name or ".h." in name}
    assert blocks <= seen.keys()
    for name in expected.keys() & seen.keys():
        size = expected[name].abs().max() + 1e-9
        assert (seen[name] - expected[name]).abs().max() <= 1e-4 * size, name
    rows = logits(model, data.ids).float()
    for value, row, ids in zip(losses, rows, data.ids, strict=True):
        assert value == pytest.approx(float(F.cross_entropy(row[:-1], ids[1:])), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_behind_steps_is_what_they_make(family, dtype, saved):
    model, data = opened(saved, family, dtype)
    front = chain(at("lm_head", qlab.outside(rtn(INT8))), gptq(INT4))
    value = apply(model, front, data)

    def measure(whole):
        kl = whole.losses(whole.kl_to(whole.reference))
        return whole.logits(data.ids), whole.reference.logits(data.ids), kl

    seen, reference, kl = measured(measure, model, data, front)
    # windows run one by one here, and experts' products round otherwise then
    assert (seen - logits(value, data.ids)).abs().max() < 1e-5
    assert (reference - logits(model, data.ids)).abs().max() < 1e-5
    assert sum(kl) / len(kl) == pytest.approx(evaluate(value, model, data).kl, rel=1e-4)


def test_changed_segments_are_run_and_their_variables_learn(saved):
    model, data = opened(saved)

    def measure(whole):
        gains = {path: torch.ones((), requires_grad=True) for path in whole.segments}

        def changed(path, graph):
            name = "mlp.down_proj.weight"
            return graph.update({name: graph.params[name] * gains[path]})

        whole.vjp(whole.nll, changed=changed)
        slopes = {path: float(gain.grad) for path, gain in gains.items()}
        for path, gain in gains.items():
            gain.data.fill_(1.05)
            above = sum(whole.losses(whole.nll, changed=changed))
            gain.data.fill_(0.95)
            below = sum(whole.losses(whole.nll, changed=changed))
            gain.data.fill_(1)
            assert (above - below) / 0.1 == pytest.approx(slopes[path], rel=0.05)
        return slopes

    assert all(measured(measure, model, data).values())


def test_a_fold_sees_every_segment_in_order(saved):
    model, data = opened(saved)
    paths = measured(lambda whole: whole.fold(lambda seen, p, g: [*seen, g.path], []), model, data)
    assert paths == ["model.layers.0", "model.layers.1"]


def test_what_takes_the_place_of_a_bind_is_as_if_written_there(saved, tmp_path):
    model, data = opened(saved)
    plain = quantize(model, gptq(INT4), data, tmp_path / "plain")
    recipe = qlab.bind("chosen", lambda whole: 4, lambda bits: gptq(INT4))
    bound = quantize(model, recipe, data, tmp_path / "bound")
    one, other = contents(plain.path), contents(bound.path)
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"qlab.json"}
    assert plain.sites == bound.sites


def test_steps_go_on_from_what_was_measured(saved, tmp_path):
    """The codes in front of a bind are not made again of what the steps behind it change."""
    model, data = opened(saved)
    kept = {}

    def codes(whole):
        def add(seen, path, graph):
            kept[path] = graph.params["mlp.down_proj.weight"].codes
            return seen

        whole.fold(add, None)
        return 0.5

    def damped(by):
        def fn(weight):
            leaf = weight.cell.leaf
            return weight.cell.put(dataclasses.replace(leaf, scales=leaf.scales * by))

        return qlab.each_cell("damped", fn)

    value = apply(model, chain(gptq(INT4), qlab.bind("halved", codes, damped)), data)
    for path, block in value.segments():
        assert torch.equal(block.params["mlp.down_proj.weight"].codes, kept[path])
    written = write(value, tmp_path / "out")
    assert torch.equal(logits(open_checkpoint(written.path), data.ids), logits(value, data.ids))


def test_patterns_around_a_bind_restrict_what_it_returns(saved):
    model, data = opened(saved)
    four = qlab.bind("four", lambda whole: None, lambda none: rtn(INT4))
    value = apply(model, rules({"*.mlp.*": four, "*": rtn(INT8)}), data)
    specs = {name: row["spec"] for name, row in value.plan.sites.items()}
    assert {s for n, s in specs.items() if ".mlp." in n} == {"int4-g16"}
    assert {s for n, s in specs.items() if ".mlp." not in n} == {"int8-channel"}


def test_binds_are_measured_from_the_left(saved):
    model, data = opened(saved)
    order = []

    def at_bits(name, spec):
        def measure(whole):
            losses = whole.losses(whole.kl_to(whole.reference))
            order.append((name, sum(losses) > 0))

        return qlab.bind(name, measure, lambda none: at(f"*.{name}.*", rtn(spec)))

    value = apply(model, chain(at_bits("mlp", INT4), at_bits("self_attn", INT8)), data)
    assert not order  # nothing is measured before the value is used
    assert value.bits_per_weight < 8
    assert order == [("mlp", False), ("self_attn", True)]
    list(value.segments())
    assert len(order) == 2  # and nothing twice


@pytest.mark.parametrize(
    "measure, then, says",
    [
        (lambda m: 1, lambda v: 3, "the bind 'x' returned a int, which is no recipe"),
        (lambda m: 1, lambda v: rtn, "the bind 'x' returned a function, which is no recipe"),
        (lambda m: m, lambda v: keep(), "the bind 'x' measured a Model, by which a run"),
        (lambda m: 1 / 0, lambda v: keep(), "failed in measure: ZeroDivisionError: division"),
        (lambda m: 1, lambda v: v.bits, "failed in then: AttributeError: 'int' object"),
        (lambda m: m.segment("model.layers.7"), lambda v: keep(), "'model.layers.7' is no segment"),
        (lambda m: m.losses(m.nll, [3]), lambda v: keep(), "window 3 is not there; .* 0 to 2"),
        (lambda m: m.losses(m.nll, around={"nope": 1}), keep, "'nope' is no parameter around"),
        (lambda m: m.vjp(lambda x, i: x.sum() * float("nan")), keep, "the loss of window 0 is nan"),
        (lambda m: m.vjp(lambda x, i: x), keep, r"the loss of window 0 is \(16, 128\); return a"),
        (lambda m: m.vjp(lambda x, i: x.detach().sum()), keep, "does not depend on the logits"),
    ],
)
def test_a_bind_that_cannot_go_on_says_why_in_one_sentence(measure, then, says, saved):
    model, data = opened(saved)
    with pytest.raises(QlabError, match=says) as refused:
        list(apply(model, qlab.bind("x", measure, then), data).segments())
    assert "\n" not in str(refused.value)


def test_calibration_text_is_asked_for_where_it_is_measured_on(saved):
    model, _ = opened(saved)
    recipe = qlab.bind("x", lambda m: m.losses(m.nll), lambda v: keep())
    with pytest.raises(QlabError, match="measures on calibration text and none was given"):
        list(apply(model, recipe, None).segments())


def test_what_is_known_is_refused_before_anything_is_measured(saved, tmp_path):
    model, data = opened(saved)
    called = []
    bind = qlab.bind("x", called.append, lambda v: keep())
    for recipe, says in [
        (at("*.nope.*", bind), "matches no site"),
        (chain(rtn(INT4), gptq(INT4), bind), "rounded by two stages"),
    ]:
        with pytest.raises(QlabError, match=says):
            apply(model, recipe, data)
    with pytest.raises(QlabError, match="group"):
        quantize(model, chain(rtn(parse_spec("int4-g48")), bind), data, tmp_path / "out")
    assert not called


def test_a_plan_shows_a_bind_that_is_not_measured(saved):
    model, data = opened(saved)
    recipe = chain(rtn(INT4), qlab.bind("x", lambda m: 1, lambda v: keep(), detail="as it is"))
    plan = qlab.plan(model, recipe, data)
    assert [(row["stage"], row["detail"]) for row in plan.stages][1] == ("x", "as it is")
    assert plan.bits_per_weight < 16


def test_a_continued_run_does_not_mix_two_values(saved, tmp_path):
    model, data = opened(saved)

    def recipe(value):
        behind = at("*.self_attn.*", gptq(INT4))
        return chain(at("*.mlp.*", gptq(INT4)), qlab.bind("x", lambda m: value, lambda v: behind))

    whole = quantize(model, recipe(1), data, tmp_path / "whole")
    names = [row["detail"] for row in whole.plan.stages if row["stage"] == "x"]
    run = partial(quantize, model, recipe(1), data, tmp_path / "out")
    assert finish(start(dying(run, 4, "after"))) == KILLED
    with pytest.raises(QlabError, match="another job"):
        quantize(model, recipe(2), data, tmp_path / "out", resume=True)
    resumed = quantize(model, recipe(1), data, tmp_path / "out", resume=True)
    assert contents(resumed.path) == contents(whole.path)
    assert names[0].startswith("value ")


@pytest.mark.parametrize("inputs", ["quantized", "reference"])
def test_several_recipes_with_binds_are_what_each_is_alone(inputs, saved, tmp_path):
    model, data = opened(saved)
    recipes = {
        "one": qlab.bind("x", lambda m: 4, lambda v: rtn(INT4)),
        "two": chain(gptq(INT4), qlab.bind("y", lambda m: m.losses(m.nll), lambda v: keep())),
    }
    together = compare(model, recipes, data, tmp_path / "all", inputs=inputs)
    for name, recipe in recipes.items():
        alone = quantize(model, recipe, data, tmp_path / name, inputs=inputs)
        assert contents(together[name].path) == contents(alone.path)


def test_values_are_told_apart():
    values = [1, 1.0, "1", None, [1], [[1]], {1: 1}, {"1": 1}, torch.ones(1), torch.ones(1, 1)]
    values += [torch.ones(1).bfloat16(), torch.zeros(1), INT4, INT8, [1, 1], (INT4, "")]
    assert len({digest("x", value) for value in values}) == len(values)
    assert digest("x", {"a": torch.arange(3)}) == digest("x", {"a": torch.arange(3)})


@pytest.mark.parametrize("inputs", ["quantized", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_mask_left_aims_at_the_weight_before_it_behind_a_bind_too(saved, family, inputs):
    model, data = opened(saved, family)
    mask, between = qlab.magnitude("2:4"), qlab.bind("between", lambda m: 1, lambda value: keep())
    alone, behind = (
        apply(model, chain(mask, *parts, gptq(INT4)), data, inputs=inputs)
        for parts in ((), (between,))
    )
    assert torch.equal(logits(behind, data.ids), logits(alone, data.ids))
