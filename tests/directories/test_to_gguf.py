"""A directory written as a GGUF file: it reads back as it was, llama.cpp computes the same with it,
and what the format does not say is refused by name before anything is written."""

import json
import shutil
from dataclasses import replace
from functools import partial

import gguf
import pytest
import torch
from bytewise import RULES, TEXTS, VOCABULARY, bytes_of_words, model_folder, tokenizer
from ggml import of_llama, rounding_as_ggml
from model_folders import bits_equal, contents, random_tokens, refused, rewrite
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

import qlab
from qlab.__main__ import main
from qlab.algebra.qtensor import QTensor
from qlab.directories.convert import convert
from qlab.files.certificate import fingerprint
from qlab.files.checkpoint import open_checkpoint

FAMILIES = {"llama": {}, "qwen2": {}, "qwen3": {"head_dim": 32}}
HALVES = torch.float16


def codes(spec, dtype=HALVES):
    return qlab.rtn(replace(qlab.parse_spec(spec), scale_dtype=dtype))


MIXED = qlab.rules(
    {"*.down_proj": codes("int8-g32"), "*.v_proj": qlab.keep(), "*": codes("int4-g32")}
)


def quantized(model, out, recipe=MIXED):
    return qlab.quantize(open_checkpoint(model), recipe, None, out).path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(family) -> (model, quantized directory, GGUF file), made once."""
    there = {}

    def make(family="llama"):
        if family not in there:
            folder = tmp_path_factory.mktemp(family)
            words = tokenizer("qwen2", begins=family == "llama")
            model = model_folder(
                folder / "model", family, torch.bfloat16, words, **FAMILIES[family]
            )
            directory = quantized(model, folder / "quantized")
            there[family] = model, directory, convert(directory, "gguf", folder / "m.gguf").path
        return there[family]

    return make


def without_codes(path):
    raw = json.loads((path / "config.json").read_text())
    return {k: v for k, v in raw.items() if k not in ("quantization_config", "dtype")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_reads_back_as_the_directory_that_it_was_made_of(family, made, tmp_path):
    model, directory, file = made(family)
    back = convert(file, "compressed-tensors", tmp_path / "back").path
    before, after = open_checkpoint(directory), open_checkpoint(back)
    assert before.quantized.keys() == after.quantized.keys() and len(before.quantized) == 12
    for module in before.quantized:
        ours, theirs = after.leaf(f"{module}.weight"), before.leaf(f"{module}.weight")
        assert fingerprint(ours) == fingerprint(theirs) and ours.spec == theirs.spec
    for name in before.stored.keys() & after.stored.keys():
        if name.rpartition(".")[0] not in before.quantized or name.endswith("bias"):
            assert bits_equal(after.tensor(name), before.tensor(name))
    assert without_codes(directory) == without_codes(back)
    ours, theirs = AutoTokenizer.from_pretrained(back), AutoTokenizer.from_pretrained(model)
    assert [ours(text).input_ids for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours.chat_template == theirs.chat_template and ours.eos_token == theirs.eos_token
    verdict = qlab.verify(back, model)
    assert verdict.faults == [] and verdict.certified


@pytest.mark.filterwarnings("ignore:no int4 kernel on a CPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_multiplies_the_same_codes(family, made):
    _, directory, file = made(family)
    ids = torch.randint(3, 300, (24, 6), generator=torch.Generator().manual_seed(0))
    answer = of_llama(file, prompts=ids.tolist(), size=VOCABULARY, float32=True)
    told = torch.tensor(answer["logprobs"])
    model = qlab.lower(directory, dtype=torch.float32)

    def apart(model):
        return (model(ids).logits[:, -1].log_softmax(-1) - told).abs().amax(-1)

    plain, rounding = apart(model), apart(rounding_as_ggml(model))
    # where sums have another order, an input now and then is rounded to the code beside
    assert rounding.median() < 1e-5 < 1e-3 < plain.min() and rounding.max() < 0.1


@pytest.mark.parametrize("rules", RULES)
def test_llama_cpp_splits_texts_into_the_same_tokens(rules, tmp_path):
    words = tokenizer(rules, begins=True)
    model = model_folder(tmp_path / "model", dtype=torch.bfloat16, words=words)
    file = convert(quantized(model, tmp_path / "q"), "gguf", tmp_path).path
    assert file == tmp_path / "model.gguf"
    assert of_llama(file, texts=TEXTS)["ids"] == [words(text).input_ids for text in TEXTS]


def test_the_keys_say_what_the_tokenizer_does(made):
    fields = gguf.GGUFReader(made("llama")[2]).fields
    said = {key: field.contents() for key, field in fields.items()}
    roles = ("bos", "eos", "padding")
    assert [said[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [1, 2, 0]
    assert said["tokenizer.ggml.add_bos_token"] and not said["tokenizer.ggml.add_eos_token"]
    kinds, tokens = said["tokenizer.ggml.token_type"], said["tokenizer.ggml.tokens"]
    assert len(tokens) == len(kinds) == VOCABULARY and kinds[:3] == [gguf.TokenType.CONTROL] * 3
    assert kinds[tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED
    assert tokens[-1] == "[PAD319]" and kinds[-1] == gguf.TokenType.UNUSED
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert {row["spec"] for row in json.loads(said["qlab.json"])["sites"].values()} == {
        "int4-g32",
        "int8-g32",
    }


def test_what_blocks_do_not_hold_is_refused_by_name_or_rounded_and_said(made, tmp_path, command):
    model = made()[0]
    directory = quantized(model, tmp_path / "g64", codes("int4-g64"))
    for spec, words in {
        "int4-g64": "GGUF has no int4-g64; its blocks hold int4-g32",
        "int3-g32": "GGUF has no int3-g32; it holds integers of 4 or 8 bits",
        "int8-g32-asym": "zero points that are not 0 would be lost",
    }.items():
        path = directory if spec == "int4-g64" else quantized(model, tmp_path / spec, codes(spec))
        writes = partial(convert, path, "gguf", tmp_path / "x.gguf")
        refused(writes, "_proj", words, "--requantize")
    out = tmp_path / "new" / "x.gguf"
    code, printed, _ = command(
        main, "convert", directory, "--codec", "gguf", "--out", out, "--requantize", "int4-g32"
    )
    assert code == 0 and "0 weights with the same codes, 14 rounded anew" in printed
    assert "model.layers.0.self_attn.q_proj: " in printed and "e-02 of its norm away" in printed
    rows = json.loads(gguf.GGUFReader(out).fields["qlab.json"].contents())["sites"]
    assert all(0 < row["requantization_error"] < 0.2 for row in rows.values())


def test_scales_that_float16_does_not_hold_are_refused_or_rounded_and_said(made, tmp_path):
    model = made()[0]
    fine = quantized(model, tmp_path / "bf16", codes("int8-g32", torch.bfloat16))
    assert not convert(fine, "gguf", tmp_path / "bf16.gguf").requantized
    wide = quantized(model, tmp_path / "f32", codes("int8-g32", torch.float32))
    out = tmp_path / "f32.gguf"
    refused(lambda: convert(wide, "gguf", out), "float32 scales would be rounded to float16")
    assert not out.exists()
    again = convert(wide, "gguf", out, requantize=qlab.parse_spec("int8-g32"))
    assert len(again.requantized) == 14 and max(again.requantized.values()) < 0.01


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "cohere"}, ["architecture 'cohere'", "of llama, mistral, mixtral"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "'silu'", "keys do not say it"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rope_parameters", "keys do not say it"],
        ),
    ],
)
def test_models_that_the_keys_do_not_say_are_refused_before_weights(config, words, made, tmp_path):
    directory = shutil.copytree(made()[1], tmp_path / "q")
    rewrite(directory / "config.json", lambda raw: raw.update(config))
    refused(lambda: convert(directory, "gguf", tmp_path / "out" / "x.gguf"), *words)
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("kind, factor", [("linear", 2.5), ("yarn", 4.0)])
def test_scaled_rotary_positions_come_back(kind, factor, made, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": factor}
    rope |= {"original_max_position_embeddings": 32} if kind == "yarn" else {}
    directory = shutil.copytree(made("qwen2")[1], tmp_path / "q")
    rewrite(directory / "config.json", lambda raw: raw.update(rope_parameters=rope))
    back = convert(
        convert(directory, "gguf", tmp_path / "x.gguf").path, "gptq", tmp_path / "back"
    ).path
    assert open_checkpoint(back).config.rope_parameters == rope


def test_tokenizers_that_engines_do_not_have_are_refused(saved, made, tmp_path):
    directory = made()[1]

    def of(change, *words):
        words_of = tokenizer()
        change(words_of.backend_tokenizer)
        words_of.save_pretrained(directory)
        refused(lambda: convert(directory, "gguf", tmp_path / "x.gguf"), *words, "run it with qlab")

    kept = contents(directory)
    try:
        steps = [pre_tokenizers.Punctuation(), bytes_of_words()]
        of(
            lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Sequence(steps)),
            "Punctuation",
            "no name in llama.cpp (it knows gpt-2",
        )
        of(
            lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
            "changes texts by Lowercase",
        )
        twice = processors.TemplateProcessing(
            single="<s> <s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
        of(lambda t: setattr(t, "post_processor", twice), "has room for its bos token alone")
    finally:
        for name, data in kept.items():
            (directory / name).write_bytes(data)
    plain = quantized(saved("llama", HALVES), tmp_path / "words", codes("int4-g32"))
    refused(
        lambda: convert(plain, "gguf", tmp_path / "x.gguf"), "WordLevel", "byte-level BPE alone"
    )
    assert not list(tmp_path.glob("*.gguf"))


def test_a_file_is_inspected_and_verified_itself(made, tmp_path, command):
    model, directory, file = made("qwen2")
    held = qlab.inspect(file)
    assert (held.format, held.model_type, held.path) == ("gguf", "qwen2", file)
    ours, theirs = held.sites, qlab.inspect(directory).sites
    assert {name: row["spec"] for name, row in ours.items()} == {
        name: row["spec"] for name, row in theirs.items() if row["spec"]
    }
    assert ours["model.layers.0.mlp.down_proj"]["stored"] == "Q8_0 64x128"
    assert held.unquantized["token_embd.weight"] == "BF16 320x64"
    verdict = qlab.verify(file, model)
    assert verdict.faults == [] and verdict.certified and verdict.path == file
    code, printed, _ = command(main, "verify", file, "--against", model)
    assert code == 0 and "12" in printed
    data, tensor = bytearray(file.read_bytes()), gguf.GGUFReader(file).tensors
    at = next(int(t.data_offset) for t in tensor if t.name == "blk.0.ffn_down.weight")
    data[at + 2] ^= 1  # one code
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    assert ["down_proj" in fault for fault in qlab.verify(broken, model).faults] == [True]


def test_weights_that_a_recipe_moved_are_explained_in_the_file(made, tmp_path):
    model = made()[0]
    fold = qlab.chain(qlab.awq_scale("int4-g32"), codes("int4-g32"))
    data = random_tokens(model)
    folded = qlab.quantize(open_checkpoint(model), fold, data, tmp_path / "folded").path
    verdict = qlab.verify(convert(folded, "gguf", tmp_path / "x.gguf").path, model)
    assert verdict.faults == [] and set(verdict.changed.values()) != {None}


def test_outputs_that_are_there_are_kept_but_for_files_of_qlab(made, tmp_path):
    _, directory, file = made()
    before = file.read_bytes()
    refused(lambda: convert(directory, "gguf", file), "exists; choose another name")
    assert convert(directory, "gguf", file, overwrite=True).path.read_bytes() == before
    foreign = tmp_path / "x.gguf"
    foreign.write_bytes(b"GGUF of another")
    refused(lambda: convert(directory, "gguf", foreign, overwrite=True), "if qlab wrote it")
    refused(lambda: convert(directory, "gguf", directory), "lies in the model's own directory")
    refused(lambda: convert(directory, "gguf", foreign / "y.gguf"), "x.gguf is a file")
    assert foreign.read_bytes() == b"GGUF of another" and contents(tmp_path).keys() == {"x.gguf"}


def test_a_file_that_does_not_read_back_is_not_put_in_place(made, tmp_path, monkeypatch):
    from qlab.codecs import gguf as file_format

    monkeypatch.setattr(file_format, "interleaved", lambda rows, heads: rows)
    refused(
        lambda: convert(made()[1], "gguf", tmp_path / "x.gguf"), "self_attn.", "does not read back"
    )
    assert not contents(tmp_path)


def test_a_config_that_was_changed_in_the_file_is_refused(made, tmp_path):
    data = made()[2].read_bytes()
    broken = tmp_path / "x.gguf"
    broken.write_bytes(data.replace(b'"num_attention_heads": 4', b'"num_attention_heads": 8'))
    refused(
        lambda: convert(broken, "gptq", tmp_path / "out"), "config with num_attention_heads 8", "4"
    )


def test_quantize_writes_a_file_by_way_of_a_directory(made, tmp_path, command):
    model, out = made()[0], tmp_path / "new" / "x.gguf"
    given = ("quantize", model, "--method", "rtn", "--codec", "gguf", "--out", out)
    code, _, error = command(main, *given, "--spec", "int4-g64")
    assert code == 2 and "GGUF has no int4-g64" in error and not list(tmp_path.iterdir())
    other = shutil.copytree(model, tmp_path / "other")
    rewrite(other / "config.json", lambda raw: raw.update(hidden_act="gelu"))
    code, _, error = command(main, given[0], other, *given[2:], "--spec", "int4-g32")
    assert code == 2 and f"{other} has hidden_act 'gelu'" in error and not out.parent.exists()
    code, printed, _ = command(main, *given, "--spec", "int4-g32")
    assert code == 0 and f"{out}: gguf, 4.500 bits per weight" in printed
    assert [path.name for path in out.parent.iterdir()] == ["x.gguf"]
    back = convert(out, "compressed-tensors", tmp_path / "back").path
    assert qlab.verify(back, model).faults == []
    leaf = open_checkpoint(back).leaf("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(leaf, QTensor) and leaf.scales.dtype == HALVES


def test_python_and_other_doors_say_that_a_file_is_made_of_a_directory(made, tmp_path):
    model = open_checkpoint(made()[0])
    refused(
        lambda: qlab.quantize(model, codes("int4-g32"), None, tmp_path / "x", codec="gguf"),
        "gguf is one file",
        "qlab convert DIR --codec gguf --out FILE",
    )
    refused(
        lambda: qlab.quantize_files(model, codes("int4-g32"), tmp_path / "x", codec="gguf"),
        "gguf is one file",
    )
    refused(lambda: convert(made()[2], "gguf", tmp_path / "x"), "gguf is one file")
    assert not list(tmp_path.iterdir())
