"""Replies of a random model that are words of a grammar."""

import json
import re
import string

import pytest
import torch
from model_folders import refused
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import qlab
from qlab.generation import grammar

pytest.importorskip("xgrammar")
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "dog"]},
        "ok": {"type": "boolean"},
    },
    "required": ["age", "kind", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pipe(saved, tmp_path_factory):
    """A tiny llama whose tokens are letters."""
    out = tmp_path_factory.mktemp("letters") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, out)
    letters = ["<pad>", "<s>", "</s>", *string.printable[:95]]
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(out)
    with qlab.pipeline(out, dtype=torch.float32) as pipe:
        yield pipe


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_replies_of_every_kind_are_words_of_their_grammar(pipe, temperature):
    more = {"temperature": temperature, "max_tokens": 60, "logit_bias": {13: 2.0}}
    for seed in range(4):
        asked = [
            pipe.ask("a", schema=SCHEMA, seed=seed, **more),
            pipe.ask("b", regex=r"[a-c]{3}-\d{2}", seed=seed, **more),
            pipe.ask("c", choice=['so "so"', "yes", "no"], seed=seed, **more),
            pipe.ask("d", seed=seed, **more),
        ]
        one, two, three, free = (pipe.wait_for(a) for a in asked)
        value = json.loads(one.text)
        assert 0 <= value["age"] <= 99 and value["kind"] in ("cat", "dog") and len(value) == 3
        assert re.fullmatch(r"[a-c]{3}-\d{2}", two.text)
        assert three.text in ('so "so"', "yes", "no")
        assert all(r.is_whole and r.finish == "stop" for r in (one, two, three))
        assert free.is_whole is None


def test_a_word_that_is_cut_says_so(pipe):
    reply = pipe("a", schema=SCHEMA, max_tokens=5)
    assert reply.finish == "length" and reply.is_whole is False


def test_what_makes_no_grammar_is_refused_and_the_next_one_is_answered(pipe):
    refused(lambda: pipe("a", schema={"type": "nothing"}), "schema")
    refused(lambda: pipe("a", schema="{"), "schema")
    refused(lambda: pipe("a", regex="("), "regex")
    refused(lambda: pipe("a", choice="yes"), "choice", "list of texts")
    refused(lambda: pipe("a", regex="a", choice=["b"]), "regex and choice")
    assert pipe("a", choice=["z"]).text == "z"


def test_grammars_of_many_requests_take_about_the_memory_that_is_kept_for_them(pipe, monkeypatch):
    """All of these take ten times as much."""
    monkeypatch.setattr(grammar, "KEPT", 2**16)
    grammars = grammar.Grammars(pipe.tokenizer, pipe.engine.vocabulary, [2])
    sizes = []
    for n in range(1, 60):
        grammars.word("regex", rf"[a-c]{{{n}}}-\d{{2}}")
        sizes.append(grammars._compiler.get_cache_size_bytes())
    assert 0 < sizes[0] < max(sizes) < 1.5 * 2**16
