"""A lowered linear is an nn.Linear to code that knows those, whose weight may be read and never
written; copies compute the same."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from families import tiny
from library import write_with_the_library
from lowering_cases import activations, coded, lowered, random_leaf
from rotations import CASES
from test_coded import leaf_of
from torch import nn

import qlab
from qlab.algebra.qtensor import dense
from qlab.algebra.spec import Int, Tile, parse_spec
from qlab.algebra.transform import chain
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint
from qlab.methods.inputs import quantize_inputs
from qlab.methods.rtn import rtn

IDS = torch.arange(3, 15)[None]


PACKED = lowered(random_leaf(50, 64, Int(4, Tile(1, 32))), torch.float32)
CODED = coded(leaf_of(parse_spec("fp8-channel"), 50, 64), torch.float32)
linears = pytest.mark.parametrize("module", [PACKED, CODED], ids=["packed", "coded"])


@linears
def test_its_weight_is_read_as_a_tensor(module):
    assert isinstance(module, nn.Linear) and (module.out_features, module.in_features) == (
        50,
        64,
    ) == tuple(module.weight.shape)
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, module.dequantized())
    product = activations(3, 64, torch.float32) @ module.weight.T
    assert type(product) is torch.Tensor and not list(module.parameters())
    module.weight.requires_grad = False  # as everybody freezes a model, and true already
    assert type(copy.deepcopy(module).weight + 1) is torch.Tensor


@pytest.mark.parametrize(
    "write",
    [
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(50, 64))),
        lambda m: m.weight.add_(1),
        lambda m: setattr(m.weight, "data", torch.zeros(50, 64)),
        lambda m: m.weight.data.mul_(2),
        lambda m: m.weight.T.zero_(),
        lambda m: m.weight.__setitem__(0, 1),
        lambda m: torch.add(m.weight, 1, out=m.weight),
        lambda m: nn.init.normal_(m.weight),
        lambda m: setattr(m.weight, "requires_grad", True),
        lambda m: m.reset_parameters(),
        lambda m: m.weight.view(-1)[3:].fill_(0),
    ],
)
@linears
def test_what_would_be_lost_is_refused(module, write):
    with pytest.raises(
        QlabError, match="a quantized weight is held as codes and cannot be assigned or changed"
    ):
        write(module)


class Adapter(nn.Module):
    """What adapters are: a linear, and a product of low rank beside it in the linear's own dtype
    and place."""

    def __init__(self, base):
        super().__init__()
        assert isinstance(base, nn.Linear)
        self.base = base
        place = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.down, self.up = (
            nn.Linear(base.in_features, 2, False, **place),
            nn.Linear(2, base.out_features, False, **place),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrapped(model):
    torch.manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(("q_proj", "down_proj")):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, Adapter(module))
    return model.requires_grad_(False)


def trained(model):
    learned = {
        name: p.requires_grad_()
        for name, p in model.named_parameters()
        if ".up." in name or ".down." in name
    }
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in learned.items()}


def test_adapters_wrapped_around_it_learn_as_on_dense_weights(saved, tmp_path):
    result = qlab.quantize(
        open_checkpoint(saved()), rtn(parse_spec("int4-g32")), None, tmp_path / "out"
    )
    model, plain = qlab.lower(result, dtype=torch.float32, dense_cache=True), tiny("llama")
    plain.load_state_dict(
        {name: model.get_submodule(name.rpartition(".")[0]).weight for name in plain.state_dict()}
    )
    with torch.enable_grad():
        learned, expected = trained(wrapped(model)), trained(wrapped(plain))
    assert len(learned) == 8 and learned.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(learned[name], grad, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def models(saved, tmp_path_factory):
    """One of every kind of module that `lower` makes."""
    folder = tmp_path_factory.mktemp("models")
    recipes = {
        "int4": ("llama", rtn(parse_spec("int4-g32"))),
        "experts": ("mixtral", rtn(parse_spec("int4-g32"))),
        "coded experts": ("qwen3_moe", rtn(parse_spec("nvfp4"))),
        "rounded": (
            "llama",
            chain(rtn(parse_spec("int8-channel")), quantize_inputs(parse_spec("int8-channel"))),
        ),
    }
    for name, (family, recipe) in recipes.items():
        qlab.quantize(open_checkpoint(saved(family)), recipe, None, folder / name)
    write_with_the_library(
        tiny("llama"), folder / "rotated", transforms=CASES["inputs and outputs"]
    )
    return folder


KINDS = ["int4", "experts", "coded experts", "rounded", "rotated"]


@pytest.mark.filterwarnings("ignore:no .*kernel")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_computes_the_same(kind, again, models):
    model = qlab.lower(models / kind, dtype=torch.float32)
    expected, second = model(input_ids=IDS).logits, again(model)
    del model
    assert torch.equal(second(input_ids=IDS).logits, expected)


def test_a_pickled_model_runs_in_another_process(models, tmp_path):
    model = qlab.lower(models / "experts", dtype=torch.float32, dense_cache=True)
    torch.save(model, tmp_path / "model.pt")
    code = (
        f"import torch; model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "print(model(input_ids=torch.arange(3, 15)[None]).logits.double().norm().item())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(
        model(input_ids=IDS).logits.double().norm().item(), rel=1e-6
    )


def test_the_dense_copy_is_of_the_copied_codes():
    module = lowered(random_leaf(50, 64, Int(4, Tile(1, 32))), torch.float32, dense_cache=True)
    second = copy.deepcopy(module)
    assert second.dense is not module.dense
    assert torch.equal(second.dense, dense(random_leaf(50, 64, Int(4, Tile(1, 32))), torch.float32))
