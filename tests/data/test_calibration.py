"""Calibration windows: distinct, drawn without replacement, by the seed and by nothing else."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from model_folders import prose, refused, rewrite
from transformers import AutoTokenizer

from qlab.algebra.random import generator
from qlab.data.calibration import first_windows, tokenizer_of, tokens
from qlab.data.tokenizing import token_ids
from qlab.errors import QlabError
from qlab.files.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def model(saved):
    return open_checkpoint(saved())


def rows(ids) -> list[tuple]:
    return [tuple(row) for row in ids.tolist()]


def test_windows_are_distinct_and_all_of_them_can_be_drawn(model, text):
    every = first_windows(model, [text], 32)
    assert every.ids.shape == (128, 32)
    drawn = tokens(model, [text], 128, 32, seed=3)
    assert sorted(rows(drawn.ids)) == sorted(rows(every.ids)) and rows(drawn.ids) != rows(every.ids)


def test_windows_are_what_the_text_says(model, text):
    words = text.read_text().split()
    expected = [int(word.removeprefix("word")) + 3 for word in words[:64]]
    assert first_windows(model, [text], 32, 2).ids.flatten().tolist() == expected


def test_the_seed_decides_and_the_global_state_does_not(model, text):
    first = tokens(model, [text], 16, 32, seed=0)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    assert torch.equal(tokens(model, [text], 16, 32, seed=0).ids, first.ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(tokens(model, [text], 16, 32, seed=1).ids, first.ids)


def test_fewer_samples_are_the_first_of_more(model, text):
    assert torch.equal(tokens(model, [text], 4, 32).ids, tokens(model, [text], 16, 32).ids[:4])


def test_jsonl_and_text_hold_the_same_documents(model, tmp_path):
    # documents may hold characters that other tools take for the ends of lines
    documents = [
        prose(100, seed=1),
        prose(50, seed=2) + "\u2028" + prose(20, seed=3) + "\x85",
        prose(30, seed=4),
    ]
    lines = "\n".join(json.dumps({"text": d, "title": "?"}, ensure_ascii=False) for d in documents)
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "a.txt").write_text("\n\n".join(documents))
    as_lines, as_text = (
        first_windows(model, [tmp_path / f"a.{kind}"], 200) for kind in ("jsonl", "txt")
    )
    assert torch.equal(as_lines.ids, as_text.ids)
    assert as_lines.sha256 != as_text.sha256
    for kind in ("JSONL", "ndjson"):
        (tmp_path / f"b.{kind}").write_text(lines)
        assert torch.equal(first_windows(model, tmp_path / f"b.{kind}", 200).ids, as_text.ids)
    (tmp_path / "c.json").write_text(json.dumps([{"text": d} for d in documents]))
    with pytest.raises(
        QlabError,
        match=r'c\.json is one JSON value; write a JSON object with a "text" on every line',
    ):
        first_windows(model, [tmp_path / "c.json"], 200)


def test_a_tokenizer_that_makes_nothing_of_a_text_is_named(model, text, monkeypatch):
    monkeypatch.setattr(
        "qlab.data.calibration.tokenizer_of",
        lambda model: lambda documents, **_: SimpleNamespace(input_ids=[[]]),
    )
    with pytest.raises(QlabError, match="makes no token of"):
        first_windows(model, [text], 32)


def test_a_byte_order_mark_is_no_text(model, tmp_path):
    plain, marked = tmp_path / "plain.jsonl", tmp_path / "marked.jsonl"
    plain.write_text(json.dumps({"text": prose(64)}))
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert (
        first_windows(model, [marked], 8).ids.tolist()
        == first_windows(model, [plain], 8).ids.tolist()
    )


def test_several_texts_are_joined_in_order(model, text, tmp_path):
    (tmp_path / "other.txt").write_text(prose(64, seed=9))
    both = first_windows(model, [text, tmp_path / "other.txt"], 64)
    alone = first_windows(model, [text], 64)
    assert torch.equal(both.ids[:64], alone.ids) and len(both.ids) == 65
    assert both.texts == ("calibration.txt", "other.txt")


def test_provenance_names_texts_seed_and_windows(model, text):
    one, other = (tokens(model, [text], 8, 16, seed=seed).describe() for seed in (0, 1))
    assert (
        one | {"seed": 1, "ids_sha256": other["ids_sha256"]} == other
        and one["ids_sha256"] != other["ids_sha256"]
    )
    assert (one["texts"], one["samples"], one["length"]) == (["calibration.txt"], 8, 16)


def test_generator_depends_on_seed_and_name_only():
    draw = lambda seed, path: torch.rand(4, generator=generator(seed, path)).tolist()
    assert draw(0, "a") == draw(0, "a")
    assert (
        len({tuple(draw(*key)) for key in [(0, "a"), (1, "a"), (0, "b"), (10, "a"), (1, "0/a")]})
        == 5
    )


def test_a_tokenizer_of_another_directory_is_not_read(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    outside = ["tokenizer.4.0.json", "../tokenizer.4.1.json"]
    rewrite(folder / "tokenizer_config.json", lambda c: c.update(fast_tokenizer_files=outside))
    refused(
        lambda: tokenizer_of(open_checkpoint(folder)),
        "tokenizer_config.json lists the file '../tokenizer.4.1.json'",
    )


def test_a_tokenizer_that_fails_at_a_word_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved("llama"), tmp_path / "model")
    rewrite(folder / "tokenizer.json", lambda t: t["model"].update(unk_token="none"))
    words = tokenizer_of(open_checkpoint(folder))
    refused(lambda: list(token_ids(words, [["ungueltig"]])), str(folder), "cannot make tokens")


def test_a_tokenizer_at_which_its_library_panics_is_refused(saved, monkeypatch):
    class PanicException(BaseException):  # what libraries in Rust raise
        pass

    def panics(*given, **options):
        raise PanicException("range end index out of range")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panics)
    refused(lambda: tokenizer_of(open_checkpoint(saved("llama"))), "range end index out of range")
    refused(lambda: list(token_ids(panics, [["word"]])), "range end index out of range")


def test_an_interrupt_is_no_fault_of_a_tokenizer():
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(token_ids(interrupted, [["word"]]))
