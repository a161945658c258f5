"""Models of every architecture that qlab writes as GGUF: llama.cpp computes with the file what qlab
does with the directory, and the file reads back as it was."""

from dataclasses import replace

import gguf
import pytest
import torch
from bytewise import TEXTS, VOCABULARY, model_folder
from bytewise import tokenizer as bytes_tokenizer
from ggml import in_float32, of_llama
from model_folders import bits_equal, prose, refused
from piecewise import SPACES, tokenizer
from transformers import AutoTokenizer

import qlab
from qlab.codecs import gguf_keys
from qlab.codecs.gguf_models import MODELS
from qlab.directories.convert import convert
from qlab.directories.to_gguf import _Model, _Tensors
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
WINDOW = dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=None)
BY_KIND = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e2},
}
OF_GELU = ("gemma2", "gemma3_text")
SIZES = dict.fromkeys(gguf_keys.TOLD.values(), 1)
CASES = {
    "llama": dict(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 32}),
    "mistral": dict(sliding_window=None, head_dim=32, rope_parameters=LINEAR),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "qwen2": dict(rope_parameters=YARN | {"original_max_position_embeddings": 16}),
    "qwen3": dict(head_dim=32),
    "qwen3_moe": EXPERTS | dict(head_dim=32, norm_topk_prob=True),
    "olmo2": {},
    "phi3": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW | dict(num_hidden_layers=6, rope_parameters=BY_KIND),
}


def rounded(model, out):
    spec = replace(qlab.parse_spec("int8-g32"), scale_dtype=torch.float16)
    return qlab.quantize(open_checkpoint(model), qlab.rtn(spec), None, out).path


def settings(model):
    return {k: v for k, v in model.raw.items() if k not in ("quantization_config", "dtype")}


def rules(model):
    """What a configuration says of each module."""
    said = model.raw["quantization_config"]
    groups = [sorted(group["targets"]) for group in said["config_groups"].values()]
    return sorted(said["ignore"]), groups


def test_every_architecture_that_is_written_has_a_case():
    assert CASES.keys() == MODELS.keys()


@pytest.mark.filterwarnings("ignore:no int4 kernel on a CPU")
@pytest.mark.parametrize("family", CASES)
def test_llama_cpp_agrees_and_the_file_reads_back(family, tmp_path):
    words = bytes_tokenizer("qwen2")
    model = model_folder(tmp_path / "m", family, torch.bfloat16, words, **CASES[family])
    directory = rounded(model, tmp_path / "q")
    file = convert(directory, "gguf", tmp_path / "x.gguf").path
    ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    places = [5, 14, 23]  # the last two behind a window of 8
    prompts = [ids[0, : i + 1].tolist() for i in places]
    ours = qlab.lower(directory, dtype=torch.float32)(ids).logits[0, places].log_softmax(-1)

    def told(file, **settings):
        answer = of_llama(file, prompts=prompts, size=VOCABULARY, **settings)
        return torch.tensor(answer["logprobs"])

    def kl(theirs):
        return (ours.exp() * (ours - theirs)).sum(-1)

    rounding, exact = told(file), told(in_float32(file, tmp_path / "f32.gguf"), float32=True)
    # it rounds inputs of products to 8 bits; the next position is another distribution
    assert kl(rounding).max() < 2e-3 < 0.02 < kl(rounding.roll(1, 0)).mean()
    # of F32 weights it rounds nothing; its GELU is a table in float16
    assert (exact - ours).abs().max() < (5e-3 if family in OF_GELU else 2e-5)
    back = open_checkpoint(convert(file, "compressed-tensors", tmp_path / "back").path)
    before = open_checkpoint(directory)
    assert before.quantized == back.quantized and before.stored.keys() == back.stored.keys()
    for module in before.quantized:
        name = f"{module}.weight"
        assert fingerprint(before.leaf(name)) == fingerprint(back.leaf(name))
    plain = [n for n in before.stored if n.rpartition(".")[0] not in before.quantized]
    assert all(bits_equal(before.tensor(name), back.tensor(name)) for name in plain)
    assert settings(before) == settings(back)
    assert rules(back) == rules(before)
    texts = [AutoTokenizer.from_pretrained(model.path) for model in (before, back)]
    assert texts[0](TEXTS).input_ids == texts[1](TEXTS).input_ids
    assert qlab.inspect(file).sites.keys() == before.quantized.keys()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_of_several_widths_read_back(family, tmp_path):
    words = bytes_tokenizer("qwen2")
    model = model_folder(tmp_path / "m", family, torch.bfloat16, words, **CASES[family])
    eight, four = (
        qlab.rtn(replace(qlab.parse_spec(spec), scale_dtype=torch.float16))
        for spec in ("int8-g32", "int4-g32")
    )
    mixed = {"*.self_attn.*": eight, "*.0.*.down_proj": qlab.keep(), "*": four}
    before = qlab.quantize(model, qlab.rules(mixed), None, tmp_path / "q").path
    file = convert(before, "gguf", tmp_path / "x.gguf").path
    assert qlab.verify(file, model).faults == []
    back = convert(file, "gptq_v2", tmp_path / "back").path
    ids = torch.arange(3, 35).reshape(2, 16)
    ours, theirs = (qlab.lower(path, dtype=torch.float32)(ids).logits for path in (before, back))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "family, config, words",
    [
        ("mistral", dict(sliding_window=16), ["sliding_window 16", "None"]),
        ("gemma2", dict(query_pre_attn_scalar=64), ["query_pre_attn_scalar 64", "16"]),
        ("gemma2", dict(attn_logit_softcapping=None), ["attn_logit_softcapping None", "50.0"]),
        ("qwen3_moe", dict(norm_topk_prob=False), ["norm_topk_prob False", "True"]),
        ("qwen3", dict(rope_parameters=LLAMA3), ["rope_parameters", "keys do not say it"]),
        ("opt", {}, ["architecture 'opt'", "of llama, mistral, mixtral, qwen2"]),
    ],
)
def test_what_engines_would_compute_otherwise_is_refused(family, config, words, tmp_path):
    given = {**CASES.get(family, {}), **config}
    if "rope_parameters" in config:
        given["rope_parameters"] |= {"original_max_position_embeddings": 32}
    model = model_folder(tmp_path / "m", family, torch.bfloat16, bytes_tokenizer("qwen2"), **given)
    directory = rounded(model, tmp_path / "q")
    refused(lambda: convert(directory, "gguf", tmp_path / "x.gguf"), *words)


def test_factors_of_frequencies_that_a_config_does_not_say_are_refused(tmp_path):
    words = bytes_tokenizer("qwen2")
    model = model_folder(tmp_path / "m", "llama", torch.bfloat16, words, **CASES["llama"])
    file = convert(rounded(model, tmp_path / "q"), "gguf", tmp_path / "x.gguf").path
    data = file.read_bytes()
    changed = data.replace(b'"factor": 8.0', b'"factor": 4.0')
    assert changed != data
    file.write_bytes(changed)
    refused(lambda: convert(file, "gptq", tmp_path / "out"), "rope_parameters", "itself")


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory):
    """A quantized model with room for the ids of a tokenizer of pieces."""
    folder = tmp_path_factory.mktemp("pieces")
    model = model_folder(folder / "m", "llama", torch.bfloat16, tokenizer(), vocab_size=400)
    return rounded(model, folder / "q")


@pytest.mark.parametrize("spaces", ["before", "nowhere", "never"])
def test_llama_cpp_joins_pieces_to_the_same_tokens(spaces, piece_model, tmp_path):
    words = tokenizer(spaces)
    words.save_pretrained(piece_model)
    file = convert(piece_model, "gguf", tmp_path / "x.gguf").path
    texts = [*TEXTS, prose(64)]  # in the last one joins compete
    assert of_llama(file, texts=texts)["ids"] == [words(text).input_ids for text in texts]
    fields = gguf.GGUFReader(file).fields
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[0] == gguf.TokenType.UNKNOWN and kinds[4:260] == [gguf.TokenType.BYTE] * 256


@pytest.mark.parametrize(
    "spaces, complete, word",
    [
        ("first", True, "changes spaces by"),
        ("always", True, "changes spaces by"),
        ("before", False, "no scores of tokens give"),
    ],
)
def test_pieces_that_engines_join_otherwise_are_refused(
    spaces, complete, word, piece_model, tmp_path
):
    assert spaces in SPACES
    tokenizer(spaces, complete=complete).save_pretrained(piece_model)
    refused(lambda: convert(piece_model, "gguf", tmp_path / "x.gguf"), word, "run it with qlab")


def test_experts_that_are_not_one_tensor_are_refused():
    kind, file_name = MODELS["qwen3_moe"], "blk.0.ffn_up_exps.weight"
    names = {f"layers.0.mlp.experts.{i}.up_proj.weight": file_name for i in (0, 1)}
    rows = _Tensors(None, _Model("m", kind, None, {"num_experts": 2, **SIZES}, names))
    one, other = names
    rows.add(one, torch.ones(4, 32, dtype=torch.float32), None, {})
    refused(rows.refuse_incomplete, "a weight of every expert", file_name)
    refused(lambda: rows.add(other, torch.ones(4, 32, dtype=torch.bfloat16), None, {}), "one spec")
