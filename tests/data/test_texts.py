"""Texts as people have them: files known by their content, values of Python, and sentences that
show no word of a document."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from model_folders import prose, refused
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import qlab
from qlab.data import calibration, tokenizing
from qlab.files.checkpoint import open_checkpoint

DOCUMENTS = [prose(40, seed) for seed in range(5)]
# The chat template of the tests writes the content alone.
CHATS = [[{"role": "user", "content": document}] for document in DOCUMENTS]
LINES = "".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS)


@pytest.fixture(scope="module")
def model(saved):
    return open_checkpoint(saved())


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    file.write_text(LINES)
    return qlab.tokens(model, file, 10, 16).ids


VALUES = {
    "documents": lambda: DOCUMENTS,
    "one document": lambda: "\n\n".join(DOCUMENTS),
    "a generator": lambda: (document for document in DOCUMENTS),
    "rows": lambda: [{"text": document, "url": "?"} for document in DOCUMENTS],
    "a column": lambda: {"text": DOCUMENTS, "url": ["?"] * 5},
    "batches of columns": lambda: ({"text": DOCUMENTS[i : i + 2]} for i in (0, 2, 4)),
    "chat rows": lambda: [{"messages": chat} for chat in CHATS],
    "a column of chats": lambda: {"messages": CHATS},
}


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_python_hold_the_documents_of_a_file(model, expected, kind):
    data = qlab.tokens(model, VALUES[kind](), 10, 16)
    assert torch.equal(data.ids, expected) and data.texts == ("documents",)


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a", "a.csv"])
def test_json_lines_are_known_by_their_content(model, expected, tmp_path, name):
    (tmp_path / name).write_text("\n" + LINES)
    assert torch.equal(qlab.tokens(model, tmp_path / name, 10, 16).ids, expected)
    (tmp_path / name).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    assert torch.equal(qlab.tokens(model, tmp_path / name, 10, 16).ids, expected)


FILES = {
    "a.json": ('{\n"text": "word1"}', "one JSON value"),
    "b.txt": ('[{"text": "word1"},', "one JSON value"),
    "c.html": ("<!DOCTYPE html><p>word1", "HTML or XML"),
    "d.csv": ("text,url\nword1,?", "is a table"),
    "e.txt": ("word1 \0 word2", "a NUL at 6"),
    "f.txt": ("\x01\x02\x03word1", "control characters"),
    "g.txt": ("word1".encode("utf-16"), "not UTF-8 (byte 0)"),
    "h.txt": ("word1 \xe9 word2".encode("latin-1"), "not UTF-8 (byte 6)"),
    "i.txt": (b"\x1f\x8b\x08word1", "is compressed"),
    "j.txt": ("\ufeff \n\t", "is empty"),
    "k.jsonl": ("[" * 100_000, "line 1: not a JSON object"),
    "l.jsonl": ('{"input_ids": [1, 2]}', "qlab.from_ids"),
    "n.txt": ("[1, 2, 3]\n[4, 5]", "qlab.from_ids"),
    "o.txt": (
        'texts of mine\n{"text": "word1"}\n{"text": "word2"}\n',
        'most of its lines are JSON objects with a "text"',
    ),
    "m.jsonl": ('{"text": "word1"}\n{"text": "\\u0000"}', "m.jsonl, line 2: its text has a NUL"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_text_is_refused(model, tmp_path, name):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(lambda: qlab.tokens(model, tmp_path / name, 1, 1), name, words)


@pytest.mark.parametrize(
    "name, words",
    [
        ("pipe", "is a pipe or a device"),
        ("folder", "Is a directory"),
        ("loop", "cannot be read"),
        ("a" * 5000 + ".txt", "cannot be read"),
        ("absent.txt", "No such file"),
    ],
)
def test_only_ordinary_files_are_opened(model, tmp_path, name, words):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer for ever
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    refused(lambda: qlab.tokens(model, tmp_path / name, 1, 8), words)
    refused(lambda: qlab.image_samples(model, [tmp_path / name], 1, 8))


GIVEN = {
    "nothing": (None, "NoneType is no text"),
    "bytes": (b"word1 word2", "bytes is no text"),
    "a number": (7, "int is no text"),
    "ids": ([[1, 2, 3]], "qlab.from_ids"),
    "ids in a row": ([{"input_ids": [1, 2, 3]}], "qlab.from_ids"),
    "a tensor": (torch.ones(2, 3), "qlab.from_ids"),
    "a row without a text": ([{"secret": "secret"}], 'neither a "text" nor "messages"'),
    "a row without words": ([{"text": None}], 'neither a "text"'),
    "splits": ({"train": ["secret"]}, 'neither a "text"'),
    "blank documents": ([" \n", ""], "the documents are empty"),
    "half a character": (["secret \ud800 secret\n"], "document 1", "half of a character"),
    "a NUL": (["word1\n", "secret \0\n"], "document 2", "NUL"),
    "a table": (SimpleNamespace(columns=["text"]), "give the column"),
    "too little": (["secret secret\n"], "documents holds", "less than one window"),
    "a path among documents": (["secret word1\n", open], "document 2", "no text"),
    "a file among documents": (
        [__file__, "secret word1\n"],
        "document 1 is the path of a file",
        "documents alone",
    ),
    "a document and a file": (["secret word1\n", __file__], "document 2 is the path of a file"),
    "an empty string": ("", "'' holds no words"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_is_no_text_is_refused_and_never_shown(model, kind):
    given, *words = GIVEN[kind]
    with pytest.raises(qlab.QlabError) as error:
        qlab.tokens(model, given, 1, 64)
    assert all(word in str(error.value) for word in words) and "secret" not in str(error.value), (
        error.value
    )


def test_a_long_document_is_no_file_name_in_an_error(model):
    refused(lambda: qlab.tokens(model, "secret " * 3, 1, 64), "less than one window")
    with pytest.raises(qlab.QlabError) as error:
        qlab.tokens(model, "secret " * 900, 900, 64)
    assert "secret" not in str(error.value)


def test_a_chat_that_the_template_refuses_is_not_shown(model, monkeypatch):
    tokenizer = calibration.tokenizer_of(model)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(calibration, "tokenizer_of", lambda model: tokenizer)
    refused(
        lambda: qlab.tokens(model, [{"messages": CHATS[0]}], 1, 8),
        "chat template",
        "roles must alternate",
        "repair the row",
    )


def test_parquet_without_its_reader_says_what_to_install(model, tmp_path, monkeypatch):
    (tmp_path / "a.bin").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(
        lambda: qlab.tokens(model, tmp_path / "a.bin", 1, 8),
        "a.bin is parquet",
        "pyarrow",
        "install it",
    )


@pytest.mark.parametrize("column, values", [("text", DOCUMENTS), ("messages", CHATS)])
def test_parquet_holds_the_documents_of_json_lines(model, expected, tmp_path, column, values):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"id": list(range(5)), column: values}), tmp_path / "a.parquet"
    )
    assert torch.equal(qlab.tokens(model, tmp_path / "a.parquet", 10, 16).ids, expected)
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    refused(
        lambda: qlab.tokens(model, tmp_path / "a.parquet", 1, 8), "no parquet that pyarrow reads"
    )


def byte_pairs(pre_tokenizer, normalizer=None):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [prose(500)],
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


TOKENIZERS = {
    "words between spaces": lambda: byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "a space in front": lambda: byte_pairs(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no words at all": lambda: byte_pairs(
        None, normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    ),
}
LONG = {
    "prose": prose(4000),
    "many bytes a letter": "\U0001f642 \u65e5\u672ca\u0301 " * 3000,
    "one letter": "word1 " + "o" * 9000 + " word2" * 2000,
    "spaces": "word1" + " " * 20_000 + "word2",
}


@pytest.mark.parametrize("text", LONG)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_long_document_cut_into_pieces_has_the_same_tokens(monkeypatch, kind, text):
    monkeypatch.setattr(tokenizing, "PIECE", 4000)
    monkeypatch.setattr(tokenizing, "MARGIN", 200)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[kind]())
    pieces = [LONG[text][i : i + 1000] for i in range(0, len(LONG[text]), 1000)]
    joined = [i for ids in tokenizing.token_ids(tokenizer, [pieces, ["word3"]]) for i in ids]
    whole = tokenizer([LONG[text] + "\n\n", "word3\n\n"], add_special_tokens=False).input_ids
    assert joined == whole[0] + whole[1]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_no_more_than_a_piece_is_tokenized_at_a_time(model, tmp_path, monkeypatch, name):
    texts = [prose(4000, seed) for seed in range(20)]
    (tmp_path / name).write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in texts)
        if name == "a.jsonl"
        else "\n\n".join(texts)
    )
    whole = qlab.tokens(model, tmp_path / name, 4, 32)
    longest, plain = [], tokenizing._encoded

    def watched(tokenizer, texts, places):
        longest.append(sum(map(len, texts)))
        return plain(tokenizer, texts, places)

    monkeypatch.setattr(tokenizing, "_encoded", watched)
    monkeypatch.setattr("qlab.data.calibration.SPOOL", 1000)
    assert torch.equal(qlab.tokens(model, tmp_path / name, 4, 32).ids, whole.ids)
    assert len(longest) > 4 and max(longest) < 3 * tokenizing.PIECE
    longest.clear()
    few = qlab.first_windows(model, tmp_path / name, 32, 2)
    # What is not needed is hashed and not tokenized.
    assert len(longest) < 4 and few.sha256 == whole.sha256
