"""Texts in, replies out: in Python, streamed, and from file to file."""

import errno
import fcntl
import gc
import json
import os
import weakref

import pytest
import torch
import transformers
from model_folders import WORDS, change, prose, refused, rewrite

import qlab
from qlab.cli import main
from qlab.errors import QlabError
from qlab.generation import offline
from qlab.generation.offline import answer_file, prompts_of
from qlab.generation.text import GrowingText


@pytest.fixture(scope="module")
def spoken(saved, tmp_path_factory):
    """A tiny llama of 8-bit weights, with a tokenizer."""
    out = tmp_path_factory.mktemp("spoken") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int8-channel"), None, out)
    return out


@pytest.fixture
def pipe(spoken):
    with qlab.pipeline(spoken, dtype=torch.float32, rows=3) as pipe:
        yield pipe


def test_replies_are_those_of_generate(pipe, spoken):
    prompts = [prose(n, seed=n) for n in (3, 17, 1, 8)]
    model = qlab.lower(spoken, dtype=torch.float32)
    replies = pipe(prompts, max_tokens=6)
    for prompt, reply in zip(prompts, replies):
        ids = torch.tensor([pipe.ids(prompt)])
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert [*reply.tokens] == expected.tolist()
        assert reply.text == pipe.tokenizer.decode(expected, skip_special_tokens=True)
        assert reply.prompt_tokens == ids.shape[1] and reply.finish in ("length", "stop")
    assert pipe(prompts[1], max_tokens=6).tokens == replies[1].tokens


def test_ids_and_chats_are_prompts_too(pipe):
    text = prose(4)
    ids = pipe.ids(text)
    chat = [{"role": "user", "content": text}]
    replies = pipe([text, ids, chat], max_tokens=4)
    assert len({reply.tokens for reply in replies}) == 1
    assert pipe(ids, max_tokens=4) == pipe(chat, max_tokens=4)


def test_a_stream_is_the_reply_in_pieces_and_a_closed_one_ends(pipe):
    text = prose(5)
    whole = pipe(text, max_tokens=12).text
    assert "".join(pipe.stream(text, max_tokens=12)) == whole
    word = whole.split()[3]
    cut = pipe(text, max_tokens=12, stop=word)
    assert cut.text == whole[: whole.index(word)] and cut.finish == "stop"
    assert "".join(pipe.stream(text, max_tokens=12, stop=[word])) == cut.text
    stream = pipe.stream(text, max_tokens=12)
    next(stream)
    stream.close()
    assert pipe.engine.is_idle and pipe.engine.pages.available == pipe.engine.pages.count


def test_transformers_pipeline_runs_a_lowered_model(pipe, spoken):
    model = qlab.lower(spoken, dtype=torch.float32)
    theirs = transformers.pipeline("text-generation", model=model, tokenizer=pipe.tokenizer)
    prompts = [prose(n, seed=n) for n in (3, 9)]
    for prompt, (said,) in zip(prompts, theirs(prompts, max_new_tokens=5, do_sample=False)):
        expected = pipe(prompt, temperature=0, max_tokens=5).text
        assert said["generated_text"].removeprefix(prompt).strip() == expected


@pytest.mark.parametrize("stop", [["ghi"], ["xyz", "d"], ["aab"], [""], []])
def test_text_grows_up_to_the_first_stop_string(stop):
    class Letters:
        """A tokenizer of letters, two of which are half a character each."""

        def decode(self, tokens, **_):
            text = "".join(map(chr, tokens))
            whole = text.replace("<>", "é")
            return whole.replace("<", "�").replace(">", "�")

    letters = "aaabc<>def ghi jk<>"
    text, pieces = GrowingText(Letters(), stop), []
    for letter in letters:
        pieces.append(text.add(ord(letter)))
        of_tokens = Letters().decode(map(ord, letters[: text.told_tokens])).rstrip("�")
        assert of_tokens == "".join(pieces)
    pieces.append(text.end())
    expected = letters.replace("<>", "é")
    places = [expected.index(s) for s in stop if s and s in expected]
    assert "".join(pieces) == expected[: min(places, default=None)]
    assert text.is_ended == bool(places)


def test_what_is_no_prompt_or_setting_is_refused(pipe, folder):
    refused(lambda: pipe("word1", max_token=3), "max_token", "max_tokens")
    refused(lambda: pipe([[1.5]]), "float", "token ids")
    refused(lambda: pipe([{"role": "user"}] * 2, temperature=-1), "temperature")
    refused(lambda: pipe("word1 " * 120, max_tokens=20), "at most 128")
    (folder / "tokenizer.json").unlink()
    refused(lambda: qlab.pipeline(folder), "no tokenizer")
    pipe.tokenizer.chat_template = None
    refused(lambda: pipe([{"role": "user", "content": "word1"}]), "chat template")


def test_what_was_asked_is_let_go_of_as_soon_as_nobody_holds_it(pipe):
    gc.collect()
    gc.disable()
    try:
        for more in ({}, {"choice": ["a"]}):
            asked = pipe.ask("word1", max_tokens=2, **more)
            pipe.wait_for(asked)
            left = [weakref.ref(asked), weakref.ref(asked.request), weakref.ref(asked.text)]
            del asked
            assert [ref() for ref in left] == [None, None, None]
    finally:
        gc.enable()


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def asked(tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = [{"prompt": prose(3, seed=i), "max_tokens": 2 + i} for i in range(5)]
    prompts[2] = {"messages": [{"role": "user", "content": WORDS[3]}], "stop": "zzz"}
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return path


def test_a_file_is_answered_in_order_and_goes_on_where_it_was_cut(pipe, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    run = lambda: answer_file(pipe, prompts_of(asked), out, {"max_tokens": 3}, {})
    done = run()
    whole = out.read_bytes()
    assert (done.answers, done.before, done.failed) == (5, 0, 0)
    assert [row["new_tokens"] for row in rows(out)] == [2, 3, 3, 5, 6]
    for cut in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        again = run()
        assert out.read_bytes() == whole and again.before == whole[:cut].count(b"\n")


def test_two_runs_at_once_do_not_write_to_one_file(pipe, asked, tmp_path):
    out = tmp_path / "answers.jsonl"
    run = lambda: answer_file(pipe, prompts_of(asked), out, {"max_tokens": 3}, {})
    run()
    whole = out.read_bytes()
    out.write_bytes(whole[:-1])  # as while the other one writes
    with out.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(QlabError, match="another run is writing to"):
            run()
        assert out.read_bytes() == whole[:-1]
    assert run().before == 4 and out.read_bytes() == whole


def test_a_file_that_cannot_be_locked_is_refused(pipe, asked, tmp_path, monkeypatch):
    def no_lock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    out = tmp_path / "answers.jsonl"
    run = lambda: answer_file(pipe, prompts_of(asked), out, {}, {})
    refused(run, f"{out} cannot be locked (No locks available)", "name another file")


def test_the_file_is_locked_from_the_first_look_to_the_last_answer(
    pipe, asked, tmp_path, monkeypatch
):
    out, inner = tmp_path / "answers.jsonl", []

    def append(file, known_by, reply):
        inner.append(refused(lambda: answer_file(pipe, prompts_of(asked), out, {}, {}), "another"))
        return before(file, known_by, reply)

    before = offline._append
    monkeypatch.setattr(offline, "_append", append)
    answer_file(pipe, prompts_of(asked), out, {"max_tokens": 3}, {})
    assert len(inner) == 5 == len(rows(out))


def test_bad_lines_are_named_and_nothing_that_was_answered_is_lost(pipe, asked, tmp_path):
    out, lines = tmp_path / "answers.jsonl", asked.read_bytes().splitlines(keepends=True)
    run = lambda: answer_file(pipe, prompts_of(asked), out, {"max_tokens": 3}, {})
    for bad, said in {
        b"{": "no JSON",
        b"[]": "no prompt",
        b'{"prompt": ""}': "empty prompt",
        b'{"text": "a"}': "no prompt",
        b'{"prompt": "a\xff"}': "no JSON",
        b'{"prompt": "a", "prompt": "b"}': "'prompt' twice",
        b'{"prompt": "a", "self": 1}': "no setting 'self'",
        b'{"messages": [3]}': "messages that are no list of objects",
        b'{"prompt": "a", "tools": 3}': "tools that are no list of objects",
        b"[" * 10**5: "no JSON",
    }.items():
        asked.write_bytes(lines[0] + b"\r\n" + bad + b"\n")
        refused(run, "line 3", asked.name, said)
        assert not out.exists()
    asked.write_bytes(lines[0] + b'{"prompt": "word1", "top_p": 7}\n' + lines[1])
    assert run().failed == 1
    assert ["error" in row for row in rows(out)] == [False, True, False]
    answers = out.read_bytes()
    asked.write_bytes(lines[1])
    refused(run, "line 1 answers another prompt")
    asked.write_bytes(lines[0] + lines[2])
    refused(
        lambda: answer_file(pipe, prompts_of(asked), out, {"max_tokens": 4}, {}), "other settings"
    )
    refused(
        lambda: answer_file(pipe, prompts_of(asked), out, {"max_tokens": 3}, {"fingerprint": "0"}),
        "another model",
    )
    out.write_text("{}\n")
    refused(run, "no answer of this version of qlab run")
    out.write_bytes(answers)
    asked.write_bytes(lines[0])
    refused(run, "3 answers", "1 prompts")
    assert out.read_bytes() == answers


def test_a_line_whose_settings_are_of_another_kind_fails_alone(pipe, asked, tmp_path):
    wrong = {
        "max_tokens": ["8", 2.5, True, None],
        "top_p": ["1"],
        "stop": [3, [3]],
        "logit_bias": [[1], {"a": 1}, {"5": "1"}, {"500": 1}],
        "seed": ["a", 2**70],
        "logprobs": ["a"],
        "regex": [3],
        "choice": [3],
    }
    bad = [{"prompt": WORDS[1], name: value} for name in wrong for value in wrong[name]]
    good = {"prompt": WORDS[1], "logit_bias": {"5": 100}, "max_tokens": 1, "temperature": 0}
    said = [*bad, {"prompt": [1, "a"]}, good]
    asked.write_text("\ufeff" + "\r\n\r\n".join(map(json.dumps, said)))
    done = answer_file(pipe, prompts_of(asked), tmp_path / "out", {}, {})
    assert (done.answers, done.failed) == (len(said), len(said) - 1)
    *failed, answered = rows(tmp_path / "out")
    assert all(row["error"] for row in failed) and answered["text"] == pipe.tokenizer.decode([5])


@pytest.mark.parametrize(
    "template, said",
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps"),
        ("{{ 'a' * 40000000 }}", "40000000 characters"),
        ("{% for m in messages %}", "refuses the messages"),
        ("{{ raise_exception('no') }}", "refuses the messages (no)"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses the messages"),
    ],
)
def test_a_chat_template_that_does_not_end_or_is_broken_is_refused(pipe, template, said):
    pipe.tokenizer.chat_template = template
    refused(lambda: pipe([{"role": "user", "content": "word1"}]), "chat template", said)
    pipe.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert pipe([{"role": "user", "content": "word1"}], max_tokens=2).tokens


def test_the_command_answers_and_says_how_many(spoken, asked, tmp_path, command):
    out = tmp_path / "answers.jsonl"
    given = ("run", spoken, "--in", asked, "--out", out, "--max-tokens", 3, "--dtype", "float32")
    code, said, _ = command(main, *given)
    assert code == 0 and "5 answers, 0 of them from before, 0 failed" in said
    asked.write_text('{"prompt": "word1", "max_tokens": 500}\n')
    out.unlink()
    code, said, _ = command(main, *given)
    assert code == 1 and "1 failed" in said and "at most 128" in rows(out)[0]["error"]
    for places in ((tmp_path / "none", out), (asked, tmp_path / "none" / "out")):
        code, _, error = command(main, *given[:2], "--in", places[0], "--out", places[1])
        assert code == 2 and "none" in error and "Traceback" not in error
    os.mkfifo(tmp_path / "pipe")  # it would be read for ever
    for place in (tmp_path / "pipe", tmp_path):
        code, _, error = command(main, *given[:4], "--out", place)
        assert code == 2 and f"{place} is no regular file" in error


def test_a_dense_directory_without_a_tensor_is_refused_and_not_filled_at_random(folder):
    change(folder, model__layers__1__mlp__up_proj__weight=None)
    refused(lambda: qlab.pipeline(folder), "has no tensor model.layers.1.mlp.up_proj.weight")


@pytest.mark.parametrize(
    "said", [{"eos_token_id": ["x"]}, {"temperature": "warm", "do_sample": True}, {"do_sample": 7}]
)
def test_a_generation_config_with_what_does_not_belong_there_is_refused(said, folder):
    rewrite(folder / "generation_config.json", lambda config: config.update(said))
    refused(lambda: qlab.pipeline(folder), f"generation_config.json has {next(iter(said))}")
