"""Traced programs are shared by segments that are alike, and by no others."""

import shutil
from collections import OrderedDict
from functools import partial

import pytest
import torch
from families import tiny
from torch import nn

import qlab
from qlab.algebra.interpret import interpret
from qlab.algebra.tracing import programs
from qlab.algebra.tracing.programs import program
from qlab.algebra.tracing.trace import trace
from qlab.files.checkpoint import open_checkpoint
from qlab.model.loading import load_outside
from qlab.model.running import record_blocks
from qlab.model.skeleton import Skeleton

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traced(monkeypatch):
    """The paths that were traced, from no program on."""
    paths = []

    def counted(segment, args, kwargs, path, untraced):
        paths.append(path)
        return trace(segment, args, kwargs, path, untraced)

    monkeypatch.setattr(programs, "trace", counted)
    monkeypatch.setattr(programs, "_kept", OrderedDict())
    monkeypatch.setattr(programs, "_untraced", OrderedDict())
    return paths


class Block(nn.Module):
    """What it computes depends on attributes of every kind."""

    def __init__(self, **attributes):
        super().__init__()
        self.up = nn.Linear(4, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return act(self, self.up(x)) * self.factors["last"][-1]


def act(block, x):
    return block.act(x)


def scaled(x, by):
    return torch.sigmoid(x) * by


def block(**changed):
    alike = {"act": torch.relu, "factors": {"last": [1.0, 2.0]}}
    return Block(**(alike | changed)).eval()


def agrees(module, x=X):
    """Whether the program that a module is given computes what the module does."""
    graph = trace(module, (x,), {})
    shared = type(graph)(program(module, (x,), {}, "block"), graph.params)
    return torch.equal(interpret(shared, (x,), {}), module(x))


def test_a_model_that_is_opened_again_is_not_traced_again(traced, saved, text, tmp_path):
    source = saved("llama")
    again = shutil.copytree(source, tmp_path / "copy")
    data = qlab.tokens(qlab.open(source), [text], samples=2, length=16)
    qlab.quantize(qlab.open(source), qlab.rtn(qlab.parse_spec("int4-g32")), data, tmp_path / "out")
    once = list(traced)
    for place in (source, again, tmp_path / "out"):
        qlab.evaluate(qlab.open(place), qlab.open(place), data)
    assert len(once) == 1 and traced == once


@pytest.fixture
def code(saved):
    """code(**config): the program of the one block of such a model, opened anew."""

    def opened(**config):
        one_block = saved("gemma2", num_hidden_layers=1, layer_types=None, **config)
        skeleton = Skeleton(open_checkpoint(one_block), torch.float32)
        load_outside(skeleton, with_head=False)
        _, calls = record_blocks(skeleton, torch.arange(3, 15)[None])
        return next(skeleton.programs.code(path, call) for path, call in calls.items())

    return opened


def test_values_of_a_config_keep_programs_apart(traced, code):
    changes = [
        {},
        {"hidden_activation": "relu"},
        {"rms_norm_eps": 1e-3},
        {"query_pre_attn_scalar": 7},
    ]
    assert len({code(**change) for change in changes}) == len(changes) == len(traced)
    assert len({code(**change) for change in changes[:2]}) == 2 and len(traced) == len(changes)


def test_a_function_of_the_model_library_that_was_replaced_keeps_programs_apart(
    traced, code, monkeypatch
):
    before = code()
    turned = "transformers.models.gemma2.modeling_gemma2.apply_rotary_pos_emb"
    monkeypatch.setattr(turned, lambda q, k, cos, sin: (q * cos, k * sin))
    assert code() is not before and len(traced) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"act": torch.tanh},
        {"act": lambda x: x},
        {"act": partial(scaled, by=2.0)},
        {"act": nn.LeakyReLU(0.1)},
        {"factors": {"last": [1.0, 3.0]}},
        {"factors": {"last": [2, 1]}},
        {"factors": {"last": torch.tensor([1.0, 4.0]).tolist()}},
    ],
)
def test_an_attribute_of_any_kind_keeps_programs_apart(traced, changed):
    assert agrees(block()) and agrees(block(**changed)) and agrees(block())
    assert len(traced) == 2


@pytest.mark.parametrize(
    "one, other",
    [
        (partial(scaled, by=2.0), partial(scaled, by=3.0)),
        (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
        (nn.Softmax(-1), nn.Softmax(-2)),
    ],
)
def test_objects_of_one_class_are_told_apart_by_what_they_hold(traced, one, other):
    assert agrees(block(act=one)) and agrees(block(act=other)) and len(traced) == 2
    assert agrees(block(act=one)) and len(traced) == 2


def test_a_function_that_was_replaced_keeps_programs_apart(traced, monkeypatch):
    assert agrees(block())
    monkeypatch.setattr(f"{__name__}.act", lambda block, x: torch.tanh(x))
    assert agrees(block())
    monkeypatch.setattr(Block, "forward", lambda self, x: self.up(x) * 3)
    assert agrees(block()) and len(traced) == 3


def test_modules_that_swap_what_they_use_have_programs_of_their_own(traced):
    class Two(nn.Module):
        def __init__(self, turned):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.order = lambda a, b: (b, a) if turned else (a, b)

        def forward(self, x):
            first, second = self.order(self.a, self.b)
            return second(torch.relu(first(x)))

    assert agrees(Two(False)) and agrees(Two(True)) and len(traced) == 2


def test_a_weight_that_two_modules_share_keeps_programs_apart(traced):
    class Two(nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a, self.b, self.up = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)
            if tied:
                self.b.weight = self.a.weight

        def forward(self, x):
            return self.up(self.b(self.a(x)))

    assert agrees(Two(False)) and agrees(Two(True)) and len(traced) == 2


def test_a_branch_on_the_length_keeps_programs_apart(traced):
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x):
            return self.up(x) * (2 if x.shape[1] > 5 else 1)

    short = Short()
    assert agrees(short) and agrees(short, X.repeat(1, 2, 1)) and len(traced) == 2


@pytest.mark.parametrize("factor, programs_wanted", [("1.0", 1), ("1.0 + self.layer_idx", 3)])
def test_blocks_share_a_program_unless_their_own_index_matters(traced, factor, programs_wanted):
    class Numbered(nn.Module):
        def __init__(self, layer_idx):
            super().__init__()
            self.layer_idx, self.up = layer_idx, nn.Linear(4, 4)

        def forward(self, x):
            return self.up(x) * eval(factor)

    codes = {program(Numbered(i), (X,), {}, f"h.{i}", index=i) for i in range(3)}
    assert len(codes) == programs_wanted == len(traced)


def test_what_the_caller_left_on_keeps_programs_apart(traced):
    plain = program(block(), (X,), {}, "block")
    with torch.autocast("cpu", torch.bfloat16):
        assert program(block(), (X,), {}, "block") is not plain
    assert program(block(), (X,), {}, "block") is plain


def test_programs_are_kept_in_bounded_number_the_ones_used_last(traced, monkeypatch):
    monkeypatch.setattr(programs, "KEPT", 2)
    for factor in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):  # 2 was used before 1 when 3 came
        program(block(factors={"last": [factor]}), (X,), {}, str(factor))
    assert traced == ["1.0", "2.0", "3.0", "2.0"] and len(programs._kept) == 2


def test_a_segment_that_does_not_trace_is_refused_every_time(traced):
    class Asking(nn.Module):
        def forward(self, x):
            raise ValueError("asked too much")

    for _ in range(2):
        with pytest.raises(qlab.QlabError, match=r"h.0 \(Asking\) cannot be traced"):
            program(Asking(), (X,), {}, "h.0")


def test_a_config_that_differs_in_its_origin_alone_shares_programs():
    configs = [tiny("llama").config for _ in range(2)]
    configs[0]._name_or_path = "elsewhere"
    looks = [
        programs._Look(nn.Identity(), -1, frozenset({"_name_or_path"}))(config)
        for config in configs
    ]
    assert looks[0] == looks[1] and hash(looks[0]) == hash(looks[1])


def test_what_cannot_be_traced_is_tried_once(traced):
    class ByValue(Block):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    codes = {
        program(ByValue(act=torch.relu, factors={"last": [2.0]}).eval(), (X,), {}, "block")
        for _ in range(3)
    }
    assert len(codes) == len(traced) == 1
    graph = trace(block(), (X,), {})
    module = ByValue(act=torch.relu, factors={"last": [3.0]}).eval()
    other = type(graph)(program(module, (X,), {}, "block"), dict(module.named_parameters()))
    for x in (X, -X):
        assert torch.equal(interpret(other, (x,), {}), module(x))
    assert len(traced) == 2


def test_what_cannot_be_traced_while_a_function_is_replaced_is_traced_again_afterwards(traced):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Block, "forward", lambda self, x: self.up(x) * int(x.sum()))
        assert program(block(), (X,), {}, "block").unread
    for _ in range(2):
        assert not program(block(), (X,), {}, "block").unread
    assert agrees(block()) and len(traced) == 2
