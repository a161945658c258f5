"""What cannot work is refused in one sentence that names it, and nothing is left half-written."""

import pytest
import torch
from model_folders import change, random_tokens, refused

import qlab
from qlab.files.checkpoint import open_checkpoint

INT4 = qlab.parse_spec("int4-g16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_inf_in_a_weight_names_its_site(folder, tmp_path, value):
    change(
        folder,
        model__layers__1__mlp__up_proj__weight=lambda t: t.index_fill(1, torch.tensor([3]), value),
    )
    model = open_checkpoint(folder)
    refused(
        lambda: qlab.quantize(model, qlab.rtn(INT4), None, tmp_path / "q"),
        "model.layers.1.mlp.up_proj",
        "NaN or Inf",
    )
    assert not list(tmp_path.glob("q*"))


def test_inf_in_activations_names_the_sites_it_reaches(folder, tmp_path):
    change(folder, model__layers__1__post_attention_layernorm__weight=lambda t: t * 1e38)
    model, data = open_checkpoint(folder), random_tokens(folder)
    refused(
        lambda: qlab.quantize(model, qlab.gptq(INT4), data, tmp_path / "q"),
        "model.layers.1.mlp.gate_proj",
        "NaN or Inf",
    )
    assert not list(tmp_path.glob("q*"))


def test_texts_that_cannot_calibrate(folder, tmp_path):
    model = open_checkpoint(folder)
    text, lines = tmp_path / "t.txt", tmp_path / "t.jsonl"
    refused(lambda: qlab.tokens(model, [tmp_path / "none.txt"], 1, 8), "none.txt", "cannot be read")
    text.write_text("  \n")
    refused(lambda: qlab.tokens(model, [text], 1, 8), "t.txt", "empty")
    lines.write_text('{"text": " "}\n{"text": ""}\n')
    refused(lambda: qlab.tokens(model, [lines], 1, 8), "t.jsonl", "empty")
    text.write_bytes(b"word1 \xff\xfe")
    refused(lambda: qlab.tokens(model, [text], 1, 8), "t.txt", "UTF-8")
    text.write_text("word1 word2 word3")
    refused(lambda: qlab.tokens(model, [text], 1, 8), "t.txt", "3 tokens", "8")
    text.write_text("word1 word2 " * 20)
    refused(lambda: qlab.tokens(model, [text], 9, 8), "5 windows", "9")
    lines.write_text('{"text": "word1"}\n{"no": 1}\n')
    refused(lambda: qlab.tokens(model, [lines], 1, 8), "t.jsonl", "line 2")


def test_token_ids_outside_the_vocabulary(folder):
    model = open_checkpoint(folder)
    refused(lambda: qlab.from_ids(model, torch.full((2, 8), 128)), "128", "vocabulary")
    refused(lambda: qlab.from_ids(model, torch.full((2, 8), -1)), "-1", "vocabulary")


def test_a_second_moment_that_no_damping_repairs_names_its_site(folder, tmp_path, monkeypatch):
    from qlab.algebra import stats

    broken = stats.STATS["second_moment"]._replace(
        lift=lambda o: stats.Moment(-100 * stats.gram(o.x_nk), len(o.x_nk))
    )
    monkeypatch.setitem(stats.STATS, "second_moment", broken)
    model, data = open_checkpoint(folder), random_tokens(folder)
    refused(
        lambda: qlab.quantize(model, qlab.gptq(INT4), data, tmp_path / "q"),
        "model.layers.0.",
        "positive definite",
    )


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"],
)
def test_a_tensor_that_is_not_finite_is_named_though_nothing_rounds_or_observes_it(
    folder, tmp_path, name
):
    change(
        folder,
        **{name.replace(".", "__"): lambda t: t.index_fill(0, torch.tensor([3]), float("inf"))},
    )
    refused(
        lambda: qlab.quantize(open_checkpoint(folder), qlab.rtn(INT4), None, tmp_path / "q"),
        f"{name} holds NaN or Inf",
    )
    assert not (tmp_path / "q").exists()


def test_a_weight_of_zeros_is_quantized_to_zeros(folder, tmp_path):
    change(folder, model__layers__1__mlp__down_proj__weight=torch.zeros_like)
    out = qlab.quantize(
        open_checkpoint(folder),
        qlab.METHODS["awq-gptq"](INT4),
        random_tokens(folder),
        tmp_path / "q",
    ).path
    assert not qlab.open(out).leaf("model.layers.1.mlp.down_proj.weight").codes.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", [qlab.awq, qlab.gptq])
@pytest.mark.parametrize("name", ["0.self_attn.q_proj", "1.mlp.down_proj", "1.input_layernorm"])
def test_a_tensor_that_is_not_finite_is_named_where_it_is_observed(
    folder, tmp_path, value, method, name
):
    change(
        folder,
        **{
            f"model.layers.{name}.weight".replace(".", "__"): lambda t: t.clone().index_fill_(
                0, torch.tensor([3]), value
            )
        },
    )
    model, data = open_checkpoint(folder), random_tokens(folder)
    refused(
        lambda: qlab.quantize(model, method(INT4), data, tmp_path / "q"),
        f"model.layers.{name}.weight",
        "NaN or Inf",
    )
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    "line", ['{"text": "word1"', '"text"', '{"text": 7}', '{"text": null}', "[1]"]
)
def test_a_line_of_jsonl_without_a_text(folder, tmp_path, line):
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "word1"}\n\n' + line + "\n")
    refused(
        lambda: qlab.tokens(open_checkpoint(folder), [lines], 1, 1),
        "t.jsonl, line 3",
        'not a JSON object with a "text"',
    )


def test_no_text_no_windows_and_no_tokenizer(folder, text, tmp_path):
    model = open_checkpoint(folder)
    refused(lambda: qlab.tokens(model, [], 1, 8), "no text was given")
    refused(lambda: qlab.tokens(model, [tmp_path], 1, 8), "cannot be read (Is a directory)")
    refused(lambda: qlab.tokens(model, [text], 0, 8), "0 samples were asked for")
    refused(lambda: qlab.tokens(model, [text], 1, 0), "windows of 0 tokens")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(lambda: qlab.tokens(model, [text], 1, 8), "model has no tokenizer")


def test_half_a_character_in_a_text_is_named_by_its_line(folder, tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"text": "a b"}\n{"text": "a \\ud800 b"}\n')
    refused(
        lambda: qlab.tokens(open_checkpoint(folder), tmp_path / "cut.jsonl", 1, 2),
        "cut.jsonl, line 2",
        r"'\ud800' at 2",
        "repair",
    )


def test_one_text_may_stand_without_a_list_and_no_windows_are_none(folder, text):
    model = open_checkpoint(folder)
    assert torch.equal(
        qlab.tokens(model, text, 2, 8).ids, qlab.tokens(model, [str(text)], 2, 8).ids
    )
    assert torch.equal(
        qlab.first_windows(model, str(text), 8, 2).ids, qlab.first_windows(model, [text], 8, 2).ids
    )
    refused(lambda: qlab.first_windows(model, text, 8, 0), "0 windows were asked for")
    one = qlab.first_windows(model, text, 1, 4)
    refused(lambda: qlab.evaluate(model, model, one), "windows of 1 token predict nothing")


def test_arguments_that_mean_nothing(folder, tmp_path):
    model, data = open_checkpoint(folder), random_tokens(folder)
    refused(
        lambda: qlab.quantize(model, qlab.gptq(INT4), data, tmp_path / "q", inputs="both"),
        "inputs 'both'",
        "'reference'",
    )
    refused(lambda: qlab.plan(model, qlab.rtn(INT4), inputs="both"), "inputs 'both' are unknown")
    refused(
        lambda: qlab.compare(model, {"../q": qlab.rtn(INT4)}, None, tmp_path / "q"),
        "'../q' has no name for a folder",
    )
    refused(
        lambda: qlab.plan(model, qlab.at("re:([", qlab.rtn(INT4))),
        "'re:(['",
        "no regular expression",
    )
    for damp in (float("nan"), -1.0, 2.0):
        refused(lambda damp=damp: qlab.gptq(INT4, damp=damp), f"damp is {damp}", "from 0 to 1")
        refused(
            lambda damp=damp: qlab.aim_at_reference(damp=damp), f"damp is {damp}", "from 0 to 1"
        )
    for strength in (0.0, float("nan"), float("inf")):
        refused(
            lambda strength=strength: qlab.aim_at_reference(strength),
            f"strength is {strength}",
            "give a ",
        )
    refused(lambda: qlab.gptq(INT4, block=0), "block is 0")
    refused(lambda: qlab.gptq(INT4, sweeps=-1), "sweeps -1")
    assert not list(tmp_path.glob("q*"))


@pytest.mark.parametrize("ids", [torch.ones(4), torch.ones(1, 0)])
def test_token_ids_that_are_no_windows(folder, ids):
    refused(
        lambda: qlab.from_ids(open_checkpoint(folder), ids.long()),
        f"shape {tuple(ids.shape)}",
        "[samples, length]",
    )


@pytest.mark.parametrize(
    "spec", ["", "int4", "int4-g", "int4-g0", "int9-g16", "int0-g16", "fp5-g16", "int4-g16-sym"]
)
def test_an_unknown_spec(spec):
    refused(lambda: qlab.parse_spec(spec), spec[:4])


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_does_not_compute_here(folder, tmp_path, device):
    refused(
        lambda: qlab.quantize(
            open_checkpoint(folder), qlab.rtn(INT4), None, tmp_path / "q", device=device
        ),
        f"the device {device!r} cannot be used here",
        "choose 'cpu'",
    )
    assert not (tmp_path / "q.partial").exists()


def test_models_and_windows_that_do_not_go_together_in_an_evaluation(folder, saved):
    model, windows = open_checkpoint(folder), random_tokens(folder, 2, 8)
    small = open_checkpoint(saved("llama", vocab_size=120))
    deep = open_checkpoint(saved("llama", num_hidden_layers=3))
    refused(
        lambda: qlab.evaluate(small, model, windows),
        "vocabulary of 120 tokens",
        "one of 128",
        "the one that it was made from",
    )
    refused(
        lambda: qlab.evaluate(deep, model, windows), "has 3 blocks of hidden size 64", "has 2 of 64"
    )
    opt = open_checkpoint(saved("opt"))
    refused(
        lambda: qlab.evaluate(opt, opt, random_tokens(opt.path, 1, 129)),
        "windows of 129 tokens",
        "128 positions",
        "shorter",
    )
