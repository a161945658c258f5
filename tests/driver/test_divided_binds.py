"""Ranks that divide the windows of a bind learn, to the bit, what one process learns."""

import pytest
import torch
import torch.distributed as dist
from model_folders import contents, random_tokens
from ranks import LENGTH, run_ranks

import qlab
from qlab.algebra.bind import Foreseen
from qlab.algebra.online import Multiply
from qlab.algebra.spec import parse_spec
from qlab.algebra.transform import chain, keep
from qlab.driver import batches
from qlab.driver.bound import resolved
from qlab.driver.job import Job
from qlab.driver.quantize import quantize
from qlab.driver.ranks import together
from qlab.errors import QlabError, ToldElsewhere
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.allocate import allocate
from qlab.methods.guidedquant import guidedquant
from qlab.methods.kl_tune import kl_tune
from qlab.methods.qat_end_to_end import qat_end_to_end
from qlab.methods.rtn import rtn
from qlab.methods.spinquant import spinquant

INT4 = parse_spec("int4-g16")
RECIPES = {
    "kl_tune": lambda: chain(rtn(INT4), kl_tune(steps=2, windows=3)),
    "qat_end_to_end": lambda: chain(rtn(INT4), qat_end_to_end(steps=1, windows=1)),
    "spinquant": lambda: chain(spinquant(INT4, steps=1), rtn(INT4)),
    "guidedquant": lambda: guidedquant(INT4, groups=2),
    "allocate": lambda: allocate([rtn(parse_spec(f"int{bits}-g16")) for bits in (3, 4, 8)], 7),
}
CASES = [*(("llama", name, 5) for name in RECIPES), ("qwen3_moe", "kl_tune", 5)]
FEW = [("llama", "kl_tune", 2)]  # a window to learn from, and one held out


def written(folders, cases, out):
    batches.BATCH_TOKENS = LENGTH
    for family, name, samples in cases:
        source = folders[family]
        data = random_tokens(source, samples=samples, length=LENGTH)
        quantize(open_checkpoint(source), RECIPES[name](), data, out / f"{family}-{name}-{samples}")


def of_rank(rank, folders, cases, out):
    written(folders, cases, out)


@pytest.fixture
def folders(saved, monkeypatch):
    monkeypatch.setattr(batches, "BATCH_TOKENS", LENGTH)
    return {family: saved(family) for family in ("llama", "qwen3_moe")}


def test_one_two_and_three_ranks_write_what_they_learned_alike(folders, tmp_path):
    written(folders, [*CASES, *FEW], tmp_path / "alone")
    for world, cases in ((2, CASES), (3, FEW)):
        out = tmp_path / str(world)
        assert run_ranks(tmp_path, world, of_rank, folders, cases, out) == [None] * world
        assert len(list(out.iterdir())) == len(cases)
        for path in out.iterdir():
            assert contents(path) == contents(tmp_path / "alone" / path.name), (world, path.name)


# ------------------------------------------------------------------ what a bind of one's own sees
WINDOWS = 18  # in parts of two


def gradients(model):
    """All that a pass computes: logits, losses, gradients of numbers inside the segments, in their
    operations and around them, what a sink notes, and the error of one window."""
    gain = torch.ones((), dtype=torch.float32, requires_grad=True)
    scale = Multiply(torch.ones(64, dtype=torch.float32, requires_grad=True))
    around = {n: t.clone().requires_grad_() for n, t in model.around.items()}
    noted = {path: [] for path in model.segments}

    def changed(path, graph):
        name = "mlp.down_proj.weight"
        graph = graph.update({name: graph.params[name] * gain})
        return graph.inserting("mlp.up_proj:in", scale)

    def sink(of):
        noted[of.path].append((of.window, {n: float(g.sum()) for n, g in of.leaves.items()}))

    def bad(logits, window):
        return logits.sum() * (torch.nan if window in (7, 12) else 1.0)

    order = list(reversed(range(WINDOWS)))
    said = []
    for fails in (model.losses, model.vjp):
        with pytest.raises(QlabError) as error:
            fails(bad, order)
        said.append(str(error.value))
    losses = model.vjp(model.kl_to(model), changed=changed)
    of_text = model.vjp(model.nll, order, changed=changed, around=around)
    model.vjp(model.nll, sink=sink)
    return {
        "said": said,
        "losses": [losses, of_text, model.losses(model.nll, order)],
        "logits": model.logits(model.data.ids[:3]),
        "gradients": [gain.grad, scale.m_k.grad, *(t.grad for t in around.values())],
        "noted": {path: model.of_all_windows(of_path) for path, of_path in noted.items()},
    }


def measured(rank, source):
    """What a divided bind measures on a rank."""
    values = []

    def measure(model):
        values.append(gradients(model))
        return 0

    recipe = chain(qlab.bind("mine", measure, lambda value: keep(), divided=True), rtn(INT4))
    data = random_tokens(source, samples=WINDOWS, length=LENGTH)
    with together("cpu") as ranks:
        assert resolved(Job(model=open_checkpoint(source), recipe=recipe, data=data), ranks)
    return values[0]


def same(a, b):
    """Whether values are the same, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_pass_computes_the_same_bits_on_three_ranks(saved, tmp_path):
    source = saved("llama")
    alone = measured(0, source)
    assert all("window 12 is nan" in said for said in alone["said"])
    assert all(t is not None and t.isfinite().all() for t in alone["gradients"])
    for value in run_ranks(tmp_path, 3, measured, source):
        assert not isinstance(value, BaseException), value
        assert not [name for name in alone if not same(alone[name], value[name])]


def refusals(rank, source, out):
    """What is said of binds that ranks cannot divide."""
    said = []
    data = random_tokens(source, samples=3, length=LENGTH)
    for measure in (of_own_windows, other_tensors):
        recipe = qlab.bind("mine", measure, lambda value: rtn(INT4), divided=True)
        try:
            quantize(open_checkpoint(source), recipe, data, out / measure.__name__)
        except QlabError as error:
            said.append((type(error), str(error)))
    return said


def of_own_windows(model):
    seen = []
    model.vjp(model.nll, sink=lambda of: seen.append(of.window))
    return seen


def other_tensors(model):
    """On each rank one tensor more than on the rank before it."""
    gains = [
        torch.ones((), dtype=torch.float32, requires_grad=True) for _ in range(1 + dist.get_rank())
    ]

    def changed(path, graph):
        name = "mlp.down_proj.weight"
        return graph.update({name: graph.params[name] * sum(gains)})

    model.vjp(model.nll, changed=changed)


def test_ranks_that_measure_something_else_are_refused(saved, tmp_path):
    first, second = run_ranks(tmp_path, 2, refusals, saved("llama"), tmp_path / "out")
    assert [kind for kind, _ in first] == [QlabError] * 2, first
    assert [kind for kind, _ in second] == [ToldElsewhere] * 2, second
    assert "rank 1 measured another value than rank 0" in first[0][1]
    assert "learns tensors [(), ()] on rank 1, and [()] on rank 0" in first[1][1]


# ------------------------------------------------------------------ what a plan says of it
def test_a_plan_divides_the_windows_of_a_step_and_no_bind_of_ones_own(saved):
    source = saved("llama")
    data = random_tokens(source, samples=16, length=LENGTH)
    mine = qlab.bind("mine", print, print, foresee=lambda outline: Foreseen(forward=16, kept=16))
    recipe = chain(mine, rtn(INT4), kl_tune(steps=4, windows=2))
    plans = {n: qlab.plan(source, recipe, data, ranks=n) for n in (1, 2, 8)}
    costs = {n: {e.stage: e for e in plans[n].expenses} for n in plans}
    for n, at_most in ((1, 1), (2, 1 / 2), (8, 1 / 2)):
        one, whole = costs[n]["mine measured"], costs[n]["kl_tune measured"]
        assert one.slowest == one.operations and not one.sent
        assert 1 / n <= whole.slowest / whole.operations <= at_most
        assert bool(whole.sent) == (n > 1)
    turned = {n: qlab.plan(source, RECIPES["spinquant"](), data, ranks=n).memory for n in (1, 2)}
    assert turned[2]["states between blocks"] < turned[1]["states between blocks"]


def traffic(rank, source):
    """What a rank sent while SpinQuant was measured."""
    data = random_tokens(source, samples=5, length=LENGTH)
    job = Job(model=open_checkpoint(source), recipe=RECIPES["spinquant"](), data=data)
    with together("cpu") as ranks:
        assert resolved(job, ranks)
        return ranks.sent_bytes


def test_a_plan_says_what_ranks_send_each_other_of_gradients(saved, tmp_path):
    source = saved("llama")
    sent = run_ranks(tmp_path, 2, traffic, source)
    data = random_tokens(source, samples=5, length=LENGTH)
    planned = qlab.plan(source, RECIPES["spinquant"](), data, ranks=2)
    (measuring,) = [e for e in planned.expenses if e.stage == "spinquant measured"]
    assert sum(sent) == pytest.approx(measuring.sent, rel=0.15)
