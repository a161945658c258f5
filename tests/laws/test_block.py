"""A step that sees a whole block: what it is shown, that it can be differentiated, what it may
return, and that runs are the same bytes, killed or not."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, MIXTURES
from model_folders import contents, random_tokens, refused
from segments import batches_of, samples_of, segment

import qlab
from qlab.algebra.block import SAMPLES, Block, each_block
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import at, chain
from qlab.data.calibration import from_ids
from qlab.driver.batches import push
from qlab.driver.learning import BlockSamples
from qlab.driver.quantize import quantize
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.auto_round import auto_round, auto_round_refine
from qlab.methods.gptq import gptq
from qlab.methods.rtn import rtn

SPEC = parse_spec("int3-g16-asym")
BOTH = chain(gptq(SPEC), auto_round_refine(steps=3, windows=2))


def block_of(seg):
    return Block(segment=seg.graph, samples=samples_of(seg), stats={})


@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_loss_has_the_gradient_of_its_difference(family):
    """In the direction of the gradient of all weights, against a difference quotient."""
    block = block_of(segment(family))
    paths = [site.path for site in block.segment.sites if not site.router]
    noisy = {}
    for i, path in enumerate(paths):
        W = block.weight(path)
        noise = torch.randn(W.shape, generator=torch.Generator().manual_seed(i))
        noisy[path] = (W + 0.2 * W.std() * noise).requires_grad_()
    with torch.enable_grad():
        loss = block.loss(block.put(noisy), range(block.count))
        gradients = torch.autograd.grad(loss, list(noisy.values()))
    size = torch.stack([g.square().sum() for g in gradients]).sum()
    # so small that no token of a mixture changes its expert
    step = 0.001 * loss.detach() / size
    moved = {
        sign: {p: W.detach() + sign * step * g for (p, W), g in zip(noisy.items(), gradients)}
        for sign in (1, -1)
    }
    up, down = (float(block.loss(block.put(moved[s]), range(block.count))) for s in (1, -1))
    assert (up - down) / 2 == pytest.approx(float(step * size), rel=0.01)


def test_what_enters_is_the_calibrated_models_and_the_target_the_references(saved, tmp_path):
    model = open_checkpoint(saved("llama"))
    data = random_tokens(saved("llama"), 3, 16)
    seen = []

    def look(block):
        every = range(block.count)
        assert block.count == 3 and [x.shape[-2] for x in block.rows(every)] == [16] * 3
        ours, theirs = block.outputs(block.segment, every), block.targets(every)
        by_hand = torch.stack([(a - b).square().mean() for a, b in zip(ours, theirs)]).mean()
        loss = block.loss(block.segment, every)
        assert torch.allclose(loss, by_hand)
        seen.append((block.segment.path, block.rows(every), theirs, float(loss.detach())))
        return {}

    quantize(model, chain(each_block("look", look), rtn(SPEC)), data, tmp_path / "out")
    first, second = seen
    assert first[3] < 1e-10, "nothing before the first block is quantized, nor is it"
    assert second[3] > 1e-6, "what enters the second block is not the reference's"
    entering = [float((a - b).abs().max()) for a, b in zip(second[1], first[2])]
    assert min(entering) > 1e-4


def test_a_step_behind_site_by_site_ones_sees_what_they_made(saved, tmp_path):
    source = saved("llama")
    result = quantize(open_checkpoint(source), BOTH, random_tokens(source), tmp_path / "out")
    for row in result.sites.values():
        assert row["spec"] == str(SPEC) and row["block_loss"] <= row["block_loss_before"]
        assert "loss" in row, "the notes of the step before stay"
    plain = quantize(open_checkpoint(source), gptq(SPEC), random_tokens(source), tmp_path / "gptq")
    assert plain.sites.keys() == result.sites.keys()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_same_run_gives_the_same_bytes(family, saved, tmp_path):
    source = saved(family)
    data, model = random_tokens(source), open_checkpoint(source)
    recipe = auto_round(parse_spec("int4-g16"), steps=2, windows=2)
    once, twice = (quantize(model, recipe, data, tmp_path / name) for name in ("a", "b"))
    assert contents(once.path) == contents(twice.path)


def test_experts_without_tokens_keep_their_codes():
    seg = segment("qwen3_moe")
    experts = next(site for site in seg.graph.sites if site.route)
    with torch.no_grad():
        learned, _ = seg.solve(auto_round(SPEC, steps=8, windows=1))
    nearest, _ = seg.solve(rtn(SPEC))
    q, start = learned.params[experts.weight], nearest.params[experts.weight]
    tokens = [m.tokens for m in seg.stats[experts.source, "second_moment"].states]
    changed = [not torch.equal(q.codes[e], start.codes[e]) for e in range(len(tokens))]
    assert any(changed) and not any(c for c, n in zip(changed, tokens) if n == 0)


@pytest.mark.parametrize(
    "made, words",
    [
        (lambda b: {"self_attn.q_proj": b.weight("self_attn.q_proj")[:, 1:]}, "keep its shape"),
        (lambda b: {"self_attn.q_proj": b.weight("self_attn.q_proj") / 0}, "NaN or Inf"),
        (lambda b: {"self_attn.q_porj": b.weight("self_attn.q_proj")}, "it has self_attn.q_proj"),
        (lambda b: b.weight("mlp.q_proj"), "name a site of the segment"),
        (lambda b: [1, 2], "return a mapping of site paths"),
        (lambda b: ({}, {"loss": 1.0}), "choose another name"),
        (lambda b: ({}, {"odd": torch.ones(1)}), "note numbers and texts"),
        (lambda b: {"input_layernorm.weight": torch.ones(3)}, "keep its shape"),
    ],
)
def test_what_a_step_may_not_return_is_refused_by_name(made, words):
    with pytest.raises(QlabError, match=words):
        segment("llama").solve(each_block("mine", made))


def test_codes_off_their_grid_are_refused_by_name():
    seg = segment("llama")
    rounded, _ = seg.solve(rtn(parse_spec("int3-g16")))

    def shifted(block):
        q = block.segment.params["mlp.up_proj.weight"]
        return {"mlp.up_proj": replace(q, codes=q.codes + 2)}

    with pytest.raises(QlabError, match=r"mlp\.up_proj\.weight with codes off the grid int3-g16"):
        seg.solve(each_block("mine", shifted), rounded)


def test_a_step_that_writes_to_the_block_is_refused_by_name():
    def writes(block):
        with torch.no_grad():
            block.segment.params["mlp.up_proj.weight"].mul_(1.0)
        return {}

    with pytest.raises(QlabError, match=r"mine.*writes to model\.layers\.0\.mlp\.up_proj\.weight"):
        segment("llama").solve(each_block("mine", writes))


def test_learning_without_samples_codes_or_steps_is_refused(saved, tmp_path):
    model = open_checkpoint(saved("llama"))
    data = random_tokens(saved("llama"))
    refused(
        lambda: quantize(model, auto_round(SPEC), None, tmp_path / "a"),
        "no calibration text was given",
    )
    with pytest.raises(QlabError, match="steps is -1"):
        auto_round(SPEC, steps=-1)
    with pytest.raises(QlabError, match=r"lr 2\.0"):
        qlab.auto_round(SPEC, lr=2.0)
    recipe = chain(auto_round_refine(1), rtn(SPEC))
    with pytest.raises(QlabError, match=r"no codes to refine in model\.layers\.0"):
        quantize(model, recipe, data, tmp_path / "b")


def test_learning_that_diverges_keeps_the_best_and_says_so():
    from qlab.algebra.learn import Version, learn
    from qlab.algebra.windows import Schedule

    seg = segment("llama")

    def explode(block):
        W = block.weight("mlp.up_proj").requires_grad_()

        def update(left):
            with torch.no_grad():
                W.mul_(1e25)

        def version():
            return Version({"mlp.up_proj": W * 1.0}, {"mlp.up_proj": W.detach().clone()})

        return learn(block, version, update, Schedule(steps=9, windows=1))

    with pytest.warns(UserWarning, match=r"explode diverged at step \d, and the best"):
        graph, _ = seg.solve(each_block("explode", explode))
    note = graph.notes["mlp.up_proj"]
    assert note["diverged_at_step"] <= 3 and note["kept_step"] == 0
    assert torch.equal(graph.params["mlp.up_proj.weight"], seg.graph.params["mlp.up_proj.weight"])


@pytest.mark.parametrize("steps, windows", [(1, 1), (4, 1), (9, 2), (30, 3)])
def test_looking_at_the_whole_loss_takes_half_as_long_as_steps_at_most(steps, windows):
    """A window forward and backward counts as three forward. The last step is always looked at."""
    seg, runs = segment("llama"), {True: 0, False: 0}

    class Counted(BlockSamples):
        def leaving(self, graph, i):
            runs[torch.is_grad_enabled()] += 1
            return super().leaving(graph, i)

    samples = Counted(seg.graph, [list(batches_of(seg)())])
    (stage,) = auto_round(SPEC, steps=steps, windows=windows)
    stage.apply(seg.graph, {**seg.stats, SAMPLES: samples})
    assert runs[True] == steps * windows
    first_and_last = 2 * samples.count
    assert first_and_last <= runs[False] <= max(first_and_last, samples.count + 1.5 * runs[True])
    assert runs[False] <= 9 * samples.count


def test_what_leaves_the_reference_is_computed_once():
    """Kept targets and fresh ones are the states of a pass, bit for bit."""
    seg = segment("qwen3_moe")
    samples = samples_of(seg)
    samples.wanted(1)
    passed = push(seg.graph, batches_of(seg)())
    for i, ((kept,), (state,)) in enumerate(
        zip(samples.reference_leaving(range(samples.count)), passed, strict=True)
    ):
        assert torch.equal(kept, state) and (kept is samples.targets.get(i)) == (i == 1)


def test_a_rule_learns_some_sites_and_leaves_the_others(saved, tmp_path):
    source = saved("llama")
    recipe = at("*.mlp.*", auto_round(SPEC, steps=1, windows=1))
    result = quantize(open_checkpoint(source), recipe, random_tokens(source), tmp_path / "out")
    assert {name for name, row in result.sites.items() if row["spec"]} == {
        name for name in result.sites if ".mlp." in name
    }


def test_windows_of_one_length_or_another_are_learned_from(saved, tmp_path):
    model = open_checkpoint(saved("llama"))
    one = from_ids(model, torch.arange(3, 11).view(1, 8))
    result = quantize(model, auto_round(SPEC, steps=1), one, tmp_path / "out")
    assert all("block_loss" in row for row in result.sites.values())
