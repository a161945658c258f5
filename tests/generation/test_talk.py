"""Conversations: what the model is told, the commands, and the terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_folders import WORDS, refused

import qlab
from qlab.cli.chatting import answer
from qlab.generation.talk import COMMANDS, Talk

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


@pytest.fixture(scope="module")
def speaker(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("speaker") / "out"
    qlab.quantize(saved("llama"), qlab.rtn("int4-g32"), None, out)
    return out


@pytest.fixture
def talk(speaker):
    with qlab.pipeline(speaker, dtype=torch.float32) as pipe:
        pipe.tokenizer.chat_template = TEMPLATE
        yield Talk(pipe=pipe, settings={"max_tokens": 5})


def test_the_model_is_told_all_that_was_said(talk, monkeypatch):
    told = []
    stream = talk.pipe.stream
    monkeypatch.setattr(
        talk.pipe, "stream", lambda prompt, **more: (told.append(prompt), stream(prompt, **more))[1]
    )
    talk.command(f"/system {WORDS[0]}")
    first = "".join(talk.reply(WORDS[1]))
    second = "".join(talk.reply(WORDS[2]))
    said = [("system", WORDS[0]), ("user", WORDS[1]), ("assistant", first), ("user", WORDS[2])]
    assert told[1] == [{"role": role, "content": text} for role, text in said]
    assert talk.messages[-1] == {"role": "assistant", "content": second}
    assert "4 messages" in talk.command("/stats")


def test_without_a_template_the_text_is_continued(talk):
    talk.pipe.tokenizer.chat_template = None
    reply = "".join(talk.reply(f"{WORDS[1]} {WORDS[2]}"))
    assert reply == talk.pipe(f"{WORDS[1]} {WORDS[2]}", max_tokens=5).text


def test_a_stopped_reply_is_kept_as_far_as_it_came(talk):
    pieces = talk.reply(WORDS[1])
    first = next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    assert talk.pipe.engine.is_idle


def test_what_cannot_be_answered_was_not_said(talk):
    refused(lambda: list(talk.reply("word1 " * 130)), "at most 128")
    assert talk.messages == []


def test_commands_change_the_talk(talk, tmp_path):
    list(talk.reply(WORDS[1]))
    said = list(talk.messages)
    file = tmp_path / "talk.json"
    talk.command("/system brief")
    talk.command(f"/save {file}")
    talk.command("/clear")
    assert talk.messages == []
    talk.command("/system ")
    talk.command(f"/load {file}")
    assert (talk.messages, talk.system) == (said, "brief")
    talk.command("/set temperature 0.5")
    assert talk.settings["temperature"] == 0.5 and "temperature 0.5" in talk.command("/set")
    assert all(f"/{name}" in talk.command("/help") for name in COMMANDS)


def test_a_command_that_does_not_fit_is_refused_and_changes_nothing(talk, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"messages": 3}))
    for content in (3, [{"type": "text", "text": 3}], [3]):
        saved = {"system": "", "messages": [{"role": "user", "content": content}]}
        (tmp_path / "kinds.json").write_text(json.dumps(saved))
        refused(lambda: talk.command(f"/load {tmp_path / 'kinds.json'}"), "kinds.json", "/save")
    (tmp_path / "deep.json").write_text("[" * 10**5)
    refused(lambda: talk.command(f"/load {tmp_path / 'deep.json'}"), "deep.json", "/save")
    refused(lambda: talk.command("/save ~no-such-user/x"), "~no-such-user/x", "nobody")
    before = (list(talk.messages), dict(talk.settings), talk.system)
    refused(lambda: talk.command("/forget"), "/forget", "/help")
    refused(lambda: talk.command("/set warmth 3"), "warmth", "temperature")
    refused(lambda: talk.command("/set temperature hot"), "hot", "number")
    refused(lambda: talk.command("/set temperature -3"), "-3")
    refused(lambda: talk.command("/save"), "file")
    refused(lambda: talk.command(f"/load {tmp_path / 'none.json'}"), "none.json")
    refused(lambda: talk.command(f"/load {tmp_path / 'other.json'}"), "other.json", "/save")
    refused(lambda: talk.command(f"/save {tmp_path / 'no' / 'x.json'}"), "x.json")
    assert (talk.messages, talk.settings, talk.system) == before


def _listens():
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Terminal:
    """`qlab chat` behind a pseudo-terminal."""

    def __init__(self, *arguments):
        self.fd, theirs = pty.openpty()
        command = [sys.executable, "-m", "qlab", "chat", *map(str, arguments)]
        env = {**os.environ, "TERM": "dumb"}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
            preexec_fn=_listens,  # a shell lets what it runs behind itself ignore Ctrl-C
        )
        os.close(theirs)
        self.seen = ""

    def until(self, text, seconds=600):
        """What was printed up to a text, which is taken away."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def interrupt(self):
        """Ctrl-C while a key is waited for: before that it would wait for the key too."""
        state = Path(f"/proc/{self.process.pid}/stat")
        while state.read_text().rpartition(") ")[2][0] != "S":
            time.sleep(0.01)
        os.kill(self.process.pid, signal.SIGINT)

    def say(self, *lines):
        os.write(self.fd, "".join(f"{line}\n" for line in lines).encode())


def test_ctrl_c_stops_a_reply_and_keeps_the_talk(talk, monkeypatch, capsys):
    step, steps = talk.pipe.engine.step, []

    def interrupted():
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr(talk.pipe.engine, "step", interrupted)
    answer(talk, WORDS[1])
    said = capsys.readouterr().out
    assert said.endswith(" [stopped]\n")
    assert talk.messages[-1]["content"] == said.removesuffix(" [stopped]\n") != ""
    answer(talk, WORDS[2])
    assert len(talk.messages) == 4 and talk.pipe.engine.is_idle


def test_the_terminal_talks_and_leaves(speaker):
    terminal = Terminal(speaker, "--max-tokens", 20, "--activations", "none")
    terminal.until("> ")
    terminal.say("/stats")
    terminal.until("0 messages")
    terminal.until("> ")
    terminal.say("\x1b[A")  # the key that brings the line before
    terminal.until("0 messages")
    terminal.say('"""', "word1", "word2", '"""', "/stats")
    terminal.until("2 messages")
    terminal.until("> ")
    terminal.interrupt()
    terminal.until("/exit leaves")
    terminal.say("/warm", "/exit")
    terminal.until("there is no /warm")
    assert terminal.process.wait(600) == 0
