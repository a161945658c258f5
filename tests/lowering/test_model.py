"""Whole models: lowered and interpreted logits agree for every family, generate works, states
round-trip, refusals name the cause."""

import pytest
import torch
from tolerances import MODEL

import qlab
from qlab.algebra.spec import parse_spec
from qlab.data.calibration import from_ids
from qlab.errors import QlabError
from qlab.evaluation.perplexity import read
from qlab.files.checkpoint import open_checkpoint
from qlab.lowering import QExperts, QLinear, lower, resident_bytes
from qlab.lowering.weights.integers import is_exact
from qlab.lowering.weights.kernels import CODES
from qlab.lowering.weights.modules import QuantizedWeight
from qlab.methods.rtn import rtn
from qlab.model.running import head

SPECS = {
    "llama": "int4-g32",
    "qwen2": "int4-g64-asym",
    "gemma3_text": "int3-g32",
    "phi3": "int8-channel",
    "opt": "int4-channel",
    "deepseek_v3": "int4-g32",
    "olmo2": "int2-g64-asym",
    "gpt_neox": "int8-g32-asym",
    "mixtral": "int4-g32",
    "qwen3_moe": "int8-g32-asym",
}
# planes of 4 bits, two of them, and experts, again as on a smaller processor
EACH = [
    pytest.param(family, marks=[pytest.mark.processor] * (family in ("llama", "phi3", "mixtral")))
    for family in SPECS
]


@pytest.fixture(scope="module")
def quantized(saved, tmp_path_factory):
    """quantized(family, spec) -> the result of RTN, made once."""
    results = {}

    def make(family="llama", spec="int4-g32"):
        if (family, spec) not in results:
            out = tmp_path_factory.mktemp("quantized") / family
            results[family, spec] = qlab.quantize(
                open_checkpoint(saved(family)), rtn(parse_spec(spec)), None, out
            )
        return results[family, spec]

    return make


def logits(model, ids):
    return model(input_ids=ids).logits.double()


def interpreted(path, ids, dtype=torch.float32):
    """The logits of the streamed, interpreted model."""
    reading = read(open_checkpoint(path), from_ids(open_checkpoint(path), ids), dtype)
    return torch.cat(
        [head(reading.skeleton, ids[i : i + 1], reading.hidden[i : i + 1]) for i in range(len(ids))]
    ).double()


@pytest.mark.parametrize("family", EACH)
def test_lower_and_interpret_agree(quantized, family):
    result = quantized(family, SPECS[family])
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    reference = interpreted(result.path, ids)
    for dtype in (torch.float32, torch.bfloat16):
        # With a dense copy there is nothing to warn of.
        model = lower(result, dtype=dtype, dense_cache=dtype == torch.float32)
        errors = (logits(model, ids) - reference).norm(dim=-1) / reference.norm(dim=-1)
        # Near a tie a rounded router chooses another expert.
        error = errors.max() if dtype == torch.float32 else errors.median()
        assert error < MODEL[dtype], (dtype, error)
        sites = [name for name, row in result.sites.items() if row["spec"]]
        lowered = [
            name for name, module in model.named_modules() if isinstance(module, QLinear | QExperts)
        ]
        assert sorted(lowered) == sorted(sites) and model.dtype == dtype


CODED = {
    "fp8-channel": "llama",
    "fp8-tensor": "opt",
    "mxfp4": "qwen2",
    "nvfp4": "mixtral",
    "int4-g16-asym": "llama",
}


@pytest.mark.parametrize("spec", CODED)
def test_what_no_kernel_takes_is_dequantized_for_the_call_and_said_to_be(quantized, spec):
    result = quantized(CODED[spec], spec)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
    with pytest.warns(UserWarning, match=rf"no kernel takes the codes of \d+ weights \({spec}\)"):
        model = lower(result, dtype=torch.float32)
    reference, computed = interpreted(result.path, ids), logits(model, ids)
    assert (computed - reference).norm() < MODEL[torch.float32] * reference.norm()
    coded = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight) and module.kernel is CODES
    ]
    assert sorted(coded) == sorted(
        name for name, row in result.sites.items() if row["spec"]
    ) and f"spec={spec}" in repr(model)


def test_one_token_attention_gives_what_the_models_own_attention_gives(quantized):
    """Decoding over a static cache, token by token, equals one pass over all tokens, and the mask
    hides what is not there yet."""
    from transformers import StaticCache

    model = lower(quantized().path, dtype=torch.float32, dense_cache=True)
    ids = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(2))
    cache = StaticCache(config=model.config, max_cache_len=32)
    one_by_one = [
        model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(10)
    ]
    with_sdpa = lower(quantized().path, dtype=torch.float32, dense_cache=True)
    assert model.config._attn_implementation == "qlab_one_token"
    with_sdpa.set_attn_implementation("sdpa")
    torch.testing.assert_close(
        torch.cat(one_by_one, 1), with_sdpa(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_works_and_stops_where_the_directory_says(quantized, cache):
    model = lower(quantized().path)
    ids = torch.randint(3, 128, (2, 5), generator=torch.Generator().manual_seed(3))
    out = model.generate(
        ids, max_new_tokens=6, do_sample=False, cache_implementation=cache, disable_compile=True
    )
    assert torch.equal(out[:, :5], ids) and out.shape[1] <= 11
    assert model.generation_config.eos_token_id == 2 and not model.training


def test_a_tied_head_is_held_once(saved, tmp_path):
    path = saved("llama", tie_word_embeddings=True)
    result = qlab.quantize(
        open_checkpoint(path), rtn(parse_spec("int4-g32")), None, tmp_path / "out"
    )
    model = lower(result.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert resident_bytes(model)["embeddings"] == 128 * 64 * 2


def test_the_state_round_trips_and_another_layout_is_refused(quantized):
    model, other = lower(quantized().path), lower(quantized("llama", "int4-g64").path)
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(4))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, ids)
    for module in model.modules():
        if isinstance(module, QLinear):
            module.words.zero_()
    assert not torch.equal(logits(model, ids), expected)
    model.load_state_dict(state)
    assert torch.equal(logits(model, ids), expected)
    with pytest.raises(QlabError, match=r"packed for one device.*copy its directory"):
        model.save_pretrained("nowhere")
    with pytest.raises(RuntimeError, match="size mismatch"):  # other groups have other scales
        other.load_state_dict(state)
    key = next(name for name in state if name.endswith("_extra_state"))
    state[key] = torch.tensor(list(b"wgmma"), dtype=torch.uint8)
    with pytest.raises(QlabError, match="packed as wgmma and the module reads int4pack"):
        model.load_state_dict(state)


@pytest.mark.parametrize("spec", ["int4-g32", "fp8-channel"])
def test_a_state_that_is_loaded_replaces_the_dense_copies(spec, quantized):
    model, other = (
        lower(quantized("llama", spec).path, dtype=torch.float32, dense_cache=True)
        for _ in range(2)
    )
    ids = torch.randint(3, 128, (1, 8), generator=torch.Generator().manual_seed(4))
    for module in other.modules():
        if isinstance(module, QuantizedWeight):
            module.scales.mul_(2)
    other.load_state_dict(other.state_dict())
    before = logits(model, ids)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, ids), logits(other, ids)) and not torch.equal(
        logits(model, ids), before
    )


def test_resident_bytes_count_each_tensor_once(quantized):
    plain, cached = (
        resident_bytes(lower(quantized().path, dense_cache=cache)) for cache in (False, True)
    )
    # Kernels pad rows to 64.
    true, padded = (2 * (64 * 64 * 2 + 64 * kv * 2 + 3 * 64 * 128) for kv in (32, 64))
    assert plain["packed"] == padded // 2 + padded // 32 * 4 and plain["dense copies"] == 0
    assert cached == plain | {"dense copies": true * 2}
    with pytest.warns(UserWarning, match="no kernel takes"):
        coded = resident_bytes(lower(quantized("llama", "fp8-channel").path))
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert coded == plain | {"packed": true + outputs * 2}  # a byte each, and scales in bfloat16


def test_what_cannot_be_lowered_is_refused_by_name(quantized, saved, tmp_path):
    result = quantized()
    for arguments, part in [
        (dict(device="tpu"), "'tpu' is no device"),
        (dict(device="mps"), "no int4 kernels for mps"),
        (dict(dtype=torch.float64), "no kernel takes torch.float64 activations"),
    ]:
        with pytest.raises(QlabError, match=part):
            lower(result, **arguments)
    with pytest.raises(QlabError, match="is not quantized, so there is nothing to lower"):
        lower(saved())
    with pytest.raises(QlabError, match="is not a model directory"):
        lower(tmp_path / "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(quantized):
    with pytest.raises(QlabError, match="torch finds no CUDA device here"):
        lower(quantized(), "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_slow_dtype_is_announced(quantized, dtype):
    with pytest.warns(UserWarning, match=f"no int4 kernel on a CPU takes {dtype} activations"):
        lower(quantized(), dtype=dtype)


@pytest.mark.parametrize(
    "family, spec, inputs",
    [
        ("llama", "int4-g32", None),
        ("phi3", "int8-channel", None),
        ("opt", "int6-tensor", None),
        ("qwen2", "int8-g32", None),
        ("llama", "int8-channel", "int8-channel"),
        ("opt", "int8-channel", "int8-tensor-asym"),
        ("llama", "fp8-channel", None),
        ("qwen2", "fp8-tensor", None),
    ],
)
def test_torchao_multiplies_the_same_codes(family, spec, inputs, saved, tmp_path):
    pytest.importorskip("torchao")
    if inputs is not None and not is_exact():
        pytest.skip("torchao's sums of integers are not exact on this processor")
    steps = [] if inputs is None else [qlab.quantize_inputs(inputs)]
    recipe = qlab.chain(*steps, rtn(parse_spec(spec)))
    result = qlab.quantize(open_checkpoint(saved(family)), recipe, None, tmp_path / "out")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(5))
    theirs = qlab.to_torchao(result)
    weights = [m.weight for n, m in theirs.named_modules() if n in result.sites]
    assert weights and all(type(w).__module__.startswith("torchao") for w in weights)
    reference = interpreted(result.path, ids)
    assert (logits(theirs, ids) - reference).norm() / reference.norm() < MODEL[torch.bfloat16]


def test_what_torchao_does_not_hold_is_refused_by_name(quantized, saved, tmp_path):
    pytest.importorskip("torchao")
    for family, spec, message in [
        ("mixtral", SPECS["mixtral"], "these are fused experts"),
        ("qwen2", "mxfp4", "torchao's int4 tensors do not hold mxfp4"),
        ("llama", "int8-channel-asym", "torchao's int8 tensors multiply no zero points"),
        ("llama", "fp8-b16x32", "torchao's fp8 tensors hold no blocks of 16x32"),
    ]:
        with pytest.raises(QlabError, match=message):
            qlab.to_torchao(quantized(family, spec))
    for inputs, spec, message in [
        ("int8-g32", "int8-channel", "of int8-channel take no inputs in int8-g32"),
        ("fp8-channel", "int8-channel", "take no inputs in fp8-channel"),
        ("int8-channel", "int8-g32", "of int8-g32 take no inputs in int8-channel"),
    ]:
        recipe = qlab.chain(qlab.quantize_inputs(inputs), rtn(parse_spec(spec)))
        out = tmp_path / f"{spec} {inputs}"
        qlab.quantize(open_checkpoint(saved("llama")), recipe, None, out)
        with pytest.raises(QlabError, match=message):
            qlab.to_torchao(out)
