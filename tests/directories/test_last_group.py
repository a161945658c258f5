"""A last group of channels that is not full, as AutoGPTQ writes it: read by every door, and
converted where the format has it."""

import json

import pytest
import torch
from families import tiny
from model_folders import tensors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import qlab
from qlab.algebra.qtensor import QTensor, dense
from qlab.algebra.spec import Int, Tile
from qlab.codecs import CODECS
from qlab.errors import QlabError
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint

SPEC = Int(4, Tile(1, 48), True, torch.float16)
IDS = torch.arange(3, 19)[None]


def coded_as(W_ok):
    """Random codes in the shape of a weight."""
    o, k = W_ok.shape
    codes = torch.randint(
        -8, 8, (o, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8
    )
    scales = torch.linspace(0.01, 0.03, o * -(-k // 48)).view(o, -1).half()
    return QTensor(codes, scales, None, SPEC)


@pytest.fixture(scope="module")
def coded_and_plain(tmp_path_factory):
    """A directory with codes in groups of 48 channels, of 64 and of 144, and it with dense
    weights."""
    model = tiny("llama", intermediate_size=144).half()
    folders = [tmp_path_factory.mktemp(name) for name in ("codes", "dense")]
    linears = [
        n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    plain = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in linears}
    leaves = {path: coded_as(model.get_submodule(path).weight) for path in linears}
    coded = {
        name: t
        for path, leaf in leaves.items()
        for name, t in CODECS["gptq"].encode(path, leaf).items()
    }
    for folder, entries in zip(
        folders,
        (coded, {f"{path}.weight": dense(leaf, torch.float32) for path, leaf in leaves.items()}),
    ):
        said = (
            {
                "quantization_config": CODECS["gptq"].config(
                    dict.fromkeys(linears, SPEC) | {"lm_head": None}
                )
            }
            if entries is coded
            else {}
        )
        (folder / "config.json").write_text(
            json.dumps(model.config.to_dict() | said | {"dtype": "float16"})
        )
        save_file(
            {n: t.contiguous() for n, t in (plain | entries).items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    return folders


def test_every_door_reads_it(coded_and_plain, door):
    coded, plain = coded_and_plain
    assert (
        qlab.evaluate(qlab.open(coded), qlab.open(plain), qlab.from_ids(qlab.open(plain), IDS)).kl
        < 1e-9
    )
    right = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(IDS).logits
    with pytest.warns(UserWarning, match="no kernel takes the codes"):
        ours = qlab.lower(coded, dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(coded, dtype=torch.float32)
    for model in (ours, theirs):
        assert (model(IDS).logits - right).norm() < 1e-4 * right.norm()
    assert str(open_checkpoint(coded).quantized["model.layers.0.mlp.down_proj"]) == "int4-g48"


def test_it_is_converted_where_the_format_has_it_and_refused_elsewhere(coded_and_plain, tmp_path):
    coded, _ = coded_and_plain
    there = open_checkpoint(qlab.convert(coded, "gptq_v2", tmp_path / "v2").path)
    here = open_checkpoint(coded)
    assert all(
        fingerprint(there.leaf(f"{m}.weight")) == fingerprint(here.leaf(f"{m}.weight"))
        for m in here.quantized
    )
    assert qlab.verify(there, here).faults == []
    for codec in ("compressed-tensors", "awq"):
        with pytest.raises(QlabError, match=r"groups of 48 do not divide"):
            qlab.convert(coded, codec, tmp_path / codec)
        assert not (tmp_path / codec).exists()
    again = qlab.convert(
        coded, "compressed-tensors", tmp_path / "again", requantize=qlab.parse_spec("int8-g16")
    )
    assert len(again.requantized) == 14 and "model.layers.1.mlp.down_proj.weight_packed" in tensors(
        again.path
    )


def test_weights_are_not_rounded_to_it(saved, tmp_path):
    with pytest.raises(QlabError, match="groups of 48 do not divide"):
        qlab.quantize(
            qlab.open(saved()),
            qlab.rtn(qlab.parse_spec("int4-g48")),
            None,
            tmp_path / "out",
            codec="gptq",
        )
