"""The verification at the end of every run: what would load as garbage is refused by name, and no
honest run is."""

from dataclasses import replace

import pytest
import torch
from model_folders import random_tokens, refused

import qlab
from qlab.codecs import CODECS
from qlab.driver import quantize as driver
from qlab.driver import run
from qlab.files import shardwise
from qlab.files.checkpoint import open_checkpoint
from qlab.files.directory import read_header
from qlab.files.tensors import Spool, write
from qlab.methods.inputs import quantize_inputs

ASYMMETRIC = qlab.parse_spec("int4-g32", symmetric=False)


def quantize(path, out, codec="compressed-tensors", spec=ASYMMETRIC):
    return driver.quantize(open_checkpoint(path), qlab.rtn(spec), None, out, codec=codec)


def assert_nothing_stays(folder):
    assert not (folder / "out").exists()
    assert not list(folder.rglob("*.safetensors"))


def planted(monkeypatch, name, fault):
    """The codec, with an encode whose tensors went through fault(module, tensors)."""
    codec = CODECS[name]

    def encode(path, leaf, *ops):
        return fault(path, codec.encode(path, leaf, *ops))

    monkeypatch.setitem(CODECS, name, replace(codec, encode=encode))


def swapped_nibbles(path, tensors):
    def swap(t):
        low, high = t.view(torch.uint8) & 15, t.view(torch.uint8) >> 4
        return (high | low << 4).view(torch.int32)

    return {
        name: swap(t) if name.endswith(("packed", "qweight")) else t for name, t in tensors.items()
    }


def transposed(path, tensors):
    def turn(t):
        return t.mT.contiguous().reshape(t.shape)

    return {
        name: turn(t) if name.endswith(("packed", "qweight")) else t for name, t in tensors.items()
    }


def zero_off_by_one(path, tensors):
    return {
        name: t + 1 if name.endswith(("zero_point", "qzeros")) else t for name, t in tensors.items()
    }


def scales_of_the_module_before():
    kept = {}

    def fault(path, tensors):
        name = next(name for name in tensors if name.endswith(("scale", "scales")))
        before = kept.get(tensors[name].shape, tensors[name])
        kept[tensors[name].shape] = tensors[name]
        return tensors | {name: before}

    return fault


FAULTS = {
    "nibbles": lambda: swapped_nibbles,
    "transposed": lambda: transposed,
    "zero": lambda: zero_off_by_one,
    "scales": scales_of_the_module_before,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("codec", ["compressed-tensors", "gptq_v2", "awq"])
def test_a_codec_that_writes_garbage_is_refused_by_name(codec, fault, saved, tmp_path, monkeypatch):
    planted(monkeypatch, codec, FAULTS[fault]())
    refused(
        lambda: quantize(saved("llama", torch.float16), tmp_path / "out", codec),
        "self_attn.",
        "does not read back",
    )
    assert_nothing_stays(tmp_path)


@pytest.mark.parametrize("pair", [("gate_proj", "up_proj"), ("input_", "post_attention_")])
def test_weights_under_each_others_names_are_refused(pair, saved, tmp_path, monkeypatch):
    """Every tensor reads back as it was written; only the forward pass tells."""
    real = run.as_stored

    def swapped(skeleton, graph):
        leaves, (one, other) = real(skeleton, graph), pair
        return {
            name: leaves[name.replace(one, "#").replace(other, one).replace("#", other)]
            for name in leaves
        }

    monkeypatch.setattr(run, "as_stored", swapped)
    refused(
        lambda: quantize(saved("llama"), tmp_path / "out"),
        "model.layers.0 computes other numbers",
    )
    assert_nothing_stays(tmp_path)


def test_a_configuration_that_says_another_grid_is_refused(saved, tmp_path, monkeypatch):
    codec = CODECS["compressed-tensors"]

    def config(specs, *others):
        wrong = {name: spec and qlab.parse_spec("int8-g32") for name, spec in specs.items()}
        return codec.config(wrong, *others)

    monkeypatch.setitem(CODECS, "compressed-tensors", replace(codec, config=config))
    refused(
        lambda: quantize(saved("llama"), tmp_path / "out"),
        "config.json makes the weights of model.layers.0.mlp.down_proj int8-g32",
    )
    assert_nothing_stays(tmp_path)


def test_a_configuration_that_says_another_grid_of_inputs_is_refused(saved, tmp_path, monkeypatch):
    codec = CODECS["compressed-tensors"]
    (static,) = quantize_inputs(qlab.parse_spec("int8-tensor"), qlab.RANGES["absmax"])
    (other,) = static.view.operations

    def config(specs, inputs=None, *others):
        wrong = {name: op and other.input_spec for name, op in (inputs or {}).items()}
        return codec.config(specs, wrong, *others)

    monkeypatch.setitem(CODECS, "compressed-tensors", replace(codec, config=config))
    int8 = qlab.parse_spec("int8-channel")
    recipe = qlab.chain(qlab.rtn(int8), quantize_inputs(int8))
    refused(
        lambda: driver.quantize(open_checkpoint(saved("llama")), recipe, None, tmp_path / "out"),
        "config.json makes the inputs of model.layers.0.mlp.down_proj int8-tensor static",
    )
    assert_nothing_stays(tmp_path)


def test_inputs_of_another_scale_are_refused(saved, tmp_path, monkeypatch):
    def halved(path, tensors):
        return {n: t / 2 if n.endswith("input_global_scale") else t for n, t in tensors.items()}

    planted(monkeypatch, "compressed-tensors", halved)
    model = open_checkpoint(saved("llama"))
    recipe = qlab.chain(
        qlab.rtn(qlab.parse_spec("nvfp4")), quantize_inputs(qlab.parse_spec("nvfp4"))
    )
    refused(
        lambda: driver.quantize(model, recipe, random_tokens(model.path), tmp_path / "out"),
        "self_attn.",
        "the rounding of its inputs is another",
    )
    assert_nothing_stays(tmp_path)


HONEST = [
    *(("llama", codec) for codec in CODECS if not CODECS[codec].file),
    *(("gpt2", codec) for codec in CODECS if CODECS[codec].transposed),
    *((family, "compressed-tensors") for family in ("gemma2", "phi3", "deepseek_v3")),
    *(("mixtral", codec) for codec in ("compressed-tensors", "awq")),
]


@pytest.mark.parametrize(("family", "codec"), HONEST)
def test_no_honest_run_is_refused(family, codec, saved, tmp_path):
    """Fused, tied and transposed weights, experts, and every format that holds them."""
    spec = qlab.parse_spec("int4-g32", symmetric=codec.endswith("_desc_act") or "v2" not in codec)
    spec = ASYMMETRIC if codec == "awq" else spec  # which holds no other grid
    made = quantize(saved(family, torch.float16), tmp_path / "out", codec, spec)
    other = "gptq_v2" if codec == "compressed-tensors" else "compressed-tensors"
    if family != "gpt2":
        assert qlab.convert(made.path, other, tmp_path / "again").path.is_dir()


def test_a_conversion_that_writes_garbage_is_refused_by_name(saved, tmp_path, monkeypatch):
    made = quantize(saved("llama", torch.float16), tmp_path / "made")
    planted(monkeypatch, "awq", swapped_nibbles)
    refused(lambda: qlab.convert(made.path, "awq", tmp_path / "out"), "does not read back")
    assert not list(tmp_path.glob("out*"))


def test_files_that_are_quantized_to_garbage_are_refused_by_name(saved, tmp_path, monkeypatch):
    planted(monkeypatch, "compressed-tensors", zero_off_by_one)
    refused(
        lambda: qlab.quantize_files(saved("mixtral"), qlab.rtn(ASYMMETRIC), tmp_path / "out"),
        "experts",
        "its zeros are others",
    )
    assert_nothing_stays(tmp_path)


def another_byte(data, one, _):
    data[(one.start + one.stop) // 2] ^= 1


def pages_swapped(data, one, _):
    middle, page = (one.start + one.stop) // 2, 4096
    first, second = data[middle : middle + page], data[middle + page : middle + 2 * page]
    data[middle : middle + 2 * page] = second + first


def tensors_swapped(data, one, other):
    for a, b in zip(range(one.start, one.stop), range(other.start, other.stop)):
        data[a], data[b] = data[b], data[a]


def shorter(data, *_):
    del data[-3:]


@pytest.fixture
def two_weights(tmp_path):
    """The folder of two weights of an architecture that no library has, whose codes take several
    blocks of a file."""
    folder, drawn = tmp_path / "unknown", torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "nobody_knows"}')
    weights = {
        f"{name}.weight": torch.randn(1024, 1024, generator=drawn, dtype=torch.float32)
        for name in ("one", "other")
    }
    write(folder / "model.safetensors", weights.items())
    return folder


@pytest.mark.parametrize(
    ("fault", "refusal"),
    [
        (another_byte, "one.weight_packed does not read back"),
        (pages_swapped, "one.weight_packed does not read back"),
        (tensors_swapped, "one.weight_packed does not read back"),
        (shorter, "its tensors end at byte"),
    ],
)
def test_a_file_that_is_not_what_was_packed_is_refused(
    fault, refusal, two_weights, tmp_path, monkeypatch
):
    """Also where the damage begins between the packing and the file."""

    real = Spool.write

    def damaged(spool, path):
        digest = real(spool, path)
        stored, data = read_header(path), bytearray(path.read_bytes())
        fault(data, stored["one.weight_packed"], stored["other.weight_packed"])
        path.write_bytes(data)
        return digest

    monkeypatch.setattr(Spool, "write", damaged)
    recipe, out = qlab.rtn(qlab.parse_spec("int4-g128")), tmp_path / "out"
    refused(lambda: qlab.quantize_files(two_weights, recipe, out), refusal)
    assert not out.exists() and not list(tmp_path.glob("out*/*.safetensors"))


def test_a_file_is_vouched_for_behind_its_reading_back(two_weights, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shardwise, "refuse_misread", stopped)
    with pytest.raises(KeyboardInterrupt):
        qlab.quantize_files(two_weights, qlab.rtn(qlab.parse_spec("int4-g128")), tmp_path / "out")
    left = {path.name for path in (tmp_path / "out.partial").rglob("*")}
    assert "model-00001-of-00001.safetensors" in left and "notes-00000.json" not in left


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_steps_fold_into_dense_weights_is_no_difference(dtype, saved, tmp_path):
    path = saved("mistral", dtype)
    made = driver.quantize(
        open_checkpoint(path),
        qlab.chain(qlab.awq_scale(ASYMMETRIC), qlab.rtn(ASYMMETRIC)),
        random_tokens(path),
        tmp_path / "out",
    )
    assert not qlab.verify(made.path, path).faults


def fewer_scales(around):
    def encode(modules):
        tensors, rows = around.encode(modules)
        return {n: 2 * t if n.endswith("v_scale") else t for n, t in tensors.items()}, rows

    return replace(around, encode=encode)


def turned_back(around):
    def encode(modules):
        tensors, rows = around.encode(modules)
        turned = {n: t.flip(0).contiguous() for n, t in tensors.items() if n.endswith(".weight")}
        return tensors | turned, rows

    return replace(around, encode=encode)


def unsaid(around):
    return replace(around, config=lambda rows, attentions: {})


@pytest.mark.parametrize("fault", [fewer_scales, turned_back, unsaid])
def test_what_happens_at_run_time_in_another_way_is_refused(fault, saved, tmp_path, monkeypatch):
    codec = CODECS["compressed-tensors"]
    monkeypatch.setitem(CODECS, "compressed-tensors", replace(codec, around=fault(codec.around)))
    model = open_checkpoint(saved("llama"))
    steps = (qlab.rotate_online(), qlab.rtn(ASYMMETRIC), qlab.kv_cache("fp8-tensor"))
    refused(
        lambda: driver.quantize(
            model, qlab.chain(*steps), random_tokens(model.path), tmp_path / "out"
        ),
        "is turned or rounded in another way"
        if fault is not fewer_scales
        else "the value of model",
    )
    assert_nothing_stays(tmp_path)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("embed_tokens", -1), ("model.norm", -1), ("lm_head", -1), ("model.norm", 1.01)],
)
def test_what_lies_around_the_blocks_and_is_another_is_refused(
    name, factor, saved, tmp_path, monkeypatch
):
    """Its tensors read back as they were written; only the run around the blocks tells."""
    real = run.outside_leaves

    def moved(skeleton, recipe):
        for part in real(skeleton, recipe):
            yield replace(part, leaf=factor * part.leaf) if name in part.name else part

    monkeypatch.setattr(run, "outside_leaves", moved)
    refused(
        lambda: quantize(saved("llama"), tmp_path / "out"),
        "the embedding, final norm and head give other numbers",
    )
    assert_nothing_stays(tmp_path)
