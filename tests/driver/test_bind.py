"""A measurement of the whole model whose value becomes the next part of a recipe."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from families import tiny
from model_folders import contents, random_tokens

import qlab
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain, keep, rules
from qlab.driver.apply import apply
from qlab.driver.quantize import quantize
from qlab.driver.write import write
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
